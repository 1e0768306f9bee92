"""Drawn calls agree with stock torch and with extended precision; and the fuzzer sees faults that are planted."""

from __future__ import annotations

import os
import secrets

import pytest
import torch

from fastbn import functional
from fastbn.backends import native
from fastbn.ops.activations import index as activation_index
from tests import implementations
from tests.fuzz.case import Case, Layout
from tests.fuzz.check import FaultyCase, check
from tests.fuzz.run import run

CASES = 500


@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        *(pytest.param(name, marks=implementations.marks(name)) for name in implementations.TRITON_LIMITS),
    ],
)
def test_drawn_cases(implementation, capsys, record_property):
    seed = int(os.environ.get("FASTBN_FUZZ_SEED") or secrets.randbelow(2**32))
    record_property("FASTBN_FUZZ_SEED", seed)
    with capsys.disabled():
        print(f"\nFASTBN_FUZZ_SEED={seed}")
    summary = run(CASES, seed, implementation)
    assert not summary.found, f"FASTBN_FUZZ_SEED={seed}\n{summary.text()}"


def test_the_cases_of_a_seed_are_the_same_for_any_number_of_processes(monkeypatch):
    monkeypatch.setattr("tests.fuzz.run.BATCH", 4)

    def drawn(share):
        found = []
        run(14, seed=3, max_numel=64, before_case=found.append, share=share)
        return found

    whole, halves = drawn((0, 1)), (drawn((0, 2)), drawn((1, 2)))
    assert len(whole) == 14 and all(halves)
    assert sorted(map(repr, [*halves[0], *halves[1]])) == sorted(map(repr, whole))


def _wrong_momentum(op, *arguments):
    *rest, momentum, eps, activation, save_mask, param = arguments
    return op(*rest, momentum and 1.001 * momentum, eps, activation, save_mask, param)


def _wrong_sign_of_silu(op, *arguments):
    grad_input, *rest = op(*arguments)
    return (-grad_input if arguments[9] == activation_index("silu") else grad_input), *rest


def _always_contiguous(op, *arguments):
    output, *rest = op(*arguments)
    return output.contiguous(), *rest


def _wrong_last_element(op, *arguments):
    output, *rest = op(*arguments)
    if output.dim() == 4 and output.numel() % 8:
        output[-1, -1, -1, -1] = 0.5
    return output, *rest


def _a_few_ulp(op, *arguments):
    output, *rest = op(*arguments)
    return output * (1 + 16 * torch.finfo(output.dtype).eps), *rest


def _depends_on_threads(op, *arguments):
    grads = op(*arguments)
    if grads[1].numel():
        grads[1][0] *= 1 + torch.finfo(grads[1].dtype).eps * torch.get_num_threads()
    return grads


def _moves_the_counter_before_it_refuses(op, *arguments):
    if arguments[6] is not None:
        arguments[6].add_(1)
    results = op(*arguments)
    if arguments[6] is not None:
        arguments[6].sub_(1)
    return results


def _bumps_the_version(op, *arguments):
    if arguments[4] is not None:
        torch._C._autograd._unsafe_set_version_counter((arguments[4],), (arguments[4]._version + 1,))
    return op(*arguments)


PLANTED = {
    "wrong momentum": ("batch_norm_train", _wrong_momentum, "inexact: running_mean"),
    "wrong sign": ("batch_norm_backward", _wrong_sign_of_silu, "inexact: gradient of input"),
    "output format": ("batch_norm_train", _always_contiguous, "strides: output"),
    "last element": ("batch_norm_train", _wrong_last_element, "inexact: output"),
    "few ulp": ("batch_norm_train", _a_few_ulp, "worse than stock: output"),
    "threads": ("batch_norm_backward", _depends_on_threads, "not reproducible: gradient of weight"),
    "counter": ("batch_norm_train", _moves_the_counter_before_it_refuses, "changed: num_batches_tracked"),
    "version": ("batch_norm_train", _bumps_the_version, "version: running_mean"),
}


@pytest.fixture
def plant(monkeypatch):
    def plant(name: str) -> str:
        op, wrong, kind = PLANTED[name]
        right = getattr(native.CPU.ops, op)
        monkeypatch.setattr(functional, "NODE", None)  # which calls the ops past Python
        monkeypatch.setattr(native.CPU.ops, op, lambda *arguments: wrong(right, *arguments))
        return kind

    return plant


def _counts() -> dict[str, int]:
    return {kind: found.count for kind, found in run(150, seed=0, max_numel=256, shrunk_kinds=0).found.items()}


@pytest.fixture(scope="module")
def without():
    return _counts()


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(name, without, plant):
    kind = plant(name)

    def count(counts):  # a case with a hook on saved tensors counts too
        return counts.get(kind, 0) + counts.get(f"{kind}, with a hook", 0)

    assert count(_counts()) > count(without)


def test_a_fault_is_shrunk_and_its_code_shows_it(plant):
    kind = plant("wrong momentum")
    case = run(50, seed=0, max_numel=256, shrunk_kinds=8).found[kind].case  # other kinds are found too
    assert case.activation is None and case.layout == Layout()
    with pytest.raises(FaultyCase, match=kind):
        exec(case.code(), {})


def test_the_simplest_cases():
    assert check(Case()) == "agreed"
    assert check(Case(shape=(1, 1))) == "refused by both"
