"""Fixtures for tests of a BatchNorm of your own; fastbn itself imports no pytest.

    python -m pytest -p fastbn.testing.fixtures test_mine.py

or `pytest_plugins = ["fastbn.testing.fixtures"]` in a conftest.py or in the test file, and there

    def test_my_layer(bn_case, assert_bn_parity):
        assert_bn_parity(MyBatchNorm2d, bn_case)

bn_case is each small case of the table in turn. A test narrows or widens it by its own parametrisation,

    @pytest.mark.parametrize("bn_case", parity_cases("bn2d", "half"), ids=str)

and a conftest.py moves all tests to another device by a fixture `bn_device` of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastbn.testing.parity import ParityCase, Subject, assert_parity, parity_cases, why_not_measurable

__all__ = ["assert_bn_parity", "bn_case", "bn_device"]


@pytest.fixture(params=parity_cases("small"), ids=str)
def bn_case(request: pytest.FixtureRequest) -> ParityCase:
    """Each small case of fastbn.testing.PARITY_CASES."""
    case: ParityCase = request.param
    return case


@pytest.fixture
def bn_device() -> torch.device:
    """The device of the checks: the GPU where torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def assert_bn_parity(bn_device: torch.device) -> Callable[..., None]:
    """fastbn.testing.assert_parity on `bn_device`; skips a case of float64 where nothing longer can measure it."""

    def check(
        subject: Subject,
        case: ParityCase,
        *,
        gradients: bool = True,
        counter: bool = True,
        beside_torch: bool = True,
    ) -> None:
        __tracebackhide__ = True
        reason = why_not_measurable(case)
        if reason is not None:
            pytest.skip(reason)
        assert_parity(subject, case, bn_device, gradients=gradients, counter=counter, beside_torch=beside_torch)

    return check
