"""Triton as a backend: when it serves a call, what it says of itself, and that nothing imports it before its time."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastbn
from fastbn.backends import aten, native, registry
from fastbn.backends.triton import backend
from fastbn.backends.triton.backend import TRITON
from fastbn.ops.dispatch import Call


class _OnGpu(torch.Tensor):
    """A CPU tensor that says that it is on a GPU: the backends ask for no more in order to choose."""

    @property
    def device(self):
        return torch.device("cuda", 0)

    @property
    def is_cpu(self):
        return False


def _call(**changed):
    x = torch.zeros(4, 3).as_subclass(_OnGpu)
    return Call(x, None, None, None, None, None, None, 0.1, 1e-5, 0, True)._replace(**changed)


@pytest.fixture
def gpu(monkeypatch):
    """Give this process a GPU of compute capability 9.0, and Triton that compiles for it."""
    answers = SimpleNamespace(capability=(9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: answers.capability)
    monkeypatch.setattr(backend, "_IS_INSTALLED", True)
    monkeypatch.setattr(backend, "_IS_INTERPRETED", False)
    # The subclass is as good as a plain tensor.
    monkeypatch.setattr(registry.dispatch, "why_torch_must_see", lambda call: None)
    monkeypatch.setattr(registry.dispatch, "why_unsupported", lambda call: None)
    monkeypatch.setattr(registry.dispatch, "why_refused", lambda call: None)
    return answers


def test_a_gpu_without_kernels_in_the_extension_is_triton_s(gpu, monkeypatch):
    """FASTBN_CUDA=0 or no nvcc at all: nobody has to ask for Triton."""
    monkeypatch.setattr(native, "CUDA_ARCHITECTURES", "")
    chosen, reason = registry.choose(_call())
    assert chosen is TRITON and reason == "fastbn was built without CUDA (no nvcc, or FASTBN_CUDA=0)"


def test_so_is_one_of_another_architecture(gpu, monkeypatch):
    monkeypatch.setattr(native, "CUDA_ARCHITECTURES", "8.0")
    chosen, reason = registry.choose(_call())
    assert chosen is TRITON and "built for 8.0, and this GPU is 9.0" in reason


def test_the_compiled_kernels_come_first(gpu, monkeypatch):
    monkeypatch.setattr(native, "CUDA_ARCHITECTURES", "9.0")
    assert registry.choose(_call()) == (native.CUDA, None)
    assert registry.choose(_call(), "triton") == (TRITON, "asked for by name")


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"_IS_INSTALLED": False}, "Triton is not installed"),
        ({"_IS_INTERPRETED": True}, "TRITON_INTERPRET=1 makes Triton interpret"),
        ({"capability": (7, 5)}, "Triton compiles for GPUs from 8.0 on, and this one is 7.5"),
    ],
    ids=["installed", "interpreted", "capability"],
)
def test_otherwise_torch_serves_and_the_reason_says_why(gpu, monkeypatch, changed, reason):
    monkeypatch.setattr(native, "CUDA_ARCHITECTURES", "")
    for name, value in changed.items():
        monkeypatch.setattr(gpu if name == "capability" else backend, name, value)
    chosen, why = registry.choose(_call())
    assert chosen is aten.TORCH and reason in why
    with pytest.raises(ValueError, match=reason):
        registry.choose(_call(), "triton")


def test_tensors_of_other_devices_are_not_its_own(gpu):
    assert TRITON.why_not(_call(input=torch.zeros(4, 3))) == "the Triton kernels take no cpu tensors"


def test_an_amd_gpu_has_no_compute_capability_to_ask_for(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    gpu.capability = (6, 0)
    assert TRITON.why_not(_call()) is None


STATES = {"no: Triton is not installed": (False, False), "yes: interpreted on the CPU": (True, True)}


@pytest.mark.parametrize("start", STATES)
def test_info_says_what_is_missing(monkeypatch, start):
    installed, interpreted = STATES[start]
    monkeypatch.setattr(backend, "_IS_INSTALLED", installed)
    monkeypatch.setattr(backend, "_IS_INTERPRETED", interpreted)
    assert fastbn.info()["runs here"]["triton"].startswith(start)


def test_importing_fastbn_imports_no_triton():
    code = "import sys, fastbn; fastbn.info(); sys.exit('triton' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def _meta(*shape, dtype=torch.bfloat16, memory_format=torch.contiguous_format):
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def test_explain_shows_the_plan_of_a_small_tensor(monkeypatch):
    monkeypatch.setattr(backend, "_IS_INSTALLED", True)
    plan = fastbn.explain(_meta(32, 256, 14, 14), backend="triton")
    assert (plan.backend, plan.kernel, plan.launches, plan.blocks) == ("triton", "resident_channels", 1, 256)
    assert (plan.tensor_reads, plan.tensor_writes) == (1, 1)
    plan = fastbn.explain(_meta(8, 256, 8, 8, memory_format=torch.channels_last), "backward", backend="triton")
    assert (plan.kernel, plan.launches, plan.tensor_reads, plan.tensor_writes) == ("split_rows", 3, 4, 1)
    assert "not measured on a GPU yet" in plan.reason


@pytest.mark.parametrize("device", ["a100", "h200"])
def test_explain_plans_for_a_gpu_that_is_not_here(monkeypatch, device):
    monkeypatch.setattr(backend, "_IS_INSTALLED", True)
    x = _meta(128, 64, 56, 56)
    plan = fastbn.explain(x, activation="relu", residual=True, device=device, backend="triton")
    assert plan.backend == "triton" and plan.reason.startswith(f"planned for {device}")
    assert plan.tensor_reads == 3 and plan.tensor_writes == 1 + 1 / 16
    evaluated = fastbn.explain(x, training=False, device=device, backend="triton")
    assert (evaluated.launches, evaluated.tensor_reads, evaluated.tensor_writes) == (1, 1, 1)


def test_the_plans_of_backward_with_frozen_statistics():
    options = dict(training=False, activation="relu", device="h200", backend="triton")
    for shape in ((128, 64, 56, 56), (4, 64, 8, 8)):
        plan = fastbn.explain(_meta(*shape), "backward", **options)
        assert (plan.launches, plan.tensor_reads, plan.tensor_writes) == (1, 2, 1)


def test_only_backends_of_gpus_plan_for_one():
    with pytest.raises(ValueError, match="backend: expected one that plans for a device, got 'cpu'"):
        fastbn.explain(_meta(4, 3), device="h200", backend="cpu")


def test_the_schemas_are_those_of_the_compiled_ops():
    for name in native.contract.OPS:
        spaces = torch.ops.fastbn_triton, torch.ops.fastbn
        ours, theirs = (str(getattr(space, name).default._schema) for space in spaces)
        assert ours == theirs.replace("fastbn::", "fastbn_triton::")
