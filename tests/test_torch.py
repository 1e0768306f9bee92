"""The private torch APIs of fastbn._torch: the installed torch has each, and it does what fastbn expects."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastbn import _torch


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_every_module_takes_private_names_from_one():
    private = re.compile(r"torch(\.\w+)*\._[a-zA-Z]|from torch[\w.]* import .*\b_[a-zA-Z]|from torch\.(_\w|utils\._)")
    for path in sorted(Path(_torch.__file__).parent.rglob("*.py")):
        if path.name != "_torch.py":
            assert not private.search(path.read_text()), path


def test_the_base_of_all_batch_norms():
    for module in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        assert issubclass(module, _torch.BatchNormBase)
    assert not issubclass(nn.LayerNorm, _torch.BatchNormBase)


def test_compiled_code_is_left_aside_where_hooks_have_to_run():
    seen, module = [], nn.ReLU()
    compiled = torch.compile(module, backend="eager")
    compiled(torch.ones(2))
    module.register_forward_pre_hook(lambda module, args: seen.append(len(args)))
    with _torch.without_compiled_code():
        compiled(torch.ones(2))
    assert seen == [1]


def test_function_modes():
    class Mode(TorchFunctionMode):
        pass

    assert not _torch.function_mode_stack()
    with torch.device("meta"), Mode() as mode:
        first, second = _torch.function_mode_stack()
    assert type(first) is _torch.DeviceContext and second is mode


def test_below_autograd_an_op_records_nothing_and_moves_no_version():
    x, buffer = torch.ones(2, requires_grad=True), torch.ones(2)
    with _torch.below_autograd():
        y = x * 2
        buffer.add_(1)
    assert not y.requires_grad and buffer._version == 0


def test_after_autograd():
    assert not _torch.after_autograd.has(torch._C.DispatchKey.AutogradCPU)
    assert _torch.after_autograd.has(torch._C.DispatchKey.CPU)


def test_apply_below_transforms():
    x = torch.ones(3, requires_grad=True)
    _torch.apply_below_transforms(_Double)(x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize("ask", [_torch.has_functorch_transforms, _torch.is_in_functorch_transform])
def test_functorch_transforms(ask):
    seen = []
    torch.func.vmap(lambda x: seen.append(ask()) or x)(torch.ones(2))
    torch.func.grad(lambda x: seen.append(ask()) or x)(torch.ones(()))
    assert seen == [True, True] and not ask()


def test_what_left_a_transform():
    left = []
    torch.func.grad(lambda x: left.append(x * 1) or x)(torch.ones(()))
    assert torch._C._functorch.is_functorch_wrapped_tensor(left[0])
    assert not torch._C._functorch.is_functorch_wrapped_tensor(_torch.unwrap_if_dead(left[0]))
    plain = torch.ones(1)
    assert _torch.unwrap_if_dead(plain) is plain


def test_a_batch_of_gradients():
    seen = []

    class Spy(_Double):
        @staticmethod
        def backward(ctx, grad):
            seen.append(_torch.is_legacy_batched(grad))
            return grad

    x = torch.ones(3, requires_grad=True)
    torch.autograd.grad(Spy.apply(x), x, torch.eye(3), is_grads_batched=True)
    assert seen == [True] and not _torch.is_legacy_batched(x)


def test_forward_ad():
    assert not _torch.is_in_forward_ad()
    with forward_ad.dual_level():
        assert _torch.is_in_forward_ad()


def test_backward():
    seen = []

    class Spy(_Double):
        @staticmethod
        def backward(ctx, grad):
            seen.append(_torch.is_in_backward())
            return grad

    y = Spy.apply(torch.ones(3, requires_grad=True)).sum()
    assert not _torch.is_in_backward()
    y.backward()
    assert seen == [True] and not _torch.is_in_backward()


def test_without_dispatch_modes():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen, x = [], torch.ones(2)
    with Mode():
        with _torch.without_dispatch_modes():
            x.clone()
        assert not seen
        x.clone()
    assert len(seen) == 1


def test_traceable_assert():
    class Model(nn.Module):
        def forward(self, x):
            _torch.traceable_assert(x.dim() == 1, "expected a vector")
            return x

    for model in (Model(), torch.fx.symbolic_trace(Model()), torch.jit.script(Model())):
        assert model(torch.ones(2)).shape == (2,)
        with pytest.raises(Exception, match="expected a vector"):
            model(torch.ones(2, 2))


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_a_compiler_knows(dynamic):
    """Of a dynamic size it knows nothing, and asking adds no guard: mark_dynamic would refuse one."""

    def function(x):
        return x + 1 if _torch.is_known_to_compiler(x.numel() < 100) else x - 1

    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    small, large = torch.zeros(8, 2), torch.zeros(200, 2)
    if dynamic:
        torch._dynamo.mark_dynamic(small, 0)
        torch._dynamo.mark_dynamic(large, 0)
    assert compiled(small)[0, 0] == (-1 if dynamic else 1)
    assert compiled(large)[0, 0] == -1
    assert counter.frame_count == (1 if dynamic else 2)


def test_exporting():
    seen = []

    class Model(nn.Module):
        def forward(self, x):
            seen.append(_torch.is_exporting())
            return x + 1

    assert not _torch.is_exporting()
    torch.export.export(Model(), (torch.ones(2),))
    assert seen[-1] and not _torch.is_exporting()


def test_wrapper_subclasses():
    from torch.testing._internal.two_tensor import TwoTensor

    assert _torch.is_traceable_wrapper_subclass(TwoTensor(torch.ones(2), torch.ones(2)))
    assert not _torch.is_traceable_wrapper_subclass(nn.Parameter(torch.ones(2)))


def test_global_module_hooks():
    assert not _torch.has_global_module_hooks()
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert _torch.has_global_module_hooks(), register.__name__
        handle.remove()
    assert not _torch.has_global_module_hooks()


def test_collectives(tmp_path):
    """In a group of one; tests/nn/sync_checks.py has larger ones."""
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        vector, group = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.distributed.group.WORLD.group_name
        assert torch.equal(_torch.all_gather(vector, 1, group), vector)
        assert torch.equal(_torch.all_reduce(vector, group), vector)
    finally:
        torch.distributed.destroy_process_group()


def test_functions_have_names_under_their_modules():
    modules = [importlib.import_module(name) for name in _torch.FUNCTION_MODULES]
    for function in (torch.relu, torch.flatten, F.relu, F.gelu, F.softplus, F.max_pool2d, F.adaptive_avg_pool2d):
        assert any(getattr(module, function.__name__, None) is function for module in modules), function


def test_operators_say_whether_they_write():
    assert _torch.may_write(torch.ops.aten.relu_) and _torch.may_write(torch.ops.aten.relu_.default)
    assert not _torch.may_write(torch.ops.aten.relu) and not _torch.may_write(torch.relu_)
    assert _torch.may_write(torch.ops.higher_order.cond)


def test_fake_tensors_have_a_device_and_no_values():
    with _torch.fake_tensors() as mode:
        x = torch.empty(2**40, 3)
        y = mode.from_tensor(torch.ones(3)) + x
    assert _torch.is_fake(y) and y.shape == (2**40, 3) and y.device.type == "cpu"
    assert not _torch.is_fake(torch.empty(1)) and not _torch.is_fake(torch.empty(1, device="meta"))


def test_which_batch_norm_torch_takes():
    x, vector = torch.ones(4, 3), torch.ones(3)
    assert _torch.which_batch_norm(x, vector, vector, vector, vector, True, 1e-5).name.lower() == "native"


def test_a_function_is_called_when_cuda_starts(monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    _torch.when_cuda_starts(lambda: called.append("at once"))
    queued = []
    monkeypatch.setattr(torch.cuda, "_queued_calls", queued)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    _torch.when_cuda_starts(lambda: called.append("later"))
    assert called == ["at once"]
    queued[0][0]()
    assert called == ["at once", "later"]


@pytest.mark.gpu
def test_spinning_keeps_a_stream_busy():
    _torch.spin(10**8)
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
