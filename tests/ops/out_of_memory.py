"""Out of memory: torch's exception with its words, whichever allocation fails, and no buffer moved."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fastbn
from fastbn.ops import contract, errors
from tests import implementations
from tests.stock import FAST, normal

HUGE = (2**20, 64, 2**12, 2**12)
# 64 MiB, and as much for each float64 vector of its channels: what is that large is an allocation of its own.
WIDE = (2, 2**23)
MIB = 2**20
WORDS = "DefaultCPUAllocator: can't allocate memory"


def _expanded(*shape: int) -> torch.Tensor:
    """Return one element expanded to `shape`, which takes memory once it is made dense."""
    return torch.ones([1] * len(shape)).expand(shape)


@contextlib.contextmanager
def _memory_left(size: int):
    """Limit the address space of the process to this many bytes beyond what it uses."""
    gc.collect()  # a collection later would free tensors of earlier tests in between
    ctypes.CDLL(None).malloc_trim(0)  # what is free at the heap's end would be room beyond the limit
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _buffers(channels: int):
    return torch.zeros(channels), torch.ones(channels), torch.tensor(3)


def _assert_untouched(buffers) -> None:
    for buffer, before in zip(buffers, _buffers(buffers[0].numel()), strict=True):
        assert torch.equal(buffer, before)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backend", [None, "cpu"])
@pytest.mark.parametrize("trained", [False, True], ids=["plain", "trained"])
def test_torch_and_the_layer_say_the_same(trained, backend, training):
    errors, buffers = [], _buffers(64)
    weight = torch.ones(64, requires_grad=trained)
    for function, options in (
        (F.batch_norm, {}),
        (fastbn.functional.batch_norm, {"num_batches_tracked": buffers[2], "backend": backend}),
    ):
        with pytest.raises(Exception) as caught:
            function(_expanded(*HUGE), *buffers[:2], weight, None, training, **options)
        errors.append(caught.value)
    assert type(errors[1]) is type(errors[0]) and str(errors[1]) == str(errors[0])
    assert WORDS in str(errors[1])
    _assert_untouched(buffers)


def _failures(function, *, step: int, max_bytes: int):
    """Return the errors of a call with more and more memory, until it succeeds."""
    errors = []
    for size in range(step, max_bytes, step):
        with _memory_left(size):
            try:
                function()
                return errors
            except Exception as error:
                errors.append(error)
    raise AssertionError(f"expected success with {max_bytes} bytes, got {errors[-1]!r}")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_allocation_of_forward(training):
    """Copies of input and residual, output, mean or inv_std: each is the first that finds no memory."""
    x, residual, weight = _expanded(*WIDE), _expanded(*WIDE), torch.ones(WIDE[1], requires_grad=True)
    moved, expected = _buffers(WIDE[1]), _buffers(WIDE[1])

    def forward(buffers=moved):
        _assert_untouched(buffers)
        mean, var, counter = buffers
        options = {"residual": residual, "activation": "relu", "num_batches_tracked": counter}
        return fastbn.functional.batch_norm(x, mean, var, weight, None, training, **options)

    forward(expected)
    errors = _failures(forward, step=64 * MIB, max_bytes=1024 * MIB)
    assert len(errors) >= 4
    for error in errors:
        assert type(error) is RuntimeError and WORDS in str(error), repr(error)
    assert all(torch.equal(a, b) for a, b in zip(moved, expected, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_allocation_of_backward(training):
    """The copy of grad_out or a gradient finds no memory."""
    x, residual = (torch.ones(WIDE, requires_grad=True) for _ in range(2))
    weight, bias = (torch.ones(WIDE[1], requires_grad=True) for _ in range(2))
    mean, var, _ = _buffers(WIDE[1])
    options = {"residual": residual, "activation": "relu"}
    output = fastbn.functional.batch_norm(x, mean, var, weight, bias, training, **options)

    def backward():
        torch.autograd.grad(output, [x, residual, weight, bias], _expanded(*WIDE), retain_graph=True)

    backward()
    errors = _failures(backward, step=64 * MIB, max_bytes=1024 * MIB)
    assert len(errors) >= 3
    for error in errors:
        assert type(error) is RuntimeError and WORDS in str(error), repr(error)


def _operands(wide: torch.Tensor, dense: torch.Tensor):
    """Return arguments by op, with each tensor of the shape of the input expanded in turn."""
    channels = dense.shape[1]
    vector, stats = torch.ones(channels), torch.ones(channels, dtype=torch.float64)
    none4, buffers = (None,) * 4, (vector, vector)
    for x, residual in ((wide, None), (dense, wide), (dense, dense)):
        yield "batch_norm_train", (x, residual, None, None, *buffers, torch.tensor(3), 0.1, 1e-5, 1, True)
        yield "batch_norm_eval", (x, residual, None, None, *buffers, 1e-5, 1)
        yield "batch_norm_frozen", (x, residual, None, None, *buffers, 1e-5, 1, True)
        yield "normalize", (x, residual, None, None, stats, stats, 1, True)
    for grad_out, x in ((dense, wide), (wide, dense), (dense, dense)):
        flags = (True, 0, True, True, True, True)
        yield "batch_norm_backward", (grad_out, x, *none4, stats, stats, *flags)
        yield "input_grad", (grad_out, x, *none4, stats, stats, None, None, None, 0, True)
    yield "grad_sums", (dense, wide, *none4, stats, stats, 1)
    yield "grad_sums", (wide, dense, *none4, stats, stats, 1)
    yield "channel_stats", (wide,)


@pytest.mark.parametrize("ops", implementations.params("cpu", "emulator"), indirect=True)
def test_ops_speak_in_the_words_of_torch(ops):
    """No kernel runs: the emulator's ops fail where the CPU's do."""
    dense = torch.ones(2**20, 16)
    words = f"{WORDS}: you tried to allocate {64 * MIB} bytes"
    failed = []
    for name, arguments in _operands(_expanded(*dense.shape), dense):
        vectors = [a for a in arguments if isinstance(a, torch.Tensor) and a.shape != dense.shape]
        before = [v.clone() for v in vectors]
        with _memory_left(48 * MIB), pytest.raises(RuntimeError, match=words):
            getattr(ops.namespace, name)(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(vectors, before, strict=True)), name
        failed.append(name)
    assert set(failed) == set(contract.OPS)


def _refuses(error: Exception):
    def empty(*args, **kwargs):
        raise error

    return SimpleNamespace(empty=empty)


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_the_type_of_torch_comes_through(monkeypatch, backend):
    """The error is torch.OutOfMemoryError, which a GPU's allocator raises."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4096.00 TiB.")
    monkeypatch.setattr(errors, "torch", _refuses(error))
    buffers = _buffers(64)
    for training in (True, False):
        for weight in (None, torch.ones(64, requires_grad=True)):
            with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory. Tried to") as caught:
                fastbn.functional.batch_norm(
                    _expanded(*HUGE), *buffers[:2], weight, training=training, num_batches_tracked=buffers[2],
                    backend=backend,
                )  # fmt: skip
            assert caught.value.args == error.args
            assert caught.value.__cause__ is None
    _assert_untouched(buffers)


