"""Time fastbn and its rivals on this machine, and say how far each op is from the memory floor. One shape (--shape
without --suite) takes seconds and needs only fastbn and torch. Suites run in a clone of fastbn, whose tables of cases
they use: `python -m bench` there is the same command."""

import argparse

from fastbn.cli import clone, one_shape
from fastbn.cli.arguments import Once, number, path, patterns
from fastbn.cli.errors import CommandError

SUMMARY = "time fastbn and its rivals on this machine"

# Upper limits of times, in seconds. Nobody waits longer, and every sum of such times is finite.
DAY, WEEK = 86400, 604800

# The options that select cases of a suite.
_PATTERNS = ("case", "op", "shape", "dtype", "layout", "implementation")

_NOTE = """\
Without --suite, --shape is one exact shape, 128,256,56,56 or 128x256x56x56, and --dtype, --layout and --op are one each
(default: float32, contiguous, train_backward). With --suite, or without --shape, they are patterns:

  fastbn bench --shape 128,256,56,56 --dtype bf16 --layout channels_last --op train_backward+relu
  fastbn bench --suite cpu --shape '16x64x*' --op 'train*'

PATTERNs are shell-style (*, ?, [...]), and several are separated by commas. An operation is a mode (train,
train_backward, eval, frozen) and what is fused, as in train_backward+add+relu. Networks have train_backward and eval.
Every result is checked against float64 before it is timed. Exits with 1 if a result of fastbn is wrong or --compare
finds a regression, with 130 if it was interrupted; what was measured until then is written and shown.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fastbn bench`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _NOTE
    what = parser.add_argument_group("what to measure")
    suites = (
        "quick: a few cases, under 2 minutes; cpu, gpu: all cases for such a machine; "
        "visit: twelve cases for a GPU, with torch.compile; networks: training steps and evaluations of ten networks "
        "(default: quick, or one shape with --shape)"
    )
    what.add_argument("--suite", choices=["quick", "cpu", "gpu", "visit", "networks"], help=suites)
    what.add_argument(
        "--part",
        action="append",
        choices=["layers", "calls", "networks"],
        help="only the ops' times, the costs of a call, or whole networks; repeatable (default: all of the suite's)",
    )
    for name, of in (
        ("case", "cases or groups, as --list names them, or networks"),
        ("op", "operations"),
        ("shape", "shapes, as in 16x64x56x56; without --suite one shape, which is timed whatever the suites have"),
        ("dtype", "dtypes, by any of their names, such as bf16 or half"),
        ("layout", "contiguous, channels_last or channels_last_3d"),
        (
            "implementation",
            "implementations: torch, compile, compile-max-autotune, onednn, fastbn; of networks torch, convert, fused, "
            "compiled-torch, compiled-convert, compiled-fused, compiled-pass (without this, few cases are compiled)",
        ),
    ):
        what.add_argument(f"--{name}", type=patterns, action=Once, metavar="PATTERN", help=f"only these {of}")
    what.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        help="for one shape, and the suites quick and networks (default: cuda where there is one)",
    )
    what.add_argument("--list", action="store_true", help="name what would be measured, and end")
    how = parser.add_argument_group("how")
    seconds = (
        "for each implementation of a case, eight times as much for one of a network (default: 0.15, in the suites cpu "
        f"0.08 and networks 0.05, of one shape {one_shape.SECONDS:g})"
    )
    how.add_argument("--seconds", type=number(DAY), help=seconds)
    how.add_argument(
        "--time-limit",
        type=number(WEEK, or_zero=True),
        metavar="SECONDS",
        help="measure no longer; the most informative cases come first",
    )
    how.add_argument(
        "--against-itself",
        action="store_true",
        help="time a second instance of each implementation too: their ratio is what noise makes of 1",
    )
    out = parser.add_argument_group("results")
    to_json = "write all records; of one shape, without FILE, print them as JSON"
    out.add_argument("--json", type=path, nargs="?", const=one_shape.STDOUT, metavar="FILE", help=to_json)
    out.add_argument("--plots", type=path, metavar="DIR", help="write plots, and report.md, which holds them too")
    out.add_argument("--load", type=path, metavar="FILE", help="take the records of FILE instead of measuring")
    out.add_argument("--compare", type=path, metavar="OLD", help="compare with the records of OLD, regressions first")


def run(args: argparse.Namespace) -> int:
    """Time one shape, or run the benchmark of the clone. Returns the exit status that `_NOTE` describes."""
    if args.list and args.json is not None:
        raise CommandError("--json: expected no --list beside it, which measures nothing to write, got both")
    if args.shape is not None and args.suite is None:
        return one_shape.run(args)
    if args.json == one_shape.STDOUT:
        raise CommandError("--json: expected a file beside a suite, got none")
    args.suite = args.suite or "quick"
    for name in _PATTERNS:
        if getattr(args, name) is None:
            setattr(args, name, ["*"])
    args.shape, args.dtype = one_shape.shape_patterns(args.shape), one_shape.dtype_patterns(args.dtype)
    status: int = clone.load("bench", "bench.command").run(args)
    return status
