"""fastbn.backends.registry: who serves a call, and why not a faster one. A new backend is an object and one line."""

from __future__ import annotations

import pytest
import torch

import fastbn
from fastbn.backends import aten, native, registry
from fastbn.backends.reference.backend import ReferenceBackend
from fastbn.ops.dispatch import Call, Plan


def _call(input, **changed):
    call = Call(input, None, None, None, None, None, None, 0.1, 1e-5, 0, True)
    return call._replace(**changed)


class Added(ReferenceBackend):
    """A backend as somebody adds it: it serves CPU tensors of an even number of channels."""

    name = "added"
    device_types = ("cpu",)

    def why_not(self, call):
        return "the number of channels is odd" if call.input.shape[1] % 2 else None

    def plan(self, call, direction, reason, limits=None):
        return Plan(self.name, "kernel", 1, 1.0, 1.0, 0, 0, 0, reason)

    def availability(self):
        return "yes: for tests"


@pytest.fixture
def added(monkeypatch):
    """Register a backend before all others."""
    monkeypatch.setattr(registry, "_backends", {})
    monkeypatch.setattr(registry, "_offered", {})
    backend = Added()
    for each in (backend, native.CPU, native.CUDA, aten.TORCH):
        registry.register(each)
    return backend


def test_the_first_that_can_serves_and_the_reason_says_why_not_the_one_before(added):
    assert registry.choose(_call(torch.zeros(2, 4))) == (added, None)
    backend, reason = registry.choose(_call(torch.zeros(2, 3)))
    assert backend is native.CPU and reason == "the number of channels is odd"


def test_compiled_evaluation_is_left_to_torch_where_no_gradient_is_needed(added, monkeypatch):
    """On every device: the choice is made before one is asked."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    mean, var = torch.zeros(4), torch.ones(4)
    for device in ("cpu", "meta"):
        tensors = {"running_mean": mean.to(device), "running_var": var.to(device), "training": False}
        call = _call(torch.zeros(2, 4, device=device), **tensors)
        assert registry.choose(call)[0] is aten.TORCH
        assert registry.choose(call)[1].startswith("without gradients the compiler")
    weighted = call._replace(input=torch.zeros(2, 4), running_mean=mean, running_var=var, weight=var.requires_grad_())
    assert registry.choose(weighted._replace(running_var=torch.ones(4)))[0] is added
    with torch.no_grad():
        assert registry.choose(weighted._replace(running_var=torch.ones(4)))[0] is aten.TORCH
    assert registry.choose(_call(torch.zeros(2, 4)))[0] is added


def test_everything_asks_the_registry(added):
    x = torch.randn(3, 4)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(fastbn.functional.batch_norm(x, None, None, training=True), expected)
    torch.testing.assert_close(fastbn.functional.batch_norm(x, None, None, training=True, backend="added"), expected)
    assert fastbn.explain(x).backend == fastbn.explain(x, backend="added").backend == "added"
    assert fastbn.explain(x[:, :3]).reason == "the number of channels is odd"
    assert fastbn.info()["runs here"]["added"] == "yes: for tests"
    with pytest.raises(ValueError, match="backend 'added' cannot take this call: the number of channels is odd"):
        fastbn.functional.batch_norm(x[:, :3], None, None, training=True, backend="added")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: fastbn.functional.batch_norm(x, None, None, training=True), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x), expected)
    torch._dynamo.reset()


def test_every_backend_keeps_the_protocol():
    for name in registry.names():
        backend = registry.get(name)
        assert backend.name == name and backend.availability().startswith(("yes", "no: "))
        assert backend.saves_mask(torch.zeros(2, 8)) in (True, False)
        assert backend.ops is None or all(callable(getattr(backend.ops, op)) for op in native.contract.OPS)


def test_the_contract_is_asked_before_the_backends():
    for changed, reason in (
        ({"eps": 0.0}, "eps is not positive"),
        ({"running_mean": torch.zeros(4)}, "only one running statistic is given"),
        ({"training": False}, "evaluation needs running statistics"),
        ({"momentum": "0.1"}, "momentum or eps no Python number"),
    ):
        backend, why = registry.choose(_call(torch.zeros(3, 4), **changed))
        assert backend is aten.TORCH and reason in why
        with pytest.raises(ValueError, match=f"backend 'cpu' cannot take this call: .*{reason}"):
            registry.choose(_call(torch.zeros(3, 4), **changed), "cpu")


def test_what_the_ops_check_is_asked_for_only_where_nobody_can_answer_for_them():
    call = _call(torch.zeros(3, 4, dtype=torch.int32))
    assert registry.choose(call) == (native.CPU, None)
    backend, reason = registry.choose(call, ask_all=True)
    assert backend is aten.TORCH and reason == "fastbn has no kernels for torch.int32"
    assert registry.choose(_call(torch.nn.Parameter(torch.zeros(3, 4)), weight=torch.zeros(5)))[0] is aten.TORCH


def test_inference_tensors_are_torchs_to_refuse():
    with torch.inference_mode():
        weight = torch.ones(4)
    call = _call(torch.zeros(3, 4, requires_grad=True), weight=weight)
    assert registry.choose(call, ask_all=True) == (aten.TORCH, "an inference tensor cannot be saved for backward")
    with torch.no_grad():
        assert registry.choose(call, ask_all=True) == (native.CPU, None)


def test_devices_without_a_backend():
    backend, reason = registry.choose(_call(torch.zeros(3, 4, device="meta")))
    assert backend is aten.TORCH and reason == "fastbn has no kernels for meta tensors"


def test_calls_that_torch_cannot_serve_get_kernels_whatever_their_size(added, monkeypatch):
    small = _call(torch.zeros(2, 3, 4, 4))
    monkeypatch.setattr(registry.crossings, "why_torch_is_faster", lambda call: "it is small")
    assert registry.choose(small)[0] is aten.TORCH
    assert registry.choose_ops(small) is native.CPU
    assert registry.choose_ops(_call(torch.zeros(2, 4, 4, 4))) is added
    with pytest.raises(ValueError, match="fastbn has no kernels for meta tensors"):
        registry.choose_ops(_call(torch.zeros(2, 3, device="meta")))
    with pytest.raises(ValueError, match="functorch transforms differentiate"):
        torch.func.vmap(lambda x: registry.choose_ops(_call(x)))(torch.zeros(2, 2, 3))
