"""What takes a BatchNorm's place once its scale and shift are in the weight before it: its epilogue, or nothing."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastbn._torch import traceable_assert

# The module of each activation, made from `activation_param` where that is given.
MODULES: dict[str, Callable[..., nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "relu6": nn.ReLU6,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


def activation_module(name: str | None, param: float | None) -> nn.Module:
    """Return torch's module of a layer's `activation` and `activation_param`."""
    make = MODULES[name or "none"]
    return make() if param is None else make(param)


class FoldedBatchNorm(nn.Identity):
    """The rest of a folded BatchNorm where an Identity would not do: forward(input, residual=None).

    dims: the number of dimensions of the input that the fold assumed, or None for any. A BatchNorm1d behind a Linear
    normalises dimension 1, which is the Linear's output only if the input is (N, C). Forward adds the residual, if
    given, and applies the activation. Raises AssertionError for an input of other dimensions.
    """

    def __init__(self, activation: nn.Module, dims: int | None) -> None:
        super().__init__()
        self.activation, self.dims = activation, dims

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.dims is not None:
            traceable_assert(input.dim() == self.dims, "folded BatchNorm: expected an input of other dimensions")
        if residual is not None:
            input = input + residual
        return self.activation(input)

    def extra_repr(self) -> str:
        return "" if self.dims is None else f"dims={self.dims}"
