"""Compare fastbn and torch.nn with a float64 reference on this machine, and float64 with a longer one: outputs, running
statistics and gradients, over shapes, layouts, dtypes and fused operations. Exits with 1 if fastbn's error exceeds its
bound anywhere."""

import argparse
from collections.abc import Iterator, Sequence

import torch

from fastbn.cli.errors import device
from fastbn.cli.text import table
from fastbn.testing import extended
from fastbn.testing.compare import Comparison, VerifyCase, compare_case
from fastbn.testing.tolerance import ACCEPTED_ULPS, ACCEPTED_ULPS_FLOAT64

SUMMARY = "compare fastbn and torch.nn with float64 on this machine"

_BF16, _F16, _F64 = torch.bfloat16, torch.float16, torch.float64
QUICK_CASES = [
    VerifyCase((64, 96)),
    VerifyCase((8, 32, 14, 14)),
    VerifyCase((8, 32, 14, 14), relu=True, residual=True, layout="channels_last"),
    VerifyCase((8, 32, 14, 14), _BF16, relu=True, layout="channels_last"),
    VerifyCase((8, 32, 14, 14), relu=True, training=False),
    VerifyCase((8, 16, 28, 28), mean=1e4, std=1e-2),
    VerifyCase((8, 32, 14, 14), _F64, relu=True, residual=True, parameter_dtype=_F64),
]
FULL_CASES = QUICK_CASES + [
    VerifyCase((256, 120), relu=True),
    VerifyCase((8, 13, 31)),
    VerifyCase((16, 64, 56, 56), _BF16, relu=True, residual=True),
    VerifyCase((16, 64, 56, 56), _BF16, relu=True, residual=True, layout="channels_last"),
    VerifyCase((16, 6, 24, 24), _F16, layout="channels_last"),
    VerifyCase((32, 256, 7, 7), _F16, relu=True),
    VerifyCase((32, 256, 7, 7), _BF16, parameter_dtype=_BF16),
    VerifyCase((256, 120), _F64, parameter_dtype=_F64),
    VerifyCase((16, 24, 20, 20), _F64, layout="channels_last", parameter_dtype=_F64),
    VerifyCase((16, 24, 20, 20), _F64, relu=True, training=False, parameter_dtype=_F64),
    VerifyCase((4, 16, 8, 14, 14), relu=True, layout="channels_last_3d"),
    VerifyCase((8, 17, 13, 11), relu=True, layout="sliced"),
    VerifyCase((16, 64, 28, 28), _BF16, relu=True, residual=True, training=False, layout="channels_last"),
    VerifyCase((8, 16, 28, 28), mean=1e4, std=1e-2, layout="channels_last"),
    VerifyCase((8, 16, 28, 28), mean=1e4, std=1e-2, relu=True, training=False),
]

_HEADER = ["mode", "operation", "shape", "layout", "dtype", "data", "quantity", "fastbn", "stock", "bound", ""]
_GROUPS = ("output", "running_", "grad_")
_NOTE = f"""\
Errors are the largest difference from float64, in ulp of the quantity's dtype at its largest value. A row for the
running statistics, or for the gradients, shows the one closest to its bound. The bound is the larger of stock's error
and {ACCEPTED_ULPS:g} ulp. float64 itself is compared with numpy.longdouble, to {ACCEPTED_ULPS_FLOAT64:g} ulp."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fastbn verify`."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where both run (default: cpu)")
    parser.add_argument(
        "--quick", action="store_true", help=f"only the {len(QUICK_CASES)} smallest of {len(FULL_CASES)} cases"
    )
    parser.epilog = _NOTE


def run(args: argparse.Namespace) -> int:
    """Compare all cases and print a table. Returns 1 if an error exceeds its bound, else 0."""
    where = device(args.device)
    cases = QUICK_CASES if args.quick else FULL_CASES
    left_out = extended.why_unavailable()
    if left_out:
        cases = [case for case in cases if case.dtype != _F64]
    rows, failures, quantities = [_HEADER], list[tuple[VerifyCase, Comparison]](), 0
    for case in cases:
        comparisons = list(compare_case(case, where))
        quantities += len(comparisons)
        failures += [(case, comparison) for comparison in comparisons if not comparison.passed]
        rows += _rows(case, comparisons)
    print("\n".join(table(rows, left=(0, 1, 2, 3, 4, 5, 6, 10))))
    print(f"\n{_NOTE}\n")
    if left_out:
        print(f"float64 was left out: {left_out}.")
    for case, comparison in failures:
        got, bound = f"{comparison.fastbn:.2f}", f"{comparison.bound:.2f}"
        print(f"FAIL  {comparison.quantity}: expected at most {bound} ulp, got {got}: {case}")
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    checked = f"{quantities} quantities of {len(cases)} cases on {name}"
    print(f"{len(failures)} of {checked} exceed their bound." if failures else f"All {checked} are within their bound.")
    return 1 if failures else 0


def _rows(case: VerifyCase, comparisons: Sequence[Comparison]) -> Iterator[list[str]]:
    about = [
        "train" if case.training else "eval",
        case.operation,
        "x".join(map(str, case.shape)),
        case.layout,
        str(case.dtype).removeprefix("torch."),
        f"{case.mean:g} ± {case.std:g}",
    ]
    for prefix in _GROUPS:
        group = [comparison for comparison in comparisons if comparison.quantity.startswith(prefix)]
        if group:
            worst = max(group, key=lambda comparison: comparison.fastbn / comparison.bound)
            errors = [f"{error:.2f}" for error in (worst.fastbn, worst.stock, worst.bound)]
            yield [*about, worst.quantity, *errors, "ok" if worst.passed else "FAIL"]
            about = [""] * len(about)
