"""What follows a normalisation (addition, activation), fused into it where a call allows that.

Whether it does is decided at each call, by what the modules are then. Otherwise they run as the model's own code has
them. So hooks, and whatever replaces or freezes a module, stay right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbn import _torch
from fastbn.nn.torch_activations import ACTIVATIONS, FUNCTIONS, METHODS, Known
from fastbn.ops.layout import suggest_memory_format


class Function(NamedTuple):
    """A call of a function, or of the method of that name, as a step of an epilogue."""

    target: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}

    def apply(self, y: Any) -> Any:
        function = self.target
        if isinstance(function, str):
            return getattr(y, function)(*self.args, **self.kwargs)
        return function(y, *self.args, **self.kwargs)


class Epilogue(NamedTuple):
    """The steps after a normalisation, as the code that it stands for has them.

    before: steps between normalisation and addition. add: the addition, a function of what comes from before and
    `residual`; None for none. after: the steps that follow. A step is a module or a Function. known: the activation
    that `after` is, if whoever made the epilogue has just asked for it.
    """

    residual: Any = None
    add: Callable[[Any, Any], Any] | None = None
    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()
    known: Known = None

    def apply(self, y: Any) -> Any:
        """Run the steps one by one."""
        for step in self.before:
            y = _apply_step(step, y)
        return self.apply_after(y if self.add is None else self.add(y, self.residual))

    def apply_after(self, y: Any) -> Any:
        for step in self.after:
            y = _apply_step(step, y)
        return y


NOTHING = Epilogue()


class TakesEpilogue:
    """Mixin of what `run` may hand an epilogue.

    `_epilogue_owner` is the exact class that it holds for, and a class is told that it is itself: subclasses may change
    what forward means.
    """

    _epilogue_owner: type | None = None

    def _with_epilogue(self, input: Tensor, epilogue: Epilogue) -> Any:
        """Return epilogue.apply(self(input)). Only called if `is_plain(self)`."""
        raise NotImplementedError

    def _is_fresh(self) -> bool:
        """Return whether forward returns memory that is its own. Only called if `is_plain(self)`."""
        raise NotImplementedError


class NormalizationLayer(TakesEpilogue):
    """Mixin of a layer that is one call of the fused op: `_normalize`."""

    activation: str | None

    def _normalize(
        self, input: Tensor, residual: Tensor | None, activation: str | None, activation_param: float | None
    ) -> Tensor:
        """Return activation(normalised input + residual)."""
        raise NotImplementedError

    def _with_epilogue(self, input: Tensor, epilogue: Epilogue) -> Any:
        found = None if self.activation is not None else read(epilogue, input)
        if found is not None:
            return self._normalize(input, *found)
        if epilogue.add is not None and epilogue.after:  # perhaps the addition alone
            return epilogue.apply_after(self._with_epilogue(input, epilogue._replace(after=(), known=None)))
        return epilogue.apply(self(input))  # type: ignore[operator]

    def _is_fresh(self) -> bool:
        return True


def own_class(module: Any) -> Any:
    """Return the class that a module has without the one whose forward is fused."""
    return getattr(type(module), "_fastbn_original", type(module))


def takes_epilogue(module: Any) -> bool:
    cls = type(module)
    return getattr(cls, "_epilogue_owner", None) is cls


def run(module: Any, input: Any, epilogue: Epilogue, outer: Epilogue = NOTHING) -> Any:
    """Return outer.apply(epilogue.apply(module(input))), the steps fused into a normalisation where that is allowed."""
    joined = join(epilogue, outer)
    if joined is None:
        return outer.apply(run(module, input, epilogue))
    if takes_epilogue(module) and isinstance(input, Tensor) and is_plain(module) and not _must_see_modules():
        return module._with_epilogue(input, joined)
    return joined.apply(module(input))


def join(inner: Epilogue, outer: Epilogue) -> Epilogue | None:
    """Return one epilogue for `inner` followed by `outer`, or None where an op could not take it anyway."""
    if outer is NOTHING:
        return inner
    if outer.add is None:
        if all_identities(inner.after):
            return inner._replace(after=inner.after + outer.before + outer.after)
        return None
    if inner.add is None and all_identities(inner.after):
        return outer._replace(before=inner.before + inner.after + outer.before)
    return None


def read(epilogue: Epilogue, input: Tensor) -> tuple[Tensor | None, str | None, float | None] | None:
    """Return (residual, activation, activation_param) of an op that does all steps, or None if there is none."""
    if not all_identities(epilogue.before):
        return None
    activation = epilogue.known
    if activation is None:
        for step in epilogue.after:
            if is_identity(step):
                continue
            found = known_activation(step)
            if activation is not None or found is None:
                return None
            activation = found
    name, param = (None, None) if activation is None else activation
    if name == "softplus" and torch.is_autocast_enabled(input.device.type):
        return None  # autocast computes it in float32 on some devices
    if epilogue.add is None:
        return None, name, param
    residual = epilogue.residual
    if (
        not isinstance(residual, Tensor)
        or residual.shape != input.shape
        or residual.dtype != input.dtype
        or residual.device != input.device
        or residual.layout != input.layout
    ):
        return None
    if epilogue.add in (add_to, iadd_to) and not gives_strides_of(input, residual):
        return None
    return residual, name, param


def gives_strides_of(input: Tensor, residual: Tensor) -> bool:
    """Return whether the sum has the strides of a normalised input, although it takes those of its first operand."""
    if _torch.is_in_functorch_transform():  # which does not tell
        return False
    memory_format = suggest_memory_format(input)
    if residual.is_contiguous(memory_format=memory_format):
        return True
    dims = list(range(residual.dim()))
    if memory_format is not torch.contiguous_format:
        dims.append(dims.pop(1))
    strides = [residual.stride(d) for d in dims if residual.shape[d] > 1]
    return all(outer > inner > 0 for outer, inner in zip(strides, strides[1:]))


def is_plain(module: nn.Module) -> bool:
    """Return whether calling `module` only calls the forward of its class: no hook, and nothing put in its place."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )


