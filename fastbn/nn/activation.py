"""What the layers with an `activation` share: the attributes, and a guard against tools that would leave it out.

A tool that replaces a BatchNorm or folds it into a convolution reads `num_features` or `eps`, and then builds something
that has no activation. So a layer that has one lets neither be read. Everything else about it can be read and written:
initialisation, weight decay groups, freezing and the update of running statistics need no more.
"""

from __future__ import annotations

from typing import Any

from fastbn.nn.torch_activations import read_activation


def _guarded(name: str) -> Any:
    """Return a property for the entry `name` of an instance's __dict__, which class swaps leave where it is."""

    def get(self: Any) -> Any:
        if self._has_activation():
            raise TypeError(
                f"{type(self).__name__}: expected a layer without an activation where {name} is read, got "
                f"activation={self.activation!r}, which what replaces or folds a plain BatchNorm would leave out. "
                "fastbn.fold(model) folds it. For other tools, make the activation a module of its own, let "
                "fastbn.convert(model) fuse the two, and use the tool under `with fastbn.reverted(model):`"
            )
        try:
            return vars(self)[name]
        except KeyError:
            raise AttributeError(name) from None

    def set(self: Any, value: Any) -> None:
        vars(self)[name] = value

    return property(get, set)


class WithActivation:
    """Attributes `activation` and `activation_param`; `eps` and `num_features`, which are hidden where there is one.

    The first two are class attributes, so that a torch.nn module whose class is swapped has them too. fastbn itself
    reads `vars(layer)["eps"]`.
    """

    activation: str | None = None
    activation_param: float | None = None
    eps = _guarded("eps")
    num_features = _guarded("num_features")

    # torch.jit reads constants, and compiles properties that it is not told of.
    __constants__ = ["track_running_stats", "momentum", "affine", "activation", "activation_param", "_eps"]
    __jit_unused_properties__ = ["eps", "num_features", "_eps"]
    __jit_ignored_attributes__ = ["eps", "num_features"]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("eps", "num_features"):  # torch.jit looks for properties in the class itself, not in its bases
            if name not in vars(cls):
                setattr(cls, name, vars(WithActivation)[name])

    def _set_activation(self, activation: Any, activation_param: float | None) -> None:
        """Set both attributes as `read_activation` reads them. Raises what it raises."""
        name, param = read_activation(activation, activation_param)
        if name is not None:
            self.activation = name
        if param is not None:
            self.activation_param = param

    def _has_activation(self) -> bool:
        return self.activation not in (None, "none")

    @property
    def _eps(self) -> float:
        return vars(self)["eps"]

    def __dir__(self) -> list[str]:
        """List what can be read, for torch.jit.trace and others who read all of it."""
        hidden = ("eps", "num_features") if self._has_activation() else ()
        return [name for name in super().__dir__() if name not in hidden]

    def _describe_activation(self) -> str:
        """Return what extra_repr says of the activation."""
        text = "" if self.activation is None else f", activation={self.activation!r}"
        return text if self.activation_param is None else f"{text}, activation_param={self.activation_param!r}"
