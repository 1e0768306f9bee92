"""Bounds on the error of a result against the float64 reference, as functions with their reasons.

All bounds rest on this arithmetic: elements are computed in float32 (float64 for float64), and each operation rounds by
half of `unit`; sums of n terms are taken in blocks and merged in a tree, so their relative error grows with log2(n);
results are rounded once to their dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Roundings of an element in the affine step and in an activation with an exp or erf of some 2 ulp.
ELEMENT_ROUNDINGS = 8
# The accepted error where torch's own is smaller: two roundings to the result's dtype, which a correct implementation
# may need however exact its arithmetic. float64 has no wider type to be computed in, and so rounds at every step.
ACCEPTED_ULPS, ACCEPTED_ULPS_FLOAT64 = 2.0, 4.0


def unit(dtype: torch.dtype) -> float:
    """Return the spacing at 1 of the type in which elements of `dtype` are computed."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def ulp(dtype: torch.dtype, scale: Tensor | float) -> Tensor:
    """Return the spacing of `dtype` at the magnitude `scale`, as float64."""
    scale = torch.as_tensor(scale, dtype=torch.float64).abs()
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(scale.clamp(min=info.tiny, max=info.max)))
    return info.eps * torch.exp2(exponent)


def sum_tolerance(dtype: torch.dtype, count: int, magnitude: Tensor | float) -> Tensor:
    """Bound the error of a sum of `count` terms whose absolute values add up to `magnitude`.

    The serial part of a block is a random walk, and the tree adds a level per doubling; both are below 2 roundings per
    doubling.
    """
    doublings = math.log2(max(count, 1))
    return unit(dtype) * (ELEMENT_ROUNDINGS + 2 * doublings) * torch.as_tensor(magnitude, dtype=torch.float64)


def mean_tolerance(dtype: torch.dtype, count: int, deviation: Tensor, mean: Tensor) -> Tensor:
    """Bound the error of a mean.

    Sums are taken about a pivot inside the data: the error scales with the largest deviation, not with the mean.
    """
    return sum_tolerance(dtype, count, 2 * deviation) + 4 * ulp(torch.float64, mean)


def variance_tolerance(dtype: torch.dtype, count: int, var: Tensor, mean: Tensor) -> Tensor:
    """Bound the error of a biased variance.

    Squares about a pivot up to sqrt(3) standard deviations from the mean add up to 4 variances. Blocks are merged by
    the difference of their float64 means, which differ by a few standard deviations at most and are each off by the
    rounding `r` of float64 at the mean: (std + r)^2 - std^2, taken 4 times, is the other term.
    """
    r = ulp(torch.float64, mean)
    return sum_tolerance(dtype, count, 4 * var) + 4 * (2 * var.sqrt() * r + r**2)


def inv_std_tolerance(var_tolerance: Tensor, inv_std: Tensor) -> Tensor:
    """Bound the error of 1/sqrt(v) by 1/2 v^(-3/2) dv and the rounding of float64's square root and division."""
    return 0.5 * inv_std**3 * var_tolerance + 4 * ulp(torch.float64, inv_std)


def forward_tolerance(
    dtype: torch.dtype,
    count: int,
    scale: Tensor | float,
    steepness: Tensor | float = 0.0,
    at_zero: Tensor | float = 0.0,
) -> Tensor:
    """Bound the error of an output whose largest term (xhat * weight, bias or residual, added up) has the magnitude
    `scale`.

    The bound is the error of z, times 1.5 for the steepest activation (hardswish), and the rounding of the output.
    inv_std contributes half of the relative error of the variance. `steepness` is |mean| / std: in units of float64's
    spacing, it is how far the rounding of the mean moves xhat and, through the variance, inv_std. It shows in float64
    only. `at_zero` is |activation(0)|, which the output has beside what z contributes (sigmoid, softplus, hardsigmoid).
    """
    scale = torch.as_tensor(scale, dtype=torch.float64)
    z = unit(dtype) * ELEMENT_ROUNDINGS * scale + sum_tolerance(dtype, count, 2 * scale)
    z = z + 4 * torch.finfo(torch.float64).eps * steepness * (1 + scale)
    return 1.5 * z + unit(dtype) * ELEMENT_ROUNDINGS * at_zero + ulp(dtype, 1.5 * scale + at_zero)


def activation_tolerance(dtype: torch.dtype, grad_scale: Tensor | float, z_scale: Tensor | float) -> Tensor:
    """Bound the error of grad_out * activation'(z): the error of z times a second derivative below 1, and a few
    roundings.

    It does not hold for elements at a jump of the derivative: tests set their grad_out to 0.
    """
    return unit(dtype) * ELEMENT_ROUNDINGS * torch.as_tensor(grad_scale) * (1 + torch.as_tensor(z_scale))


def gradient_tolerance(dtype: torch.dtype, count: int, scale: Tensor | float) -> Tensor:
    """Bound the error of a gradient's element whose largest term has the magnitude `scale`; the terms may cancel."""
    return sum_tolerance(dtype, count, scale) + ulp(dtype, scale)


def bias_gradient_tolerance(dtype: torch.dtype, count: int, grad_sum: Tensor, element: Tensor) -> Tensor:
    """Bound the error of sum(grad_z), [C], before it is rounded to its dtype.

    `grad_sum` is sum(|grad_z|), and `element` the error of one grad_z (`activation_tolerance`).
    """
    return sum_tolerance(dtype, count, grad_sum) + count * element


