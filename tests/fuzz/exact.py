"""Batch normalisation, activation and their closed-form gradient on arrays (N, C, *), in the precision of the arrays.

float64 is enough to check float32 and half types; float64 itself needs numpy.longdouble. Means are taken about an
element of the channel and corrected once, so that they are exact relative to the spread of the data. Nothing here is
shared with the library.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

# torch's parameters.
DEFAULT_PARAMS = {"leaky_relu": 0.01, "elu": 1.0}

# z at which an activation's derivative jumps, so that rounding may take the other branch.
KINKS = {
    "relu": (0.0,),
    "leaky_relu": (0.0,),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, 3.0),
    "hardsigmoid": (-3.0, 3.0),
    "softplus": (20.0,),  # by e^-20
}

SQRT_HALF = np.sqrt(np.longdouble(0.5))
PI = 4 * np.arctan(np.longdouble(1))


def kinks(activation: str, param: float | None = None) -> tuple[float, ...]:
    """Return where the derivative jumps; that of elu does where alpha is not 1."""
    if activation == "elu" and param not in (None, 1.0):
        return (0.0,)
    return KINKS.get(activation, ())


def wide(x: np.ndarray, per_channel: np.ndarray) -> np.ndarray:
    """Reshape a [C] array to broadcast against x."""
    return per_channel.reshape(1, -1, *[1] * (x.ndim - 2))


def channel_sum(x: np.ndarray) -> np.ndarray:
    """Sum over all dimensions but the second."""
    return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1).sum(axis=1)


def erf(x: np.ndarray) -> np.ndarray:
    """Return torch's erf; in longdouble the series 2/sqrt(pi) exp(-x^2) sum 2^n x^(2n+1) / (2n+1)!!, whose terms do not
    cancel.
    """
    if x.dtype == np.float64:
        return torch.from_numpy(x).erf().numpy()
    near = np.clip(x, -7, 7)  # beyond, erf rounds to +-1 (and clip leaves NaN alone)
    square = near * near
    term = near.copy()
    total = near.copy()
    largest = float(np.nanmax(square, initial=0.0))
    for n in range(1, int(6 * largest) + 40):
        term = term * (2 * square / (2 * n + 1))
        total = total + term
        if n % 8 == 0 and np.nanmax(np.abs(term), initial=0.0) < 1e-22:
            break
    return 2 / np.sqrt(PI) * np.exp(-square) * total


def normal_cdf(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + erf(z * SQRT_HALF.astype(z.dtype)))


def activate(z: np.ndarray, activation: str, param: float | None = None) -> np.ndarray:
    param = DEFAULT_PARAMS.get(activation) if param is None else param
    match activation:
        case "none":
            return z
        case "relu":
            return np.where(z <= 0, 0, z)
        case "leaky_relu":
            return np.where(z > 0, z, z * param)
        case "relu6":
            return np.where(z <= 0, 0, np.where(z >= 6, 6, z))
        case "elu":
            return np.where(z <= 0, param * np.expm1(np.where(z <= 0, z, 0)), z)
        case "silu":
            return z / (1 + np.exp(-z))
        case "gelu":
            return z * normal_cdf(z)
        case "hardswish":
            return np.where(z <= -3, 0, np.where(z >= 3, z, z * (z + 3) / 6))
        case "hardsigmoid":
            return np.where(z <= -3, 0, np.where(z >= 3, 1, (z + 3) / 6))
        case "mish":
            return z * np.tanh(np.logaddexp(z, 0))
        case "softplus":
            return np.where(z > 20, z, np.logaddexp(z, 0))
        case "sigmoid":
            return 1 / (1 + np.exp(-z))
        case "tanh":
            return np.tanh(z)
    raise ValueError(f"activation: got {activation!r}")


def activation_gradient(grad_out: np.ndarray, z: np.ndarray, activation: str, param: float | None = None) -> np.ndarray:
    """Return grad_out * activation'(z) with torch's branches at the kinks: 0 where the derivative is 0, whatever
    grad_out.

    Where z is NaN the branches are those of torch's vectorised CPU kernels.
    """
    param = DEFAULT_PARAMS.get(activation) if param is None else param
    match activation:
        case "none":
            return grad_out
        case "relu":
            return np.where(z <= 0, 0, grad_out)
        case "leaky_relu":
            return np.where(z > 0, grad_out, grad_out * param)
        case "relu6":
            return np.where((z > 0) & (z < 6), grad_out, 0)
        case "elu":
            return np.where(z > 0, grad_out, grad_out * param * np.exp(np.where(z > 0, 0, z)))
        case "silu":
            s = 1 / (1 + np.exp(-z))
            return grad_out * (s * (1 + z * (1 - s)))
        case "gelu":
            density = np.exp(-0.5 * z * z) / np.sqrt(2 * PI).astype(z.dtype)
            return grad_out * (normal_cdf(z) + z * density)
        case "hardswish":
            return np.where(z <= -3, 0, np.where(z >= 3, grad_out, grad_out * (z / 3 + 0.5)))
        case "hardsigmoid":
            return np.where((z > -3) & (z < 3), grad_out / 6, 0)
        case "mish":
            t = np.tanh(np.logaddexp(z, 0))
            return grad_out * (t + z * (1 - t * t) / (1 + np.exp(-z)))
        case "softplus":
            return np.where(z > 20, grad_out, grad_out / (1 + np.exp(-z)))
        case "sigmoid":
            return grad_out * np.exp(-np.abs(z)) / (1 + np.exp(-np.abs(z))) ** 2
        case "tanh":
            return grad_out / np.cosh(z) ** 2
    raise ValueError(f"activation: got {activation!r}")


@dataclass
class Forward:
    """The results of forward. mean and var (biased) are [C], the others have the shape of x."""

    output: np.ndarray
    z: np.ndarray
    xhat: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    inv_std: np.ndarray


def _deviations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (mean, x - mean); zeros for an empty input."""
    if x.size == 0:
        return np.zeros(x.shape[1], x.dtype), x
    count = x.size // x.shape[1]
    pivot = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)[:, 0]
    deviations = x - wide(x, pivot)
    first = channel_sum(deviations) / count
    deviations = deviations - wide(x, first)
    second = channel_sum(deviations) / count
    # inf - inf is NaN, but the mean of infinities of one sign is infinite.
    plain = channel_sum(x) / count
    mean = np.where(np.isinf(plain), plain, pivot + (first + second))
    return mean, deviations - wide(x, second)


