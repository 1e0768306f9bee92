"""The command `fastbn`: one file a subcommand, each with `add_arguments(parser)` and `run(args) -> int`."""

import argparse
import sys

from fastbn.cli import bench, demo, info, verify
from fastbn.cli.errors import CommandError

_COMMANDS = {"info": info, "verify": verify, "bench": bench, "demo": demo}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastbn", description="BatchNorm for PyTorch with fused kernels.")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        sub = commands.add_parser(name, help=command.SUMMARY, description=command.__doc__)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand with `argv` (None: the process's own arguments).

    Returns the exit status: 0 for success, 1 where a check failed, 2 where the command could not do its work. argparse
    itself exits with SystemExit(2) on arguments that it does not know.
    """
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except CommandError as error:
        print(error, file=sys.stderr)
        return 2
