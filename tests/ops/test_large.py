"""More than 2^31 elements: offsets are 64-bit everywhere. The reference is summed in parts."""

from __future__ import annotations

import pytest
import torch

from fastbn.testing import cases
from tests import implementations

EPS = 1e-5


@pytest.mark.large
@pytest.mark.slow
@pytest.mark.parametrize("case", cases.LARGE, ids=str)
@pytest.mark.parametrize("ops", implementations.params("cuda"), indirect=True)
def test_beyond_int32(ops, case):
    assert case.numel > 2**31
    x = cases.make_input(case, torch.bfloat16, ops.device)
    output, mean, inv_std, mask = ops.namespace.batch_norm_train(
        x, None, None, None, None, None, None, 0.1, EPS, 1, True
    )
    total, squares = torch.zeros(2, 2, dtype=torch.float64, device=ops.device)
    for image in x:
        for rows in image.split(1024, dim=1):
            total += rows.double().sum((1, 2))
            squares += rows.double().square().sum((1, 2))
    expected = total / case.count
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(inv_std, (squares / case.count - expected**2 + EPS).rsqrt(), rtol=1e-5, atol=0)
    for corner in ((0, 0, 0, 0), (-1, -1, -1, -1), (-1, 0, -1, -1), (1, 1, 2**14, 77)):
        z = (x[corner].double() - mean[corner[1]]) * inv_std[corner[1]]
        torch.testing.assert_close(output[corner].double(), z.clamp(min=0), rtol=2**-8, atol=1e-6)
    assert mask.numel() * 8 >= case.numel
    grads = ops.namespace.batch_norm_backward(
        output, x, None, mask, None, None, mean, inv_std, True, 1, True, False, False, False
    )
    # With grad_out = relu(z) the gradient is z * [z > 0] less its projections on 1 and z, whose averages are known.
    for corner in ((0, 0, 0, 0), (-1, -1, -1, -1), (1, 1, 2**14, 77)):
        z = ((x[corner].double() - mean[corner[1]]) * inv_std[corner[1]]).item()
        expected = (max(z, 0.0) - 0.398942 - z * 0.5) * inv_std[corner[1]].item()
        assert abs(grads[0][corner].item() - expected) < 0.02
