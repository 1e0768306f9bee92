"""nn.Sequential with another forward: it pairs a normalisation with what follows it, at each call."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastbn.nn.epilogue import (
    IDENTITIES,
    NOTHING,
    Epilogue,
    is_fresh,
    is_identity,
    is_known,
    known_activation,
    run,
    takes_epilogue,
)
from fastbn.nn.torch_activations import ACTIVATIONS
from fastbn.transforms.fuse.source import MAKERS, subclass

SEQUENTIAL = "sequential"


def _run_children(self: Any, input: Any, epilogue: Epilogue) -> Any:
    layer: Any = None
    steps: tuple[Any, ...] = ()
    for module in self._modules.values():
        if layer is None:
            if takes_epilogue(module):
                layer = module
            else:
                input = module(input)
        elif is_identity(module):
            steps = (*steps, module)
        elif (known := known_activation(module)) is not None:
            input, layer, steps = run(layer, input, Epilogue(after=(*steps, module), known=known)), None, ()
        else:
            input, layer, steps = run(layer, input, Epilogue(after=steps)), None, ()
            if takes_epilogue(module):
                layer = module
            else:
                input = module(input)
    if layer is not None:
        return run(layer, input, Epilogue(after=steps), epilogue)
    return epilogue.apply(input)


def _is_fresh(self: Any) -> bool:
    for module in reversed(self._modules.values()):
        if not is_known(module):
            return is_fresh(module)
    return False


def _make(original: type[nn.Sequential]) -> type:
    own, run_children, nothing = original.forward, _run_children, NOTHING

    def forward(self: Any, input: Any) -> Any:
        return run_children(self, input, nothing) if original.forward is own else original.forward(self, input)

    def _with_epilogue(self: Any, input: Any, epilogue: Epilogue) -> Any:
        if original.forward is own:
            return run_children(self, input, epilogue)
        return epilogue.apply(original.forward(self, input))

    body = {"forward": forward, "_with_epilogue": _with_epilogue, "_is_fresh": _is_fresh}
    return subclass(original, SEQUENTIAL, body, takes_epilogue=True)


MAKERS[SEQUENTIAL] = _make


def children_of(module: nn.Sequential, ever: bool = False) -> tuple[list[tuple[str, str | None]], str | None]:
    """Return ([(child, the activation that it takes or None)], the last child if it takes what follows the Sequential).

    The children are those that take an epilogue, as all children are now; ever: as they may be in some mode, by their
    types.
    """
    found: list[tuple[str, str | None]] = []
    pending: str | None = None
    for name, child in module._modules.items():
        if pending is not None:
            if type(child) in IDENTITIES if ever else is_identity(child):
                continue
            known = known_activation(child)
            if type(child) in ACTIVATIONS if ever else known is not None:
                found.append((pending, "" if known is None else known[0]))
                pending = None
                continue
            found.append((pending, None))
        pending = name if takes_epilogue(child) else None
    if pending is not None:
        found.append((pending, None))
    return found, pending
