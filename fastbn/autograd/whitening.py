"""Whitening over groups of channels, W a function of the covariance of a group:

    z = weight * W (x - mean) + bias,    output = activation(z + residual)
    S = (x - mean) (x - mean)^T / M,    W = W(S + eps)   (inverse_sqrt)

With X the centred input of a group as a matrix (d channels, M elements each), T = diag(weight) W and G the gradient of
z, the gradients are those of matrix products:

    grad_T = G X^T,    grad_bias = G 1,    grad_x = T^T (G - mean(G)) + (grad_S + grad_S^T) X / M

Two autograd Functions hold them, one from x to S and one from x and T to z; what lies between, float64 matrices of d
by d, and what follows is left to autograd. Both keep the input and nothing else of its size, as batch normalisation
does, and centre it again in backward. Means and variances are those of the primitive `channel_stats`, and `normalize`
subtracts the mean, in float32 without the error of rounding the mean. Matrix products of elements are in float32, for
float64 in float64.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbn.autograd import inverse_sqrt
from fastbn.autograd.batch_norm import below_autograd
from fastbn.backends import registry
from fastbn.backends.reference.activations import activation as activate
from fastbn.ops import dispatch, errors
from fastbn.ops.dispatch import Backend, Call, check_residual
from fastbn.ops.layout import suggest_memory_format

METHODS = ("iternorm", "zca", "pca")


class Whitening(NamedTuple):
    """How the matrix of a group is made: a method of METHODS, the steps of iternorm, channels per group, and eps."""

    method: str
    iterations: int
    group_size: int
    eps: float

    def matrix(self, cov: Tensor) -> Tensor:
        """Return W of a covariance, float64 (groups, d, d), differentiable."""
        if self.method == "iternorm":
            return inverse_sqrt.iternorm(cov, self.eps, self.iterations)
        if self.method == "zca":
            return inverse_sqrt.zca(cov, self.eps)
        if self.method == "pca":
            return inverse_sqrt.pca(cov, self.eps)
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")


class JointMoments(NamedTuple):
    """The mean, float64 [C], and the biased covariance, float64 (groups, d, d), of `elements` elements per channel."""

    mean: Tensor
    cov: Tensor
    elements: int


def whiten(
    call: Call, whitening: Whitening, running: JointMoments | None = None, backend: str | None = None
) -> tuple[Tensor, JointMoments]:
    """Return (output, the moments that made it) of a call. Running statistics and counter are neither read nor moved.

    running: the moments to whiten by, which have no gradient; None for those of the batch, through which gradients
    flow. Differentiable any number of times. Raises ValueError for a call that the ops cannot take, and
    torch.linalg.LinAlgError where an eigendecomposition fails, as it does for inf and NaN.
    """
    input, residual, weight, bias = call[:4]
    if residual is not None:
        check_residual(input, residual)
    reason = dispatch.why_unsupported(call)
    if reason is not None:
        raise ValueError(f"batch_norm: cannot take this call: {reason}")
    chosen, _ = registry.choose(call, backend)
    # Inference mode records nothing; a Function would, where gradients are enabled inside it.
    records_nothing = torch.no_grad() if dispatch.is_in_inference_mode() else contextlib.nullcontext()
    try:
        with records_nothing, _without_autocast(input.device.type):
            if chosen.ops is None:
                z, moments = _composition(input, weight, bias, whitening, running)
            else:
                z, moments = _by_ops(input, weight, bias, whitening, running, chosen)
            output = activate(z if residual is None else z + residual, call.activation, call.activation_param)
            return output, moments._replace(mean=moments.mean.detach(), cov=moments.cov.detach())
    except RuntimeError as error:
        errors.raise_of_torch(error)
        raise


def _by_ops(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    whitening: Whitening,
    running: JointMoments | None,
    backend: Backend,
) -> tuple[Tensor, JointMoments]:
    """Return (z, moments), by a backend's primitives and the Functions below."""
    layout = Layout.of(input, whitening.group_size)
    x, moments = None, running
    if moments is None:
        x, mean, cov = _apply_covariance(input, layout, backend)
        moments = JointMoments(mean, cov, layout.elements)
    scale = _scale(whitening, moments, weight)
    return _apply_linear(input, x, moments.mean, scale, bias, layout, running is None, backend), moments


def _composition(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, whitening: Whitening, running: JointMoments | None
) -> tuple[Tensor, JointMoments]:
    """Return (z, moments), by torch's operations, which everything can look through and differentiate."""
    layout = Layout.of(input, whitening.group_size)
    x, mean = _differentiably_centred(input, layout, None if running is None else running.mean, _dtype_of(input))
    moments = JointMoments(mean, _covariance(x, layout), layout.elements) if running is None else running
    scale = _scale(whitening, moments, weight).to(x.dtype)
    z = layout.to_tensor(_product(scale, x, None if bias is None else bias.to(x.dtype), layout))
    return z.to(input.dtype).contiguous(memory_format=layout.memory_format), moments