def test_the_type_of_torch_comes_through_backward(monkeypatch):
    monkeypatch.setattr(fastbn.functional, "NODE", None)  # which meets torch's own error
    x = torch.ones(2**20, 16, requires_grad=True)
    output = fastbn.functional.batch_norm(x, None, None, training=True)
    monkeypatch.setattr(errors, "torch", _refuses(torch.OutOfMemoryError("CUDA out of memory.")))
    with _memory_left(48 * MIB), pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        output.backward(_expanded(*x.shape))
    output.backward(_expanded(*x.shape))


def test_memory_that_comes_back_is_used(monkeypatch):
    """Another thread may have freed some in between."""
    asked = []
    with contextlib.ExitStack() as limit:

        def empty(shape, **kwargs):
            asked.append(tuple(shape))
            limit.close()

        monkeypatch.setattr(errors, "torch", SimpleNamespace(empty=empty))
        x = _expanded(2**20, 16)
        limit.enter_context(_memory_left(48 * MIB))
        output = fastbn.functional.batch_norm(x, None, None, training=True)
    assert asked == [(2**20, 16)]
    assert torch.equal(output, torch.zeros_like(output))


def test_other_errors_stay_as_they_are():
    """So does the cause that they name."""

    def pack(tensor):
        raise RuntimeError("no room on disk") from OSError(28)

    x = normal(3, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), pytest.raises(RuntimeError) as caught:
        fastbn.functional.batch_norm(x, None, None, training=True)
    assert str(caught.value) == "no room on disk" and isinstance(caught.value.__cause__, OSError)


def test_what_is_only_read_is_not_copied():
    """A lazy clone gets memory of its own when its address is requested for writing."""
    x = normal(3, 4)
    lazy, weight, residual = torch._lazy_clone(x), normal(4), torch._lazy_clone(x)
    fastbn.functional.batch_norm(lazy, None, None, weight, training=True, residual=residual)
    assert torch._C._is_cow_tensor(lazy) and torch._C._is_cow_tensor(residual)


def test_an_address_that_torch_refuses():
    """A later CUDA graph may have taken the memory of a tensor. The text crosses the C interface since torch 2.13."""
    mean, var = torch.zeros(4), torch.ones(4)
    torch._C._set_throw_on_mutable_data_ptr(var)
    with pytest.raises(RuntimeError) as caught:
        fastbn.functional.batch_norm(normal(3, 4, dtype=torch.float32), mean, var, training=True)
    if torch.__version__ >= (2, 13):
        assert "Cannot access data pointer of Tensor" in str(caught.value)
    assert torch.equal(mean, torch.zeros(4))


def test_a_compiled_call_has_the_words():
    call = torch.compile(fastbn.functional.batch_norm, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=WORDS):
        call(_expanded(*HUGE), None, None, training=True)


@pytest.mark.gpu
def test_on_a_gpu():
    """Forward and backward fail by tensors that no GPU holds and by a limit on the allocator's fraction."""
    fast = FAST[2](64).cuda()
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        fast(torch.ones(1, 1, 1, 1, device="cuda").expand(HUGE))
    assert fast.num_batches_tracked.item() == 0
    assert torch.equal(fast.running_mean, torch.zeros_like(fast.running_mean))

    x = torch.ones(64, 64, 128, 128, device="cuda", requires_grad=True)
    output = fast(x)
    assert fast.num_batches_tracked.item() == 1
    grad_outs = torch.ones(1, 1, 1, 1, device="cuda").expand_as(output), output.detach()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            fast(x)
        assert fast.num_batches_tracked.item() == 1
        for grad_out in grad_outs:
            with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
                torch.autograd.grad(output, x, grad_out, retain_graph=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.autograd.grad(output, x, grad_outs[0])