def _must_see_modules() -> bool:
    """Return whether hooks of all modules, or a tool that records their calls, must see each of them."""
    return _torch.has_global_module_hooks() or torch.jit.is_tracing() or _torch.is_exporting()  # type: ignore[attr-defined, no-untyped-call]


def is_eager() -> bool:
    """Return whether neither a compiler nor a tracer nor torch.export records what is called."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or _torch.is_exporting())  # type: ignore[attr-defined, no-untyped-call]


def keeps_order(module: Any) -> bool:
    """Return whether nothing can tell that a module is called later than the model's code calls it."""
    return is_plain(module) and not _must_see_modules()


def is_fresh(module: Any) -> bool:
    """Return whether the result of a call shares memory with nothing that others can read."""
    if not is_plain(module):
        return False
    return type(module) in _FRESH or (takes_epilogue(module) and module._is_fresh())


_FRESH = frozenset(
    (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
)


def _apply_step(step: Any, y: Any) -> Any:
    return step.apply(y) if isinstance(step, Function) else step(y)


def is_known(step: Any) -> bool:
    """Return whether a step computes its result from its input alone, and keeps neither."""
    return is_identity(step) or known_activation(step) is not None


def is_identity(step: Any) -> bool:
    """Return whether a step returns what it is given, as it is now."""
    cls = type(step)
    asks = IDENTITIES.get(cls)
    return asks is not None and FORWARDS[cls] is cls.forward and is_plain(step) and asks(step)


def all_identities(steps: tuple[Any, ...]) -> bool:
    for step in steps:
        if not is_identity(step):
            return False
    return True


def known_activation(step: Any) -> Known:
    """Return name and parameter of the activation that a step is now, or None."""
    if isinstance(step, Function):
        target = step.target
        reads = METHODS.get(target) if isinstance(target, str) else FUNCTIONS.get(target)
        return None if reads is None else reads(*step.args, **step.kwargs)
    cls = type(step)
    reads = ACTIVATIONS.get(cls)
    return reads(step) if reads is not None and FORWARDS[cls] is cls.forward and is_plain(step) else None


def _is_idle_dropout(module: Any) -> bool:
    return not module.training or module.p == 0


# Whether a module of exactly this type returns what it is given.
IDENTITIES: dict[type, Callable[[Any], bool]] = {
    nn.Identity: lambda m: True,
    nn.Dropout: _is_idle_dropout,
    nn.Dropout1d: _is_idle_dropout,
    nn.Dropout2d: _is_idle_dropout,
    nn.Dropout3d: _is_idle_dropout,
    nn.AlphaDropout: _is_idle_dropout,
    nn.FeatureAlphaDropout: _is_idle_dropout,
}
# The forward of each type of both tables, since another may be put in its place.
FORWARDS: dict[type, Any] = {cls: cls.forward for cls in (*ACTIVATIONS, *IDENTITIES)}  # type: ignore[attr-defined]


# The additions of a graph by name; "_to" where the normalised value is the second operand.
def add_to(y: Any, residual: Any) -> Any:
    return residual + y


def iadd_to(y: Any, residual: Any) -> Any:
    residual += y
    return residual
