"""BatchNorm in numpy.longdouble, whose 64 bits of mantissa on x86 are enough to measure float64.

Arguments are longdouble arrays (`wide`), (N, C, *) or [C], and so are results.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor

try:
    import numpy as np
except ModuleNotFoundError:  # torch works without it, and so does all of fastbn but this
    np = None  # type: ignore[assignment]

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[np.longdouble]]
else:
    Array = Any


def why_unavailable() -> str | None:
    """Say why float64 cannot be measured here, or None where it can."""
    if np is None:
        return "numpy is not installed"
    bits = np.finfo(np.longdouble).nmant
    if bits < 63:
        return f"numpy.longdouble has {bits} bits of mantissa here, and float64 needs 63 or more to be measured"
    return None


def quiet() -> AbstractContextManager[Any]:
    """Return a context in which numpy says nothing of the inf and NaN that it computes with."""
    return np.errstate(all="ignore")


def wide(tensor: Tensor) -> Array:
    """Convert `tensor` to an array of longdouble."""
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


def deviations(x: Array, mean: Array | None = None) -> Array:
    """Return x - `mean` ([C]), or x less its own mean, in two steps: a large mean would itself be rounded."""
    if mean is not None:
        return x - _along(x, mean)
    axes = _reduced(x)
    near = x - x.mean(axes, keepdims=True)
    return near - near.mean(axes, keepdims=True)


def statistics(x: Array) -> tuple[Array, Array]:
    """Return the mean and the biased variance of (N, C, *), two [C]."""
    axes = _reduced(x)
    return (x - deviations(x)).mean(axes), np.square(deviations(x)).mean(axes)


def running(before: Array, batch: Array, momentum: float) -> Array:
    """Return (1 - momentum) * before + momentum * batch, a running statistic after a batch."""
    return (1 - np.longdouble(momentum)) * before + np.longdouble(momentum) * batch


def inverse_std(var: Array, eps: float) -> Array:
    """Return 1 / sqrt(var + eps)."""
    return 1 / np.sqrt(var + np.longdouble(eps))


def normalize(deviation: Array, weight: Array, bias: Array, inv_std: Array) -> Array:
    """Return deviation * inv_std * weight + bias."""
    return deviation * _along(deviation, inv_std * weight) + _along(deviation, bias)


def gradients(
    grad_z: Array, deviation: Array, weight: Array, inv_std: Array, batch_stats: bool
) -> tuple[Array, Array, Array]:
    """Return (grad_input, grad_weight, grad_bias) of `normalize`, with the input's own statistics or constant ones."""
    axes = _reduced(grad_z)
    xhat = deviation * _along(grad_z, inv_std)
    grad_weight, grad_bias = (grad_z * xhat).sum(axes), grad_z.sum(axes)
    if batch_stats:
        count = grad_z.size // grad_z.shape[1]
        grad_z = grad_z - _along(grad_z, grad_bias / count) - xhat * _along(grad_z, grad_weight / count)
    return grad_z * _along(grad_z, weight * inv_std), grad_weight, grad_bias


def scales_of_gradients(
    grad_z: Array, deviation: Array, weight: Array, inv_std: Array
) -> tuple[np.longdouble, np.longdouble, np.longdouble]:
    """Return the sizes that (grad_input, grad_weight, grad_bias) have where their terms do not cancel.

    They are the largest term, and for the sums the root of the sum of squares, to which independent terms add up.
    """
    axes = _reduced(grad_z)
    xhat = deviation * _along(grad_z, inv_std)
    largest = np.abs(grad_z * _along(grad_z, weight * inv_std)).max()
    of_weight, of_bias = (np.sqrt(np.square(terms).sum(axes)).max() for terms in (grad_z * xhat, grad_z))
    return largest, of_weight, of_bias


def error_in_ulp(actual: Tensor, exact: Array, scale: float | np.floating[Any] | None = None) -> float:
    """Return the largest difference of float64 `actual` from `exact`, in spacings of float64.

    They are those at `scale`, or if it is None at the largest exact value. The error is infinite where `actual` is not
    finite.
    """
    if exact.size == 0:
        return 0.0
    spacing = np.spacing(np.float64(np.abs(exact).max() if scale is None else scale))
    error = float(np.abs(wide(actual) - exact).max() / spacing)
    return error if math.isfinite(error) else math.inf


def _along(x: Array, per_channel: Array) -> Array:
    return per_channel.reshape(1, -1, *[1] * (x.ndim - 2))


def _reduced(x: Array) -> tuple[int, ...]:
    return tuple(axis for axis in range(x.ndim) if axis != 1)