def forward(
    x: np.ndarray,
    residual: np.ndarray | None,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    running: tuple[np.ndarray, np.ndarray] | None,
    eps: float,
    activation: str,
    param: float | None = None,
) -> Forward:
    """Normalise by `running` (mean, variance), or if it is None by the statistics of x."""
    if running is None:
        mean, deviations = _deviations(x)
        var = channel_sum(deviations * deviations) / max(x.size // x.shape[1], 1)
    else:
        mean, var = running
        deviations = x - wide(x, mean)
    inv_std = 1 / np.sqrt(var + var.dtype.type(eps))
    xhat = deviations * wide(x, inv_std)
    z = xhat if weight is None else xhat * wide(x, weight)
    z = z if bias is None else z + wide(x, bias)
    z = z if residual is None else z + residual
    return Forward(activate(z, activation, param), z, xhat, mean, var, inv_std)


@dataclass
class Backward:
    """Gradients, named after the operands; that of the residual is grad_z, of which the sums are taken."""

    input: np.ndarray
    residual: np.ndarray
    weight: np.ndarray
    bias: np.ndarray


def backward(
    grad_out: np.ndarray,
    fwd: Forward,
    weight: np.ndarray | None,
    batch_stats: bool,
    activation: str,
    param: float | None = None,
) -> Backward:
    """Return the gradients of sum(grad_out * output)."""
    grad_z = activation_gradient(grad_out, fwd.z, activation, param)
    sum_grad, sum_grad_xhat = channel_sum(grad_z), channel_sum(grad_z * fwd.xhat)
    grad_input = grad_z
    if batch_stats and grad_z.size:
        count = grad_z.size // grad_z.shape[1]
        grad_input = grad_z - wide(grad_z, sum_grad / count) - fwd.xhat * wide(grad_z, sum_grad_xhat / count)
    scale = fwd.inv_std if weight is None else fwd.inv_std * weight
    return Backward(grad_input * wide(grad_z, scale), grad_z, sum_grad_xhat, sum_grad)
