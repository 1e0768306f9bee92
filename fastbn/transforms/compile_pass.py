"""A pass of torch.compile that gives batch normalisation in training to fastbn, in models that were not converted."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastbn import _torch, functional
from fastbn.backends import aten, registry
from fastbn.nn.epilogue import gives_strides_of
from fastbn.nn.torch_activations import FUNCTIONS, METHODS, Known
from fastbn.ops.activations import index as activation_index
from fastbn.ops.dispatch import Call

_PARAMETERS = inspect.signature(F.batch_norm)


def compile_pass(device_types: Collection[str] = ("cuda",)) -> Callable[[fx.Graph], None]:
    """Return a pass for Inductor: `torch.compile(model, options={"pre_grad_custom_pass": fastbn.compile_pass()})`.

    Where the model calls torch's batch_norm in training on one of `device_types`, the compiled one calls fastbn's op,
    which also does an addition of the same shape and dtype and an activation that follow, unless another reads what is
    in between. The modules stay as they are. Evaluation is left to Inductor, which fuses the normalisation itself, and
    so are the calls that fastbn has no kernels for.
    """
    kinds = tuple(sorted(device_types))
    return _torch.graph_pass(functools.partial(fuse_graph, device_types=kinds), ("fastbn", kinds, __file__))


def fuse_graph(graph: fx.Graph, device_types: Collection[str]) -> int:
    """Replace torch's batch_norm in training by fastbn's, as `compile_pass` says. Returns how many were replaced.

    graph: of torch's functions, as Dynamo writes it, with an example of each value in its `meta`; changed in place.
    """
    replaced = 0
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is F.batch_norm:
            replaced += _replace(node, device_types)
    if replaced:
        graph.lint()
    return replaced


def _replace(node: fx.Node, device_types: Collection[str]) -> bool:
    given = _PARAMETERS.bind(*node.args, **node.kwargs)
    given.apply_defaults()
    arguments = given.arguments
    example = _example(arguments["input"])
    if arguments["training"] is not True or example is None or example.device.type not in device_types:
        return False
    chain, options = _follow(node, example)
    backend = _choose(arguments, options)
    if backend is None:
        return False
    with node.graph.inserting_before(chain[-1]):
        fused = node.graph.call_function(functional.batch_norm, (), {**arguments, **options, "backend": backend})
    fused.meta = dict(chain[-1].meta)
    chain[-1].replace_all_uses_with(fused)
    for done in reversed(chain):
        node.graph.erase_node(done)
    return True


def _choose(arguments: dict[str, Any], options: dict[str, Any]) -> str | None:
    """Return the name of the backend that serves the call, or None if that is torch."""
    tensors = {name: _example(value) for name, value in {**arguments, **options}.items()}
    input: Any = tensors["input"]
    call = Call(
        input,
        tensors.get("residual"),
        tensors["weight"],
        tensors["bias"],
        tensors["running_mean"],
        tensors["running_var"],
        None,
        arguments["momentum"],
        arguments["eps"],
        activation_index(options.get("activation")),
        True,
        options.get("activation_param"),
    )
    backend, _ = registry.choose(call)
    return None if backend is aten.TORCH else backend.name


def _example(value: Any) -> Tensor | None:
    example = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    return example if isinstance(example, Tensor) else None


def _follow(node: fx.Node, example: Tensor) -> tuple[list[fx.Node], dict[str, Any]]:
    """Return the nodes whose work one op can do, `node` first, and the op's arguments for those after it."""
    chain: list[fx.Node] = [node]
    options: dict[str, Any] = {}
    user = _only_user(node)
    if user is not None and (residual := _residual(user, node, example)) is not None:
        chain.append(user)
        options["residual"] = residual
        user = _only_user(user)
    if user is not None and (known := _activation(user, chain[-1])) is not None:
        chain.append(user)
        options["activation"], options["activation_param"] = known
    # The op runs where the chain ends. What it reads and writes must not be written and read from here to there.
    statistics = [value for value in (*node.args, *node.kwargs.values())[1:] if isinstance(value, fx.Node)]
    for other in _between(chain):
        if _may_write(other) or not set(statistics).isdisjoint(other.all_input_nodes):
            return [node], {}
    return chain, options


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _residual(node: fx.Node, value: fx.Node, example: Tensor) -> fx.Node | None:
    """Return what `node` adds to `value`, if it is an addition whose other operand is like the example."""
    if node.target not in _ADDITIONS or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if first is second or (node.target in _IN_PLACE and first is not value):
        return None
    other: Any = second if first is value else first
    added = _example(other)
    if added is None or added.shape != example.shape or (added.dtype, added.device) != (example.dtype, example.device):
        return None
    return other if first is value or gives_strides_of(example, added) else None


_IN_PLACE = (operator.iadd, "add_")
_ADDITIONS = (operator.add, torch.add, "add", *_IN_PLACE)


def _activation(node: fx.Node, value: fx.Node) -> Known:
    tables: dict[str, dict[Any, Callable[..., Known]]] = {"call_function": FUNCTIONS, "call_method": METHODS}
    reads = tables.get(node.op, {}).get(node.target)
    if reads is None or not node.args or node.args[0] is not value:
        return None
    try:
        return reads(*node.args[1:], **node.kwargs)
    except TypeError:
        return None


def _between(chain: list[fx.Node]) -> Iterable[fx.Node]:
    """Return the nodes from the first of the chain to its last that are not its own."""
    node = chain[0]
    while node is not chain[-1]:
        node = node.next
        if node not in chain:
            yield node


def _may_write(node: fx.Node) -> bool:
    """Return whether a node may write to a tensor of floating-point numbers, going by its name and arguments."""
    if (
        node.op not in ("call_function", "call_method")
        or node.target is F.batch_norm
        or node.target is functional.batch_norm
    ):
        return node.op == "call_module"
    if _torch.may_write(node.target):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") or name in _IN_PLACE_OPERATORS or node.kwargs.get("inplace") or "out" in node.kwargs
    if not in_place:
        return False
    written = _example(node.args[0]) if node.args else None
    return written is None or written.is_floating_point()


_IN_PLACE_OPERATORS = frozenset(
    "setitem iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split()
)
