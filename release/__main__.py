"""`python -m release COMMAND`, from the root of a clone."""

import argparse
import importlib
import sys

# Imported one at a time: trying a wheel needs nothing but Python, and building one needs torch.
COMMANDS = {"build": "release.build", "audit": "release.audit", "try": "release.attempt"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m release", description="Make, check and try fastbn's packages.")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="see python -m release COMMAND --help")
    args = parser.parse_args(None if sys.argv[1:] else ["--help"])
    command = importlib.import_module(COMMANDS[args.command])
    own = argparse.ArgumentParser(prog=f"python -m release {args.command}", description=command.__doc__)
    command.add_arguments(own)
    return command.run(own.parse_args(args.rest))


if __name__ == "__main__":
    sys.exit(main())
