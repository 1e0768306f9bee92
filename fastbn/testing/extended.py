"""BatchNorm in numpy.longdouble, whose 64 bits of mantissa on x86 are what float64 is measured against.

Tensors come in as float64 or narrower and results go out as longdouble arrays of the same shape; [C] vectors likewise.
"""

from __future__ import annotations

import math

from torch import Tensor

try:
    import numpy as np
except ModuleNotFoundError:  # torch does without it, and so does all else here
    np = None


def why_unavailable() -> str | None:
    """Say why float64 cannot be measured here, or None where it can."""
    if np is None:
        return "numpy is not installed"
    bits = np.finfo(np.longdouble).nmant
    if bits < 63:
        return f"numpy.longdouble has {bits} bits of mantissa here, and float64 needs 63 or more to be measured"
    return None


def wide(tensor: Tensor):
    """The tensor as an array of longdouble."""
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


def deviations(x, mean=None):
    """x less `mean` ([C]), or less its own mean over each channel, which itself would be rounded where it is large."""
    if mean is not None:
        return x - _along(x, mean)
    axes = _reduced(x)
    near = x - x.mean(axes, keepdims=True)
    return near - near.mean(axes, keepdims=True)


def statistics(x):
    """Mean and biased variance of an (N, C, *) array, two [C]."""
    axes = _reduced(x)
    return (x - deviations(x)).mean(axes), np.square(deviations(x)).mean(axes)


def running(before, batch, momentum: float):
    """A running statistic after a batch, of which momentum enters."""
    return (1 - np.longdouble(momentum)) * before + np.longdouble(momentum) * batch


def inverse_std(var, eps: float):
    """1 / sqrt(var + eps)."""
    return 1 / np.sqrt(var + np.longdouble(eps))


def normalize(deviation, weight, bias, inv_std):
    """deviation * inv_std * weight + bias."""
    return deviation * _along(deviation, inv_std * weight) + _along(deviation, bias)


def gradients(grad_z, deviation, weight, inv_std, batch_stats: bool):
    """(grad_input, grad_weight, grad_bias) of `normalize`, whose statistics are those of the input or constants."""
    axes = _reduced(grad_z)
    xhat = deviation * _along(grad_z, inv_std)
    grad_weight, grad_bias = (grad_z * xhat).sum(axes), grad_z.sum(axes)
    if batch_stats:
        count = grad_z.size // grad_z.shape[1]
        grad_z = grad_z - _along(grad_z, grad_bias / count) - xhat * _along(grad_z, grad_weight / count)
    return grad_z * _along(grad_z, weight * inv_std), grad_weight, grad_bias


def scales_of_gradients(grad_z, deviation, weight, inv_std):
    """How large (grad_input, grad_weight, grad_bias) are where their terms do not happen to cancel: the largest term,
    and the root of the sum of the squares of terms, which is what independent terms add up to."""
    axes = _reduced(grad_z)
    xhat = deviation * _along(grad_z, inv_std)
    largest = np.abs(grad_z * _along(grad_z, weight * inv_std)).max()
    return largest, *(np.sqrt(np.square(terms).sum(axes)).max() for terms in (grad_z * xhat, grad_z))


def error_in_ulp(actual: Tensor, exact, scale=None) -> float:
    """The largest difference of a float64 tensor from longdoubles, in spacings of float64 at `scale`, which is their
    largest value if not given. Infinite where the tensor is not finite."""
    if exact.size == 0:
        return 0.0
    spacing = np.spacing(np.float64(np.abs(exact).max() if scale is None else scale))
    error = float(np.abs(wide(actual) - exact).max() / spacing)
    return error if math.isfinite(error) else math.inf


def _along(x, per_channel):
    return per_channel.reshape(1, -1, *[1] * (x.ndim - 2))


def _reduced(x):
    return tuple(axis for axis in range(x.ndim) if axis != 1)
