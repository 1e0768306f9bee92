"""fastbn.testing.compare: parity holds, and a result that is off is found."""

from __future__ import annotations

import pytest
import torch

from fastbn.testing import ParityCase, assert_parity, compare, compare_case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_parity(dtype):
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    assert_parity(ParityCase((6, 5, 4, 3), dtype, relu=True, residual=True, parameter_dtype=parameters))


def test_an_error_is_told_with_its_quantity(monkeypatch):
    exact = compare.batch_norm
    monkeypatch.setattr(compare, "batch_norm", lambda *args, **kwargs: exact(*args, **kwargs) * (1 + 2**-8))
    with pytest.raises(AssertionError, match="output: expected at most .* ulp, got .*; grad_input: "):
        assert_parity(ParityCase((8, 3)))


def test_a_nan_counts_as_an_error(monkeypatch):
    exact = compare.batch_norm
    monkeypatch.setattr(compare, "batch_norm", lambda *args, **kwargs: exact(*args, **kwargs) * float("nan"))
    output = next(compare_case(ParityCase((8, 3), training=False)))
    assert output.fastbn == float("inf") and not output.passed
