"""Time fastbn and its rivals on this machine, and say how far each op is from the memory floor. Runs in a clone of
fastbn, whose tables of cases it uses: `python -m bench` there is the same command."""

import argparse

from fastbn.cli import clone
from fastbn.cli.arguments import number, path, patterns

SUMMARY = "time fastbn and its rivals on this machine"

# Upper limits of times, in seconds. Nobody waits longer, and every sum of such times is finite.
DAY, WEEK = 86400, 604800

_NOTE = """\
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
        "(default: quick)"
    )
    what.add_argument("--suite", choices=["quick", "cpu", "gpu", "visit", "networks"], default="quick", help=suites)
    what.add_argument(
        "--part",
        action="append",
        choices=["layers", "calls", "networks"],
        help="only the ops' times, the costs of a call, or whole networks; repeatable (default: all of the suite's)",
    )
    for name, of in (
        ("case", "cases or groups, as --list names them, or networks"),
        ("op", "operations"),
        ("shape", "shapes, as in 16x64x56x56"),
        ("dtype", "dtypes"),
        ("layout", "contiguous, channels_last or channels_last_3d"),
        (
            "implementation",
            "implementations: torch, compile, compile-max-autotune, onednn, fastbn; of networks torch, convert, fused, "
            "compiled-torch, compiled-convert, compiled-fused, compiled-pass (without this, few cases are compiled)",
        ),
    ):
        what.add_argument(f"--{name}", type=patterns, default=["*"], metavar="PATTERN", help=f"only these {of}")
    what.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        help="for the suites quick and networks (default: cuda where there is one)",
    )
    what.add_argument("--list", action="store_true", help="name what would be measured, and end")
    how = parser.add_argument_group("how")
    seconds = (
        "for each implementation of a case, eight times as much for one of a network (default: 0.15, in the suites cpu "
        "0.08 and networks 0.05)"
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
    out.add_argument("--json", type=path, metavar="FILE", help="write all records")
    out.add_argument("--plots", type=path, metavar="DIR", help="write plots, and report.md, which holds them too")
    out.add_argument("--load", type=path, metavar="FILE", help="take the records of FILE instead of measuring")
    out.add_argument("--compare", type=path, metavar="OLD", help="compare with the records of OLD, regressions first")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark of the clone. Returns the exit status that `_NOTE` describes."""
    status: int = clone.load("bench", "bench.command").run(args)
    return status
