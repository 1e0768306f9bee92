"""WhiteningBatchNorm1d and 2d: batch normalisation that also takes away the correlation of channels.

y = activation(weight * W (x - mean) + bias + residual),   W (covariance + eps) W^T = 1
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fastbn.autograd.whitening import METHODS, JointMoments, Whitening, whiten
from fastbn.nn import scripting
from fastbn.nn.activation import WithActivation
from fastbn.nn.batchnorm import leaf_of_symbolic_tracing
from fastbn.nn.running import averaging_factor, set_running
from fastbn.nn.torch_activations import ActivationLike
from fastbn.ops.activations import check_param
from fastbn.ops.activations import index as activation_index
from fastbn.ops.dispatch import Call


class _WhiteningBatchNorm(WithActivation, nn.Module):
    """Common base of the two. It is no torch.nn.BatchNorm: what folds or replaces one reads no covariance."""

    if TYPE_CHECKING:
        weight: Tensor | None
        bias: Tensor | None
        running_mean: Tensor
        running_cov: Tensor
        num_batches_tracked: Tensor
        _check_input_dim: Callable[[Tensor], None]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        method: str = "iternorm",
        iterations: int = 5,
        group_size: int | None = None,
        activation: ActivationLike = None,
        activation_param: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"iterations: expected a whole number from 1 on, got {iterations!r}")
        size = num_features if group_size is None else group_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1 or num_features % size:
            raise ValueError(f"group_size: expected a divisor of the {num_features} channels, got {group_size!r}")
        self.num_features, self.eps, self.momentum, self.affine = num_features, eps, momentum, affine
        self.method, self.iterations, self.group_size = method, iterations, size
        self._set_activation(activation, activation_param)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        for name in ("weight", "bias"):
            parameter = nn.Parameter(torch.empty(num_features, **options)) if affine else None
            self.register_parameter(name, parameter)
        self.register_buffer("running_mean", torch.empty(num_features, **options))
        self.register_buffer("running_cov", torch.empty(num_features // size, size, size, **options))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running covariance to 1, and the counter to 0."""
        self.running_mean.zero_()
        self.running_cov.zero_().diagonal(dim1=-2, dim2=-1).fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0, and the running statistics to those of `reset_running_stats`."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, fx.Proxy):
            return leaf_of_symbolic_tracing(self, input, residual)
        self._check_input_dim(input)
        if self.training and input.shape[1] and input.numel() == input.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
        index = activation_index(self.activation)
        param = check_param(index, self.activation_param)
        mean, cov, counter = self._statistics()
        call = Call(
            input,
            residual,
            self.weight,
            self.bias,
            mean,
            cov.diagonal(dim1=-2, dim2=-1).reshape(-1).contiguous(),
            counter if self.training else None,
            self.momentum,
            vars(self)["eps"],
            index,
            self.training,
            param,
        )
        running = None if self.training else JointMoments(mean.double(), cov.double(), 0)
        whitening = Whitening(self.method, self.iterations, self.group_size, call.eps)
        output, moments = whiten(call, whitening, running)
        if self.training:
            self._track(moments)
        return output

    def _statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three buffers. Raises ValueError if one is missing, or the covariance has another shape."""
        mean, cov, counter = self.running_mean, self.running_cov, self.num_batches_tracked
        if mean is None or cov is None or counter is None:
            raise ValueError(
                f"{type(self).__name__}: expected running_mean, running_cov and num_batches_tracked, got None"
            )
        size = self.group_size
        expected = (vars(self)["num_features"] // size, size, size)
        if cov.shape != expected:
            raise ValueError(
                f"{type(self).__name__}: expected running_cov of shape {list(expected)}, got {list(cov.shape)}"
            )
        return mean, cov, counter

    @torch.no_grad()
    def _track(self, moments: JointMoments) -> None:
        """Move the running statistics as batch normalisation does: not for an empty batch, and without a host sync."""
        factor, count = averaging_factor(self.num_batches_tracked, self.momentum), moments.elements
        if count == 0:
            return
        unbiased = moments.cov * (count / (count - 1))
        for running, batch in ((self.running_mean, moments.mean), (self.running_cov, unbiased)):
            set_running(running, running.double() * (1 - factor) + batch * factor)

    def __prepare_scriptable__(self) -> None:
        scripting.refuse(self)

    def extra_repr(self) -> str:
        names = ("eps", "momentum", "affine", "method", *(("iterations",) if self.method == "iternorm" else ()))
        own = "".join(f", {name}={vars(self)[name]!r}" for name in (*names, "group_size"))
        return f"{vars(self)['num_features']}{own}{self._describe_activation()}"


_DOC = """Batch normalisation of {shape} that whitens: its output has no correlation within a group of channels.

    num_features: C. eps: added to the diagonal of the covariance, above 0. momentum: the weight of the new statistics,
    as torch.nn.{name} has it; None for the average over all batches. affine: whether there are weight and bias, (C,).
    method: "iternorm" for iterations of Newton (Huang et al. 2019), the inverse square root of the covariance except
    for what the iterations leave of small eigenvalues; "zca" for that root by an eigendecomposition (Huang et al.
    2018); "pca" for the principal components, each of unit variance, whose axes jump from batch to batch.
    iterations: of "iternorm". group_size: the channels d that are whitened together, a divisor of C; None for all.
    Training takes two products of (d, d) with the input forward and three backward, and a multiple of C d^2 operations
    for the matrices, of which autograd keeps some three per iteration, 8 C d bytes each. With d = 1 all methods are
    batch normalisation. A batch of M elements per channel shows M - 1 directions at most; eps keeps the others finite,
    but d should stay well below M.
    activation, activation_param: as fastbn.{name} has them.

    Training whitens by the biased covariance of the batch. Buffers: running_mean (C,), running_cov (C / d, d, d) with
    the unbiased covariance, and num_batches_tracked; always tracked. Evaluation makes the matrix from running_cov at
    each call. Statistics and matrices are computed in float64, products with elements in float32 (float64 for float64).

    forward(input, residual=None): float32, float64, bfloat16 or float16; residual has the shape, dtype and device of
    input and is added before the activation. Raises ValueError for an input of other dimensions, for one value per
    channel in training, and for what the ops cannot take, all before a buffer has moved; "zca" and "pca" also
    torch.linalg.LinAlgError for a batch with inf or NaN, and on a GPU torch waits for their eigendecomposition.
    Differentiable any number of times with "iternorm"; with the others, second derivatives need eigenvalues that
    differ, and with "pca" the first ones do. Forward-mode AD takes "iternorm" alone.
    """


class WhiteningBatchNorm1d(_WhiteningBatchNorm):
    __doc__ = _DOC.format(name="BatchNorm1d", shape="(N, C) or (N, C, L)")
    _check_input_dim = nn.BatchNorm1d._check_input_dim


class WhiteningBatchNorm2d(_WhiteningBatchNorm):
    __doc__ = _DOC.format(name="BatchNorm2d", shape="(N, C, H, W)")
    _check_input_dim = nn.BatchNorm2d._check_input_dim
