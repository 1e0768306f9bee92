"""FrozenBatchNorm1d, 2d and 3d: batch normalisation by running statistics that nothing moves, in either mode.

Forward and backward are one op each, as in the layers that train: the contract has a fused op for constant statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fastbn import functional
from fastbn.nn import scripting
from fastbn.nn.activation import WithActivation
from fastbn.nn.batchnorm import leaf_of_symbolic_tracing
from fastbn.nn.epilogue import NormalizationLayer
from fastbn.nn.torch_activations import ActivationLike

_COUNTER = "num_batches_tracked"


class _FrozenBatchNorm(WithActivation, NormalizationLayer, nn.Module):
    """Common base of the three. It is no torch.nn.BatchNorm, so that nothing converts or updates it as one."""

    __constants__ = ["activation", "activation_param", "_eps"]
    _version = 3  # detectron2's, which reads and writes the same four buffers
    if TYPE_CHECKING:  # torch.jit.script cannot read annotations that are strings
        weight: Tensor | None
        bias: Tensor | None
        running_mean: Tensor
        running_var: Tensor
        _check_input_dim: Callable[[Tensor], None]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        activation: ActivationLike = None,
        activation_param: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self._set_activation(activation, activation_param)
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value, device=device, dtype=dtype))

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check_input_dim(input)
            return scripting.batch_norm(
                input,
                residual,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                None,
                False,
                0.0,
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
        self._check_input_dim(input)
        return functional.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            False,
            0.0,
            vars(self)["eps"],
            residual=residual,
            activation=activation,
            activation_param=activation_param,
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *lists: list[str]
    ) -> None:
        """Take a BatchNorm's state, which has a counter, and a frozen one's, which has none, whatever this one has."""
        key, counter = prefix + _COUNTER, self._buffers.get(_COUNTER)
        if counter is None:
            state_dict.pop(key, None)
        else:
            state_dict.setdefault(key, counter)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def extra_repr(self) -> str:
        text = "{num_features}, eps={eps}".format(**vars(self))
        return text + self._describe_activation()


_DOC = """Batch normalisation of {shape} by constant statistics, in training and evaluation alike.

    weight, bias, running_mean and running_var are buffers of shape (num_features,), and the whole state: that of
    torchvision's and detectron2's FrozenBatchNorm2d. A torch.nn.{name}'s state can be loaded too; its counter is left
    out. eps: added to running_var, above 0. activation, activation_param: as fastbn.{name} has them.

    forward(input, residual=None): residual has the shape, dtype and device of input and is added before the activation.
    Backward computes what needs a gradient; of the input it keeps nothing, unless weight is made a parameter or an
    activation without a mask has to be recomputed. Raises ValueError for an input of other dimensions.
    """


class FrozenBatchNorm1d(_FrozenBatchNorm):
    __doc__ = _DOC.format(name="BatchNorm1d", shape="(N, C) or (N, C, L)")
    _check_input_dim = nn.BatchNorm1d._check_input_dim


class FrozenBatchNorm2d(_FrozenBatchNorm):
    __doc__ = _DOC.format(name="BatchNorm2d", shape="(N, C, H, W)")
    _check_input_dim = nn.BatchNorm2d._check_input_dim


class FrozenBatchNorm3d(_FrozenBatchNorm):
    __doc__ = _DOC.format(name="BatchNorm3d", shape="(N, C, D, H, W)")
    _check_input_dim = nn.BatchNorm3d._check_input_dim


for _class in (FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d):
    _class._epilogue_owner = _class