def _scale(whitening: Whitening, moments: JointMoments, weight: Tensor | None) -> Tensor:
    """Return T = diag(weight) W, float64 (groups, d, d)."""
    matrix = whitening.matrix(moments.cov)
    return matrix if weight is None else weight.double().view(len(matrix), -1, 1) * matrix


class Layout(NamedTuple):
    """The shape (N, C, *) of a tensor, and how it is seen as matrices (batches * groups, d, m) of its groups.

    Where C is the last dimension in memory, and where images have fewer elements than a group has channels, batches is
    1 and m the number of elements per channel. Otherwise batches is N and m the elements of an image: then nothing is
    transposed, and the products of d by d, one per image, take no more memory than the input.
    """

    shape: tuple[int, ...]
    memory_format: torch.memory_format
    groups: int
    is_last: bool
    batches: int

    @classmethod
    def of(cls, input: Tensor, group_size: int) -> Layout:
        memory_format, shape = suggest_memory_format(input), tuple(input.shape)
        is_last = input.dim() == 2 or memory_format != torch.contiguous_format
        batches = shape[0] if not is_last and math.prod(shape[2:]) >= group_size else 1
        return cls(shape, memory_format, shape[1] // group_size, is_last, batches)

    @property
    def elements(self) -> int:
        """Return the number of elements per channel."""
        return self.shape[0] * math.prod(self.shape[2:])

    def to_matrices(self, x: Tensor) -> Tensor:
        """Return the matrices of a tensor of the shape: a view, or a copy where it has to be transposed."""
        size, inner = self.shape[1] // self.groups, math.prod(self.shape[2:])
        if self.is_last:
            return x.movedim(1, -1).reshape(self.elements, self.groups, size).permute(1, 2, 0)
        if self.batches == 1:
            return x.transpose(0, 1).reshape(self.groups, size, self.elements)
        return x.reshape(self.batches * self.groups, size, inner)

    def to_tensor(self, matrices: Tensor) -> Tensor:
        """Return the tensor of matrices, a view if it can be."""
        n, channels, *rest = self.shape
        if self.is_last:
            return matrices.permute(2, 0, 1).reshape(n, *rest, channels).movedim(-1, 1)
        if self.batches == 1:
            return matrices.reshape(channels, n, *rest).transpose(0, 1)
        return matrices.reshape(self.shape)

    def of_each_batch(self, per_group: Tensor) -> Tensor:
        """Return (batches * groups, *) of a tensor (groups, *)."""
        return per_group.expand(self.batches, *per_group.shape).flatten(0, 1) if self.batches != 1 else per_group

    def over_batches(self, per_matrix: Tensor) -> Tensor:
        """Return the sums over batches, (groups, *) in float64, of a tensor (batches * groups, *)."""
        if self.batches == 1:
            return per_matrix.double()
        return per_matrix.view(self.batches, self.groups, *per_matrix.shape[1:]).sum(0, dtype=torch.float64)


class _Covariance(torch.autograd.Function):
    """From x to (X, mean, S), of which only S has a gradient: whoever uses X has to know that it depends on x."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layout: Layout, backend: Backend) -> tuple[Tensor, Tensor, Tensor]:
        with below_autograd():
            mean, var = backend.ops.channel_stats(input)
            x = _centred(input, mean, layout, backend)
            cov = _covariance(x, layout)
            cov.diagonal(dim1=-2, dim2=-1).copy_(var.view(layout.groups, -1))  # summed in float64
        ctx.save_for_backward(input, mean)
        ctx.layout, ctx.backend = layout, backend
        ctx.mark_non_differentiable(x, mean)
        return x, mean, cov

    @staticmethod
    def backward(ctx: Any, _: Tensor, __: Tensor, grad_cov: Tensor) -> tuple[Tensor | None, ...]:
        input, mean = ctx.saved_tensors
        layout: Layout = ctx.layout
        with _without_autocast(input.device.type):
            x = _centred_in_backward(input, mean, layout, ctx.backend, is_batch=True)
            scale = ((grad_cov + grad_cov.mT) / max(layout.elements, 1)).to(x.dtype)
            grad = layout.to_tensor(_product(scale, x, None, layout)).to(input.dtype)
        return grad.contiguous(memory_format=layout.memory_format), None, None


class _Linear(torch.autograd.Function):
    """From x, T and bias to T (x - mean) + bias. The mean follows x where `is_batch`, and else is a constant.

    x is the centred input as matrices if it is there already, else None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        x: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        layout: Layout,
        is_batch: bool,
        backend: Backend,
    ) -> Tensor:
        with below_autograd():
            x = _centred(input, mean, layout, backend) if x is None else x
            offset = None if bias is None else bias.to(x.dtype)
            z = layout.to_tensor(_product(scale.to(x.dtype), x, offset, layout)).to(input.dtype)
        ctx.save_for_backward(input, mean, scale)
        ctx.layout, ctx.is_batch, ctx.backend = layout, is_batch, backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        return z.contiguous(memory_format=layout.memory_format)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, scale = ctx.saved_tensors
        layout: Layout = ctx.layout
        need_input, _, _, need_scale, need_bias = ctx.needs_input_grad[:5]
        dtype = torch.float64 if torch.is_grad_enabled() else _dtype_of(input)
        grad_input = grad_scale = grad_bias = None
        with _without_autocast(input.device.type):
            grad = layout.to_matrices(grad_out.to(dtype))
            if need_scale:
                x = _centred_in_backward(input, mean, layout, ctx.backend, ctx.is_batch)
                grad_scale = layout.over_batches(torch.bmm(grad, x.mT))
            if need_bias or ctx.is_batch:
                sums = layout.over_batches(grad.sum(-1))
                grad_bias = sums.view(-1).to(ctx.bias_dtype) if need_bias else None
            if need_input:
                back = scale.to(dtype).mT
                offset = None
                if ctx.is_batch:
                    offset = (scale.mT @ sums[..., None]).to(dtype).view(-1) / -max(layout.elements, 1)
                grad_input = layout.to_tensor(_product(back, grad, offset, layout)).to(input.dtype)
                grad_input = grad_input.contiguous(memory_format=layout.memory_format)
        return grad_input, None, None, grad_scale, grad_bias, None, None, None


