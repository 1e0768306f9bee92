"""Normalisations of other libraries that are one call of the fused op: subclasses of theirs with another forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fastbn import functional
from fastbn.nn.epilogue import NOTHING, Epilogue, is_known, join, read
from fastbn.transforms.fuse.source import MAKERS, subclass

LAYER = "layer"


class Layer(NamedTuple):
    """How a class of layers calls batch_norm.

    arguments: returns the keyword arguments of `fastbn.functional.batch_norm` of a module and an input, or None where
    the layer's own forward has to run. steps: returns the modules that forward calls afterwards, in their order.
    """

    arguments: Callable[[Any, Tensor], Mapping[str, Any] | None]
    steps: Callable[[Any], tuple[Any, ...]]


LAYERS: dict[type, Layer] = {}


def _make(original: Any) -> type:
    own, tensor, nothing = original.forward, Tensor, NOTHING

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], tensor):
            return _with_epilogue(self, args[0], nothing)
        return original.forward(self, *args, **kwargs)

    def _with_epilogue(self: Any, input: Tensor, epilogue: Epilogue) -> Any:
        if original.forward is not own:
            return epilogue.apply(original.forward(self, input))
        joined = join(Epilogue(after=LAYERS[original].steps(self)), epilogue)
        if joined is None:
            return epilogue.apply(_with_epilogue(self, input, NOTHING))
        found = read(joined, input)
        arguments = None if found is None else LAYERS[original].arguments(self, input)
        if found is None and joined.add is not None and joined.after:  # perhaps the addition alone
            return joined.apply_after(_with_epilogue(self, input, epilogue._replace(after=())))
        if found is None or arguments is None:
            return epilogue.apply(own(self, input))
        residual, activation, param = found
        return functional.batch_norm(
            input, **arguments, residual=residual, activation=activation, activation_param=param
        )

    def _is_fresh(self: Any) -> bool:
        return all(is_known(step) for step in LAYERS[original].steps(self))

    body = {"forward": forward, "_with_epilogue": _with_epilogue, "_is_fresh": _is_fresh}
    return subclass(original, LAYER, body, takes_epilogue=True)


MAKERS[LAYER] = _make
