"""The command `fastbn`: one file per subcommand, each with `add_arguments(parser)` and `run(args) -> int`."""

import argparse
import contextlib
import io
import os
import sys
from typing import IO

from fastbn._version import __version__
from fastbn.cli import bench, demo, doctor, info, verify
from fastbn.cli.errors import CommandError, reason

_COMMANDS = {"info": info, "verify": verify, "bench": bench, "demo": demo, "doctor": doctor}


class _Parser(argparse.ArgumentParser):
    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        # argparse's own method ignores errors of writing.
        print(self.format_help(), end="", file=file)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line. The parsed arguments hold the subcommand's function as `run`."""
    parser = _Parser(prog="fastbn", description="BatchNorm for PyTorch with fused kernels.")
    parser.add_argument("--version", action="version", version=f"fastbn {__version__}")

    def show_help(args: argparse.Namespace) -> int:
        parser.print_help()
        return 0

    parser.set_defaults(run=show_help)
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, command in _COMMANDS.items():
        sub = commands.add_parser(name, help=command.SUMMARY, description=command.__doc__)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand with `argv` (None: the process's own arguments).

    Returns the exit status: 0 for success; 1 where a check or the command itself failed; 2 for misuse (arguments or
    files that the command cannot use); 130 for an interrupt; 141 for a closed pipe.
    argparse itself exits with SystemExit(2) on arguments that it refuses.
    """
    _prepare_streams()
    try:
        try:
            args = build_parser().parse_args(argv)
            status: int = args.run(args)
            return status
        finally:
            sys.stdout.flush()  # while a failure can still be reported; at exit it could not
    except CommandError as error:
        return _end(error.status, str(error))
    except KeyboardInterrupt:
        return _end(130, "Interrupted.")
    except BrokenPipeError:
        return _end(141)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "  # stdout and stderr have no name
        return _end(1, f"fastbn: {where}{reason(error)}")


def _prepare_streams() -> None:
    """Point closed streams at the null device, and escape characters that the encoding of stdout lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _end(status: int, message: str | None = None) -> int:
    """Print `message` on stderr and empty both streams, whatever state they are in. Returns `status`."""
    with contextlib.suppress(OSError):
        if message is not None:
            print(message, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # At exit the interpreter would try again to write what the stream still holds.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status
