"""BatchNorm1d, 2d and 3d: torch.nn's modules with another forward, and room for a residual and an activation."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastbn import functional
from fastbn._torch import BatchNormBase
from fastbn.nn import saving, scripting
from fastbn.nn.activation import WithActivation
from fastbn.nn.epilogue import NormalizationLayer
from fastbn.nn.saving import SavesOutput
from fastbn.nn.torch_activations import ActivationLike
from fastbn.ops.activations import check_param
from fastbn.ops.activations import index as activation_index
from fastbn.ops.dispatch import Call


def leaf_of_symbolic_tracing(module: nn.Module, input: fx.Proxy, *others: Any, **named: Any) -> Any:
    """Return a call of `module` in the graph that torch.fx is tracing: modules of torch.nn are leaves of it too.

    Trailing arguments that are None are left out, as users leave them out.
    """
    while others and others[-1] is None:
        others = others[:-1]
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input, *others), named)


class FastBatchNorm(WithActivation, SavesOutput, NormalizationLayer, BatchNormBase):
    """Common base of BatchNorm1d, 2d and 3d.

    Parameters, buffers, input checks and state_dict are inherited from torch.nn; only `forward` differs.
    """

    def __init__(
        self,
        *args: Any,
        activation: ActivationLike = None,
        activation_param: float | None = None,
        save: str = "input",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._set_activation(activation, activation_param)
        self._set_save(save)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
            uses_buffers = not self.training or self.track_running_stats
            return scripting.batch_norm(
                input,
                residual,
                self.weight,
                self.bias,
                self.running_mean if uses_buffers else None,
                self.running_var if uses_buffers else None,
                self.num_batches_tracked if self.training and self.track_running_stats else None,
                self.training or (self.running_mean is None and self.running_var is None),
                self.momentum,
                self._eps,
                self.activation,
                self.activation_param,
            )
        else:  # which TorchScript does not compile
            if isinstance(input, fx.Proxy):
                return leaf_of_symbolic_tracing(self, input, residual)
            return self._normalize(input, residual, self.activation, self.activation_param)

    def _normalize(
        self, input: Tensor, residual: Tensor | None, activation: str | None, activation_param: float | None
    ) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        tracks = self.training and self.track_running_stats
        weight, bias, running_mean, running_var, num_batches_tracked = self._tensors(tracks)
        save = self.save_for_backward
        if save == "output":
            layer = vars(self).get("twin_of", self)  # the layer of which a recomputation runs
            save = saving.save_of(layer, residual, activation, activation_param, weight, bias)
        return functional.batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            self.training or (running_mean is None and running_var is None),
            self.momentum,
            vars(self)["eps"],
            residual=residual,
            activation=activation,
            activation_param=activation_param,
            num_batches_tracked=num_batches_tracked,
            save=save,
        )

    def _tensors(self, tracks: bool) -> tuple[Tensor | None, ...]:
        """Return weight, bias, running_mean, running_var, num_batches_tracked; None for what the mode does not use.

        nn.Module.__getattr__ takes 0.6 us per tensor, so it is called only where something may have replaced a tensor:
        a subclass that is not known, an attribute of the instance, a parametrisation.
        """
        uses_buffers = tracks or not self.training
        cls = type(self)
        if cls._epilogue_owner is cls and not torch.compiler.is_compiling() and vars(self).keys().isdisjoint(_TENSORS):
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

    def _call_by_batch(
        self, input: Tensor, residual: Tensor | None, activation: str | None, activation_param: float | None
    ) -> Call:
        """Return the call that normalises by the batch, for layers whose statistics are not just the batch's."""
        weight, bias, running_mean, running_var, counter = self._tensors(self.training and self.track_running_stats)
        index = activation_index(activation)
        return Call(
            input,
            residual,
            weight,
            bias,
            running_mean,
            running_var,
            counter,
            self.momentum,
            vars(self)["eps"],
            index,
            True,
            check_param(index, activation_param),
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()  # type: ignore[no-untyped-call]
        return text + self._describe_activation() + self._describe_save()


def signature(torch_class: type[nn.Module]) -> inspect.Signature:
    """Return torch's signature and the arguments more, for those who read it, as torch.nn.utils.skip_init does."""
    inherited = inspect.signature(torch_class.__init__).parameters.values()
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in _MORE_ARGUMENTS.items()
    ]
    return inspect.Signature([*inherited, *more])


_MORE_ARGUMENTS = {"activation": None, "activation_param": None, "save": "input"}
FastBatchNorm.__init__.__signature__ = signature(BatchNormBase)  # type: ignore[attr-defined]


_DOC = """torch.nn.{name} whose forward and backward are fused kernels.

    Arguments, parameters, buffers and state_dict are those of the installed torch.nn.{name}; also
    activation: None or one of "relu", "leaky_relu", "relu6", "elu", "silu", "gelu", "hardswish", "hardsigmoid",
    "mish", "softplus", "sigmoid", "tanh", applied last; or another spelling ("ReLU", "swish"), or torch's module, its
    class or its function (nn.ReLU(), nn.ReLU, F.relu). The attribute `activation` has the name, or None.
    activation_param: the slope of leaky_relu below 0, or the alpha of elu; None for torch's default.
    save: "input", or "output" to keep the output for backward where the input or a mask can be spared for it, as
    fastbn.functional.batch_norm says; while a weight is too small for that, the input. Where the next layer keeps its
    input, as convolutions do, this halves what is kept between two convolutions.

    forward(input, residual=None): {shape}; residual has the shape, dtype and device of input and is
    added before the activation. Errors are torch.nn.{name}'s. With an activation, reading `eps` or `num_features`
    raises TypeError, so that no tool takes the layer for a plain one; both can be set, and `vars(layer)` has them.
    """


class BatchNorm1d(FastBatchNorm, nn.BatchNorm1d):
    __doc__ = _DOC.format(name="BatchNorm1d", shape="input (N, C) or (N, C, L)")


class BatchNorm2d(FastBatchNorm, nn.BatchNorm2d):
    __doc__ = _DOC.format(name="BatchNorm2d", shape="input (N, C, H, W)")


class BatchNorm3d(FastBatchNorm, nn.BatchNorm3d):
    __doc__ = _DOC.format(name="BatchNorm3d", shape="input (N, C, D, H, W)")


for _class in (BatchNorm1d, BatchNorm2d, BatchNorm3d):
    _class._epilogue_owner = _class

_TENSORS = frozenset(("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))