def weight_gradient_tolerance(
    dtype: torch.dtype, count: int, grad_sum: Tensor, product_sum: Tensor, xhat_scale: Tensor, element: Tensor
) -> Tensor:
    """Bound the error of sum(grad_z * xhat), [C], before it is rounded to its dtype.

    `product_sum` is sum(|grad_z * xhat|), `xhat_scale` the largest |xhat|, and the others are those of
    `bias_gradient_tolerance`.
    """
    of_xhat = sum_tolerance(dtype, 1, xhat_scale) * grad_sum
    return sum_tolerance(dtype, count, product_sum) + of_xhat + count * element * xhat_scale


def input_gradient_tolerance(
    dtype: torch.dtype, count: int, terms: Tensor, slope: Tensor, xhat_scale: Tensor, element: Tensor, batch_stats: bool
) -> Tensor:
    """Bound the error of grad_input, [C], before it is rounded to its dtype.

    `slope` is |weight * inv_std| and `terms` what `input_gradient_terms` returns: with batch statistics the error
    `element` of grad_z enters the gradient itself and both of the means that are subtracted from it.
    """
    spread = 2 + xhat_scale**2 if batch_stats else 1.0
    return slope * element * spread + sum_tolerance(dtype, count, terms * slope)


def input_gradient_terms(grad_scale: Tensor, xhat_scale: Tensor, batch_stats: bool) -> Tensor:
    """Add up the magnitudes of the terms of grad_input / |weight * inv_std|, from the largest |grad_z| and |xhat|."""
    return grad_scale * (1 + xhat_scale + xhat_scale**2) if batch_stats else grad_scale


def error_in_ulp(actual: Tensor, exact: Tensor, dtype: torch.dtype, scale: Tensor | float | None = None) -> float:
    """Return the largest difference from float64 `exact`, in spacings of `dtype`.

    They are those at `scale`, or if it is None at the largest exact value. The error is infinite for a wrong shape and
    for values that are not finite.
    """
    if actual.shape != exact.shape:
        return math.inf
    if exact.numel() == 0:
        return 0.0
    error = (actual.double() - exact).abs().max() / ulp(dtype, exact.abs().max() if scale is None else scale)
    return error.item() if error.isfinite() else math.inf


def _worst(error: Tensor, allowed: Tensor, actual: Tensor, exact: Tensor) -> str:
    excess = (error - allowed).nan_to_num(0.0).flatten()
    at = int(excess.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), error.shape)) if error.dim() else ()
    pick = [t.expand(error.shape).flatten()[at].item() for t in (actual, exact, error, allowed)]
    return "worst at {}: got {:.9g}, exact {:.17g}, error {:.3g}, allowed {:.3g}".format(index, *pick)


def assert_close_to_reference(
    actual: Tensor, exact: Tensor, tolerance: Tensor | float, what: str = "result", which_nonfinite: bool = True
) -> None:
    """Assert that `actual`, in its own dtype, lies within `tolerance` (broadcast) of the float64 `exact`.

    Where `exact`, rounded to that dtype, is not finite, `actual` must be the same inf or NaN, or with `which_nonfinite`
    False any of them.
    """
    assert actual.shape == exact.shape, f"{what}: expected shape {list(exact.shape)}, got {list(actual.shape)}"
    exact = exact.detach().cpu().double()
    rounded = exact.to(actual.dtype).double()
    actual = actual.detach().cpu().double()
    tolerance = torch.as_tensor(tolerance, dtype=torch.float64).cpu()
    finite = rounded.isfinite()
    assert torch.equal(finite, actual.isfinite()), (
        f"{what}: expected {int((~finite).sum())} elements that are not finite, got {int((~actual.isfinite()).sum())}"
    )
    if which_nonfinite:
        same = (
            torch.where(finite, 0.0, rounded)
            .nan_to_num(nan=1.0)
            .equal(torch.where(finite, 0.0, actual).nan_to_num(nan=1.0))
        )
        assert same, f"{what}: inf and NaN are not where the reference has them"
    error = torch.where(finite, (actual - exact).abs(), 0.0)
    allowed = torch.where(finite, tolerance, 0.0).expand_as(error)
    assert bool((error <= allowed).all()), f"{what}: {_worst(error, allowed, actual, exact)}"


def assert_error_bound(
    actual: Tensor,
    exact: Tensor,
    stock: Tensor,
    dtype: torch.dtype,
    what: str = "result",
    ulps: float = ACCEPTED_ULPS,
) -> None:
    """Assert that the error against float64 is at most the larger of torch's own (`stock`) and `ulps` of `dtype`.

    Elements that are not finite in `dtype` are left out; for the error of stock, also those where stock is not finite.
    """
    exact = exact.detach().cpu().double()
    actual, stock = (t.detach().cpu().double() for t in (actual, stock))
    finite = exact.to(dtype).isfinite()
    if not bool(finite.any()):
        return
    assert bool(actual[finite].isfinite().all()), f"{what}: not finite where the reference is"
    scale, judged = exact[finite].abs().max(), finite & stock.isfinite()
    error = error_in_ulp(actual[finite], exact[finite], dtype, scale)
    stock_error = error_in_ulp(stock[judged], exact[judged], dtype, scale)
    assert error <= max(stock_error, ulps), (
        f"{what}: expected at most the larger of {ulps} ulp and stock's {stock_error:.2f}, got {error:.2f} "
        f"(an ulp is {ulp(dtype, scale).item():.3g})"
    )
