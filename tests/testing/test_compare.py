"""fastbn.testing.compare, which is what `fastbn verify` does: parity holds, and a result that is off is found."""

from __future__ import annotations

import pytest
import torch

from fastbn.testing import VerifyCase, compare, compare_case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_parity(dtype):
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    case = VerifyCase((6, 5, 4, 3), dtype, relu=True, residual=True, parameter_dtype=parameters)
    compared = list(compare_case(case))
    assert len(compared) == 7 and all(comparison.passed for comparison in compared)


def test_an_error_is_found_in_each_quantity_that_has_it(monkeypatch):
    exact = compare.batch_norm
    monkeypatch.setattr(compare, "batch_norm", lambda *args, **kwargs: exact(*args, **kwargs) * (1 + 2**-8))
    failed = [comparison.quantity for comparison in compare_case(VerifyCase((8, 3))) if not comparison.passed]
    assert failed == ["output", "grad_input", "grad_weight", "grad_bias"]


def test_a_nan_counts_as_an_error(monkeypatch):
    exact = compare.batch_norm
    monkeypatch.setattr(compare, "batch_norm", lambda *args, **kwargs: exact(*args, **kwargs) * float("nan"))
    output = next(compare_case(VerifyCase((8, 3), training=False)))
    assert output.fastbn == float("inf") and not output.passed