_apply_covariance: Callable[..., Any] = _Covariance.apply  # typed in some releases of torch
_apply_linear: Callable[..., Any] = _Linear.apply


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Return a guard under which autocast makes no half types of the operands of a matrix product."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _dtype_of(input: Tensor) -> torch.dtype:
    """Return the dtype of matrix products of elements."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _centred(input: Tensor, mean: Tensor, layout: Layout, backend: Backend) -> Tensor:
    """Return input - mean as matrices, by the primitive that does not round the mean."""
    x = input.to(_dtype_of(input))
    return layout.to_matrices(
        backend.ops.normalize(x, None, None, None, mean, torch.ones_like(mean), 0, False, None)[0]
    )


def _centred_in_backward(input: Tensor, mean: Tensor, layout: Layout, backend: Backend, is_batch: bool) -> Tensor:
    """Return `_centred`, or where gradients are enabled the same in float64 as a differentiable composition."""
    if torch.is_grad_enabled():
        return _differentiably_centred(input, layout, None if is_batch else mean, torch.float64)[0]
    with below_autograd():
        return _centred(input, mean, layout, backend)


def _differentiably_centred(
    input: Tensor, layout: Layout, mean: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return (input - mean as matrices of `dtype`, mean), by torch's operations; mean None for that of the batch."""
    x = layout.to_matrices(input.to(dtype))
    exact = _mean(x.detach(), layout) if mean is None else mean.view(layout.groups, -1)
    pivot = exact.to(dtype)
    x = x - layout.of_each_batch(pivot[..., None])
    # What rounding the pivot has left.
    rest = _mean(x, layout) if mean is None else exact - pivot
    return x - layout.of_each_batch(rest.to(dtype)[..., None]), (pivot + rest).view(-1) if mean is None else mean


def _mean(x: Tensor, layout: Layout) -> Tensor:
    """Return the mean of matrices over their elements, float64 (groups, d)."""
    return layout.over_batches(x.sum(-1)) / max(layout.elements, 1)


def _covariance(x: Tensor, layout: Layout) -> Tensor:
    """Return the biased covariance of centred matrices, float64 (groups, d, d) and symmetric."""
    cov = layout.over_batches(torch.bmm(x, x.mT)) / max(layout.elements, 1)
    return 0.5 * (cov + cov.mT)


def _product(scale: Tensor, x: Tensor, offset: Tensor | None, layout: Layout) -> Tensor:
    """Return scale @ x + offset of matrices x, scale (groups, d, d) and a vector [C], in the order in memory of x."""
    scale = layout.of_each_batch(scale)
    column = None if offset is None else layout.of_each_batch(offset.view(layout.groups, -1, 1))
    if not layout.is_last:
        return torch.bmm(scale, x) if column is None else torch.baddbmm(column, scale, x)
    return (torch.bmm(x.mT, scale.mT) if column is None else torch.baddbmm(column.mT, x.mT, scale.mT)).mT
