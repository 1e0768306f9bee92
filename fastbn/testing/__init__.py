"""Cases, tolerances and comparisons with float64, for the tests, `bench`, `fastbn verify` and users' own tests.

    from fastbn.testing import ParityCase, assert_parity
    assert_parity(ParityCase((8, 32, 14, 14), torch.bfloat16, relu=True), "cuda")

`cases` is the table of shapes, layouts and data, `tolerance` derives bounds from dtype and count, `compare` measures
fastbn and torch against float64, and `extended` holds the formulas in numpy.longdouble.
"""

from fastbn.testing.compare import Comparison, ParityCase, assert_parity, compare_case
from fastbn.testing.tolerance import assert_close_to_reference, assert_error_bound

__all__ = [
    "Comparison",
    "ParityCase",
    "assert_close_to_reference",
    "assert_error_bound",
    "assert_parity",
    "compare_case",
]
