"""The command `fastbn`, outside of the package, so that it can say in one sentence why that cannot be imported."""

import sys


def main() -> int:
    """Run fastbn.cli.main. Returns its exit status, or 1 where fastbn cannot be imported."""
    try:
        from fastbn.cli import main as run
    except ImportError as error:
        text = str(error)
        print(text if text.startswith("fastbn") else f"fastbn: {text}", file=sys.stderr)
        return 1
    return run()
