"""BatchNorm1d, 2d and 3d: torch.nn's modules with another forward, and room for a residual and an activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fastbn import functional
from fastbn._torch import BatchNormBase
from fastbn.nn.epilogue import NormalizationLayer
from fastbn.ops.activations import check_param
from fastbn.ops.activations import index as activation_index


def leaf_of_symbolic_tracing(module: nn.Module, input: fx.Proxy, residual: fx.Proxy | None) -> Any:
    """Return a call of `module` in the graph that torch.fx is tracing: modules of torch.nn are leaves of it too."""
    arguments = (input,) if residual is None else (input, residual)
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})


def describe_activation(activation: str | None, activation_param: float | None) -> str:
    """Return what a module's extra_repr says of its activation."""
    text = "" if activation is None else f", activation={activation!r}"
    return text if activation_param is None else f"{text}, activation_param={activation_param!r}"


class FastBatchNorm(NormalizationLayer, BatchNormBase):
    """Common base of BatchNorm1d, 2d and 3d.

    Parameters, buffers, input checks and state_dict are inherited from torch.nn; only `forward` differs. `activation`
    and `activation_param` are class attributes, so that a torch.nn module whose class is swapped has them too.
    """

    activation: str | None = None
    activation_param: float | None = None

    def __init__(
        self, *args: Any, activation: str | None = None, activation_param: float | None = None, **kwargs: Any
    ) -> None:
        check_param(activation_index(activation), activation_param)
        super().__init__(*args, **kwargs)
        if activation is not None:
            self.activation = activation
        if activation_param is not None:
            self.activation_param = activation_param

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, fx.Proxy):
            return leaf_of_symbolic_tracing(self, input, residual)
        return self._normalize(input, residual, self.activation, self.activation_param)

    def _normalize(
        self, input: Tensor, residual: Tensor | None, activation: str | None, activation_param: float | None
    ) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        tracks = self.training and self.track_running_stats
        weight, bias, running_mean, running_var, num_batches_tracked = self._tensors(tracks)
        return functional.batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            self.training or (running_mean is None and running_var is None),
            self.momentum,
            self.eps,
            residual=residual,
            activation=activation,
            activation_param=activation_param,
            num_batches_tracked=num_batches_tracked,
        )

    def _tensors(self, tracks: bool) -> tuple[Tensor | None, ...]:
        """Return weight, bias, running_mean, running_var, num_batches_tracked; None for what the mode does not use.

        nn.Module.__getattr__ takes 0.6 us per tensor, so it is called only where something may have replaced a tensor:
        a subclass, an attribute of the instance, a parametrisation.
        """
        uses_buffers = tracks or not self.training
        if type(self) in _PLAIN and not torch.compiler.is_compiling() and vars(self).keys().isdisjoint(_TENSORS):
            parameters, buffers = self._parameters, self._buffers
            try:
                return (
                    parameters["weight"],
                    parameters["bias"],
                    buffers["running_mean"] if uses_buffers else None,
                    buffers["running_var"] if uses_buffers else None,
                    buffers["num_batches_tracked"] if tracks else None,
                )
            except KeyError:
                pass
        return (
            self.weight,
            self.bias,
            self.running_mean if uses_buffers else None,
            self.running_var if uses_buffers else None,
            self.num_batches_tracked if tracks else None,
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()  # type: ignore[no-untyped-call]
        return text + describe_activation(self.activation, self.activation_param)


_DOC = """torch.nn.{name} whose forward and backward are fused kernels.

    Arguments, parameters, buffers and state_dict are those of the installed torch.nn.{name}; also
    activation: None or one of "relu", "leaky_relu", "relu6", "elu", "silu", "gelu", "hardswish", "hardsigmoid",
    "mish", "softplus", "sigmoid", "tanh", applied last.
    activation_param: the slope of leaky_relu below 0, or the alpha of elu; None for torch's default.

    forward(input, residual=None): {shape}; residual has the shape, dtype and device of input and is
    added before the activation. Errors are torch.nn.{name}'s.
    """


class BatchNorm1d(FastBatchNorm, nn.BatchNorm1d):
    __doc__ = _DOC.format(name="BatchNorm1d", shape="input (N, C) or (N, C, L)")


class BatchNorm2d(FastBatchNorm, nn.BatchNorm2d):
    __doc__ = _DOC.format(name="BatchNorm2d", shape="input (N, C, H, W)")


class BatchNorm3d(FastBatchNorm, nn.BatchNorm3d):
    __doc__ = _DOC.format(name="BatchNorm3d", shape="input (N, C, D, H, W)")


for _class in (BatchNorm1d, BatchNorm2d, BatchNorm3d):
    _class._epilogue_owner = _class

_PLAIN = frozenset((BatchNorm1d, BatchNorm2d, BatchNorm3d))
_TENSORS = frozenset(("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))
