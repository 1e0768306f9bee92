"""fastbn.SyncBatchNorm in one process, on each backend, and in two and four processes (tests/nn/sync_checks.py)."""

from __future__ import annotations

import copy
import doctest
import inspect
import pickle
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import fastbn
from fastbn import _torch
from fastbn.autograd import statistics
from fastbn.autograd.statistics import Settings
from fastbn.backends import registry
from fastbn.nn.sync import Group, Synchronize, merged
from fastbn.ops.activations import index as activation_index
from tests import implementations, processes
from tests.nn import sync_checks
from tests.nn.sync_checks import layer_of
from tests.stock import CHANNELS, SHAPES, assert_same, normal, pair, step

BACKENDS = ("reference", "cpu", "emulator", "triton")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Return what each check came to in two processes."""
    return processes.run(sync_checks.ALL, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    name = "groups_that_are_subsets"
    checks = {name: sync_checks.SLOW[name], **sync_checks.ALL}
    return processes.run(checks, 4, tmp_path_factory.mktemp("four"))


def _assert_passed(results, check):
    texts = results[check]
    if check == "a_rank_that_dies":
        assert texts[0] is None
        texts = texts[1:]
    processes.assert_passed(texts)


@pytest.mark.parametrize("check", sync_checks.ALL)
def test_in_two_processes(two, check):
    _assert_passed(two, check)


@pytest.mark.slow
@pytest.mark.parametrize("check", [*sync_checks.ALL, "groups_that_are_subsets"])
def test_in_four_processes(four, check):
    _assert_passed(four, check)


@pytest.mark.slow
def test_compiled_by_inductor(tmp_path):
    processes.assert_passed(processes.run({"inductor": sync_checks.SLOW["inductor"]}, 2, tmp_path)["inductor"])


@pytest.mark.slow
def test_a_rank_that_does_not_come(tmp_path):
    name = "a_rank_that_does_not_come"
    results = processes.run({name: sync_checks.SLOW[name]}, 2, tmp_path, timeout=timedelta(seconds=4))
    processes.assert_passed(results[name])


@pytest.mark.parametrize("counts", [(3, 4), (1, 0, 6), (0, 5), (2, 2, 2), (0, 0)], ids=str)
@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (1e4, 1e-2), (-3e150, 1e150)], ids=str)
def test_merged_moments_are_those_of_all_elements(counts, mean, std):
    parts = [normal(count, CHANNELS, seed=seed) * std + mean for seed, count in enumerate(counts)]
    vectors = []
    for part in parts:
        own = torch.zeros(2, CHANNELS) if len(part) == 0 else torch.stack([part.mean(0), part.var(0, correction=0)])
        vectors.append(torch.cat([own.flatten().double(), torch.tensor([len(part)], dtype=torch.float64)]))
    moments, whole = merged(torch.stack(vectors)), torch.cat(parts)
    assert moments.elements.item() == len(whole)
    if len(whole):
        assert moments.var.isfinite().all()
        # A few roundings of the mean, relative to the standard deviation, and of the variance.
        torch.testing.assert_close(moments.mean, whole.mean(0), rtol=1e-15, atol=1e-15 * std)
        steepness = abs(mean) / std
        torch.testing.assert_close(moments.var, whole.var(0, correction=0), rtol=1e-14 * (1 + steepness), atol=0)
    else:
        assert not moments.mean.any() and not moments.var.any()


@pytest.mark.parametrize("counts", [(0, 3, 4), (1, 4, 0), (2, 8, 0), (1, 5, 1), (3, 9, 5)], ids=str)
@pytest.mark.parametrize("value", [0.1, 0.7, 1e4 / 3, 1e30])
def test_the_mean_of_a_constant_channel_is_the_constant(value, counts):
    """The sum of shares of the constant is not, for 0.1 and most of these counts."""
    vectors = [[value if count else 0.0, 0.0, float(count)] for count in counts]
    mean, var, elements = merged(torch.tensor(vectors, dtype=torch.float64))
    assert mean.item() == value and var.item() == 0 and elements.item() == sum(counts)


@pytest.fixture(params=[pytest.param(name, marks=implementations.marks(name)) for name in BACKENDS])
def backend(request):
    if request.param in ("emulator", "triton"):
        implementations.load(request.param)
    return registry.get(request.param)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 7), (3, 5, 4, 6), (2, 3, 2, 3, 4)], ids=str)
def test_each_backend(backend, shape, activation, monkeypatch):
    """Two ranks that one process plays: it asks each for what it sends, and runs again with the answers."""
    x, residual, grad_out = (normal(*shape, seed=seed) for seed in range(3))
    weight, bias = (normal(shape[1], seed=seed).requires_grad_() for seed in (8, 9))
    parts = slice(0, 1), slice(1, None)
    sent: dict[str, list[torch.Tensor]] = {"gather": [], "reduce": []}
    answers: dict[str, torch.Tensor] = {}

    def collective(name, own):
        def call(tensor, *group):
            sent[name].append(tensor)
            return answers.get(name, own(tensor))

        return call

    monkeypatch.setattr(_torch, "all_gather", collective("gather", lambda vector: torch.cat([vector, vector])))
    monkeypatch.setattr(_torch, "all_reduce", collective("reduce", lambda tensor: tensor))

    def run():
        results = []
        for rank, rows in enumerate(parts):
            hooks = Synchronize(Group("played", 2, rank))
            given = [t[rows].detach().requires_grad_() for t in (x, residual)] + [weight, bias]
            settings = Settings(hooks, 1e-5, activation_index(activation), None, backend)
            output, _ = statistics.batch_norm(*given, settings)
            results.append([output, *torch.autograd.grad(output, given, grad_out[rows])])
        return results

    run()
    answers["gather"] = torch.cat(sent["gather"])
    sent["reduce"].clear()
    run()
    answers["reduce"] = sum(sent["reduce"])
    output, grad_input, grad_residual, grad_weight, grad_bias = zip(*run(), strict=True)

    layer = fastbn.SyncBatchNorm(shape[1], dtype=torch.float64)
    layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    right = sync_checks.Expected(layer, x, residual, grad_out, activation)
    check = sync_checks.assert_close_to_reference
    check(torch.cat(output), right.output, right.allowed_output, "output")
    check(torch.cat(grad_input), right.grad_input, right.allowed_grad_input, "grad of input")
    check(torch.cat(grad_residual), right.grad_residual, right.allowed_grad_z, "grad of residual")
    check(sum(grad_weight), right.grad_parameters[0], right.allowed_parameters, "grad of weight")
    check(sum(grad_bias), right.grad_parameters[1], right.allowed_parameters, "grad of bias")


@pytest.mark.parametrize("dim", SHAPES)
def test_without_a_process_group_it_is_batch_norm(dim):
    stock, fast = pair(dim)
    layer = layer_of(activation="relu")
    fast = type(fast)(CHANNELS, dtype=torch.float64, activation="relu")
    fast.load_state_dict(layer.state_dict())
    x, grad_out = normal(*SHAPES[dim]), normal(*SHAPES[dim], seed=1)
    for training in (True, False):
        results = [step(module.train(training), x, grad_out, x) for module in (layer, fast)]
        assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in results), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), fast.buffers(), strict=True))


def test_arguments_and_state_are_torchs():
    stock = nn.SyncBatchNorm(5, 1e-3, None, True, True, None, "cpu", torch.float64)
    layer = fastbn.SyncBatchNorm(5, 1e-3, None, True, True, None, "cpu", torch.float64)
    assert_same(dict(layer.state_dict()), dict(stock.state_dict()))
    assert (layer.eps, layer.momentum, layer.process_group) == (1e-3, None, None)
    names = list(inspect.signature(fastbn.SyncBatchNorm).parameters)
    assert names == [*inspect.signature(nn.SyncBatchNorm).parameters, "activation", "activation_param", "save"]
    for options in ({"affine": False}, {"track_running_stats": False}):
        ours, theirs = (cls(3, **options).state_dict() for cls in (fastbn.SyncBatchNorm, nn.SyncBatchNorm))
        assert ours.keys() == theirs.keys()
    assert "activation='relu'" in repr(fastbn.SyncBatchNorm(3, activation="relu"))


def test_it_refuses_what_torch_refuses():
    for cls in (fastbn.SyncBatchNorm, nn.SyncBatchNorm):
        for x, message in (
            (torch.zeros(3), r"expected at least 2D input \(got 1D input\)"),
            (torch.zeros(3, 0), "SyncBatchNorm number of input channels should be non-zero"),
            (torch.zeros(1, 3), "Expected more than 1 value per channel when training"),
        ):
            with pytest.raises(ValueError, match=message):
                cls(3)(x)


def test_it_works_with_what_surrounds_a_layer():
    layer = layer_of()
    x = normal(*SHAPES[2])
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fx.symbolic_trace(nn.Sequential(layer.eval()))]
    assert [node.op for node in others[-1].graph.nodes] == ["placeholder", "call_module", "output"]
    layer.eval()
    for other in others:
        torch.testing.assert_close(other.eval()(x), layer(x))
    with pytest.raises(TypeError, match="expected layers with a form in TorchScript, got SyncBatchNorm"):
        torch.jit.script(layer)


def test_the_example_of_the_docs():
    page = (Path(__file__).resolve().parents[2] / "docs" / "variants.md").read_text()
    section = page[page.index("## SyncBatchNorm") :].split("\n## ")[0]
    example = doctest.DocTestParser().get_doctest(section, {}, "variants.md", None, None)
    assert len(example.examples) >= 4 and doctest.DocTestRunner().run(example).failed == 0
