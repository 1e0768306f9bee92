"""Print versions, how fastbn was built, which devices and backends it can use here, and why not the others."""

import argparse
import json

from fastbn.cli.text import outline
from fastbn.inspect.info import info

SUMMARY = "versions, build, devices, backends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option of `fastbn info`."""
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    """Print `fastbn.info()`. Returns 0."""
    print(json.dumps(info(), indent=2) if args.json else "\n".join(outline(info())))
    return 0
