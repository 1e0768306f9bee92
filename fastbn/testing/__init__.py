"""Cases, tolerances and comparisons with float64, for the tests, `bench`, `fastbn verify` and users' own tests.

    import torch
    from fastbn.testing import assert_parity, parity_cases

    for case in parity_cases("small", "bn2d"):
        assert_parity(torch.nn.BatchNorm2d, case)  # or a layer, or a kernel's function, of your own

`parity` has the cases and the check of any BatchNorm, `fixtures` the same for pytest (`-p fastbn.testing.fixtures`).
`cases` is the table of shapes, layouts and data below it, `tolerance` derives bounds from dtype and count, `compare`
measures fastbn's fused calls and torch against float64, and `extended` holds the formulas in numpy.longdouble.
"""

from fastbn.testing.compare import Comparison, VerifyCase, compare_case
from fastbn.testing.parity import PARITY_CASES, Deviation, ParityCase, assert_parity, parity_cases
from fastbn.testing.tolerance import assert_close_to_reference, assert_error_bound

__all__ = [
    "PARITY_CASES",
    "Comparison",
    "Deviation",
    "ParityCase",
    "VerifyCase",
    "assert_close_to_reference",
    "assert_error_bound",
    "assert_parity",
    "compare_case",
    "parity_cases",
]
