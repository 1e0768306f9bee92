"""Every private torch API that fastbn uses, and why: the file to read when a torch release breaks something.

tests/test_torch.py asks the installed torch for what is said here. Names that the hot path calls stand for torch's own
objects, since a function around one takes 0.05 us.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules import module as _module
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.overrides import _get_current_function_mode_stack as function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes as without_dispatch_modes
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "FUNCTION_MODULES",
    "WHO_SORTS_PROXIES",
    "BatchNormBase",  # torch.nn's modules and SyncBatchNorm have no public base class
    "DeviceContext",  # the function mode of torch.set_default_device, which overrides nothing that fastbn calls
    "after_autograd",
    "all_gather",
    "all_reduce",
    "apply_below_transforms",
    "below_autograd",
    "fake_tensors",
    "function_mode_stack",  # torch.overrides says whether there are modes, but not which
    "graph_pass",
    "has_functorch_transforms",
    "has_global_module_hooks",
    "is_exporting",
    "is_fake",
    "is_in_forward_ad",
    "is_in_functorch_transform",
    "is_legacy_batched",
    "is_in_backward",
    "is_traceable_wrapper_subclass",  # DTensor and its like, which give aten::batch_norm a meaning of their own
    "may_write",
    "is_known_to_compiler",
    "spin",
    "traceable_assert",
    "unwrap_if_dead",
    "when_cuda_starts",
    "which_batch_norm",
    "without_compiled_code",
    "without_dispatch_modes",  # what selective checkpointing sees of a forward
]

# A guard under which a call of an op goes straight to its kernel: the op's autograd wrapper costs time, and would bump
# the version of the running statistics, which torch's BatchNorm does not.
below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
# The dispatch keys below autograd, for an op that has its own autograd kernel.
after_autograd = torch._C._after_autograd_keyset
# Keeps the current CUDA stream busy for a number of cycles, so that the host can enqueue what is to be timed after it.
spin: Callable[[int], None] = torch.cuda._sleep
# Returns the kernels that torch's own batch_norm takes for its operands: cuDNN's, MIOpen's or its native ones.
which_batch_norm: Callable[..., Any] = torch._C._select_batch_norm_backend
# Calls a function when CUDA is initialised, or now if it is. To do so at import would break processes that fork later.
when_cuda_starts: Callable[[Callable[[], None]], None] = torch.cuda._lazy_call
# Returns whether torch.func transforms are active.
has_functorch_transforms = torch._C._are_functorch_transforms_active
# Asserts a condition on a tensor's metadata that is traced as a call, where `assert` and `raise` are branches.
traceable_assert: Callable[[bool, str], None] = torch._assert
# Returns the tensor inside a wrapper that has outlived its transform.
unwrap_if_dead = torch._C._functorch.unwrap_if_dead
# Returns whether a tensor stands for a batch of gradients (`is_grads_batched`): its strides cannot be read.
is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor

_peek_interpreter_stack, _Interpreter = torch._C._functorch.peek_interpreter_stack, torch._C._functorch.CInterpreter


def all_gather(vector: Tensor, size: int, group: str) -> Tensor:
    """Return the vectors of all `size` processes of the group of that name, one after the other.

    torch.distributed's public functions write to their arguments and take the group as an object; a compiler can trace
    these ops as they are. The host does not wait for a GPU: the stream does.
    """
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(vector, size, group))


def all_reduce(vector: Tensor, group: str) -> Tensor:
    """Return the sum of the vectors of all processes of the group of that name."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(vector, "sum", group))


def apply_below_transforms(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return `function.apply` without the checks for transforms that torch.autograd.Function.apply makes (1.4 us)."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def is_in_backward() -> bool:
    """Return whether autograd is running a backward on this thread, by the number of its graph task."""
    return torch._C._current_graph_task_id() != -1


def is_in_functorch_transform() -> bool:
    """Return what `has_functorch_transforms` returns, in a form that Dynamo can trace."""
    # `is not None` would be wrong: Dynamo wraps values that it cannot trace, and a wrapped None is not None.
    return isinstance(_peek_interpreter_stack(), _Interpreter)


def is_in_forward_ad() -> bool:
    return forward_ad._current_level >= 0


def graph_pass(function: Callable[[Any], Any], key: Any) -> Callable[[Any], None]:
    """Return a pass of Inductor that calls `function` with a graph, and which its caches know by `key`."""
    from torch._inductor.custom_graph_pass import CustomGraphPass  # a second to import, for those who compile

    class Pass(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            function(graph)

        def uuid(self) -> Any:
            return key

    return Pass()


def may_write(op: Any) -> bool:
    """Return whether an operator of torch.ops may write to arguments other than `out`; False for other functions."""
    if isinstance(op, torch._ops.HigherOrderOperator):
        return True
    if isinstance(op, torch._ops.OpOverloadPacket):
        return any(may_write(getattr(op, name)) for name in op.overloads() if "out" not in name)
    return isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable


def is_known_to_compiler(condition: bool) -> bool:
    """Return whether a condition on traced sizes is true whatever those that are dynamic will be. It adds no guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy, which takes a second

    return statically_known_true(condition)


def without_compiled_code() -> AbstractContextManager[Any]:
    """Return a guard under which compiled functions run eagerly: the guards of their code do not look for new hooks."""
    if "torch._dynamo" not in sys.modules:  # a second to import, and then nothing has been compiled
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def is_exporting() -> bool:
    """Return whether torch.export is tracing.

    Dynamo of torch 2.10 takes torch.compiler.is_exporting() for true wherever it compiles.
    """
    return torch.compiler._is_exporting_flag


# Where torch's functions have a name under which they can be imported; that of their __module__ may not be one.
FUNCTION_MODULES = ("torch", "torch.nn.functional", "torch._C._nn")
# Modules that sort values by type while torch.fx traces, and must see proxies as such.
WHO_SORTS_PROXIES = ("torch.fx", "torch.utils._pytree", "torch._tensor")


def has_global_module_hooks() -> bool:
    """Return whether hooks are registered for all modules: nn.Module.__call__ asks for the same."""
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def fake_tensors() -> FakeTensorMode:
    """Return a context in which tensors have shape, strides, dtype and device, and no values: models run on them.

    Tensors on the meta device say nothing of the device for which they stand.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor was made in `fake_tensors`, and so has no address."""
    return isinstance(tensor, FakeTensor)
