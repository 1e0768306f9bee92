"""What changes or watches a training step: hooks, mixed precision, checkpoints, processes, parametrisations."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fastbn
from tests.stock import assert_same
from tests.tools.models import images, layers, pair, step


@pytest.fixture
def one_process(tmp_path):
    """A group of one process, by gloo."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _same_steps(models, x=None, **tolerance):
    stock, fast = models
    x = images() if x is None else x
    for _ in range(2):
        assert_same(step(fast, x), step(stock, x), **tolerance)


def test_hooks():
    seen = []
    for model in pair():
        calls, layer = [], layers(model)[0]
        layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        layer.register_forward_hook(lambda m, args, output, calls=calls: calls.append(output.mean().item()))
        layer.register_full_backward_pre_hook(lambda m, grad, calls=calls: calls.append(grad[0].norm().item()))
        layer.register_full_backward_hook(lambda m, grad_in, grad, calls=calls: calls.append(grad_in[0].norm().item()))
        calls.append(step(model, images())["output"].norm().item())
        seen.append(calls)
    assert len(seen[0]) == 4
    torch.testing.assert_close(seen[1], seen[0])


def test_hooks_on_saved_tensors():
    models = pair()
    with torch.autograd.graph.save_on_cpu():
        _same_steps(models)


def test_anomaly_mode():
    models = pair()
    with torch.autograd.detect_anomaly(check_nan=True), warnings.catch_warnings():
        _same_steps(models)
        with pytest.raises(RuntimeError, match="returned nan values"):
            step(models[1], images() * float("nan"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    results = []
    for model in pair():
        with torch.autocast("cpu", dtype=dtype):
            output = model[0].conv1(images())
            normalised = model[0].bn1(output)
        assert normalised.dtype == output.dtype == dtype
        normalised.float().square().sum().backward()
        results.append({"output": normalised, "weight": model[0].bn1.weight.grad, **model[0].bn1.state_dict()})
    assert_same(results[1], results[0], rtol=0.02, atol=0.02)


def test_grad_scaler():
    states = []
    for model in pair():
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=64.0)
        for scale in (1.0, float("inf")):  # the second step is skipped
            loss = model(images()).square().sum() * scale
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        states.append(dict(model.state_dict()))
        assert scaler.get_scale() == 32.0
    assert_same(states[1], states[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpoint(use_reentrant):
    models = [_Checkpointed(model, use_reentrant=use_reentrant) for model in pair()]
    _same_steps(models, images().requires_grad_())


def test_selective_activation_checkpoint():
    """The policy is asked about fastbn's ops, and may keep what they return."""
    asked = []

    def policy(context, op, *args, **kwargs):
        asked.append(str(op))
        return torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    contexts = {"use_reentrant": False, "context_fn": lambda: create_selective_checkpoint_contexts(policy)}
    _same_steps([_Checkpointed(model, **contexts) for model in pair()])
    assert any("fastbn.batch_norm_train" in name for name in asked)


class _Checkpointed(nn.Module):
    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x):
        return checkpoint(self.model, x, **self.options)


def test_distributed_data_parallel(one_process):
    stock, fast = pair()
    _same_steps([nn.parallel.DistributedDataParallel(model) for model in (stock, fast)])


def test_fully_sharded_data_parallel(one_process):
    fsdp = pytest.importorskip("torch.distributed.fsdp", reason="needs torch's fully_shard")
    from torch.distributed.device_mesh import init_device_mesh

    results = []
    for model in pair():
        sharded = fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        found = step(sharded, images())
        results.append({k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in found.items()})
    assert_same(results[1], results[0])


@pytest.mark.gpu
def test_data_parallel():
    models = [nn.DataParallel(model.cuda()) for model in pair()]
    _same_steps(models, images().cuda(), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_cuda_graphs():
    _, fast = pair()
    fast, x = fast.cuda(), images().cuda()
    eager = copy.deepcopy(fast)
    graphed = torch.cuda.make_graphed_callables(fast, (x,), num_warmup_iters=3)
    eager.load_state_dict(fast.state_dict())
    assert_same(step(graphed, x), step(eager, x), rtol=1e-3, atol=1e-3)


class _Positive(nn.Module):
    def forward(self, weight):
        return nn.functional.softplus(weight)


def test_parametrisation_before_and_after_conversion():
    models = pair()
    for model in models:
        parametrize.register_parametrization(model[0].bn1, "weight", _Positive())
    assert type(models[1][0].bn1).__name__ == "ParametrizedBatchNorm2d" and isinstance(
        models[1][0].bn1, fastbn.BatchNorm2d
    )
    _same_steps(models)
    for model in models:
        parametrize.remove_parametrizations(model[0].bn1, "weight")
    assert type(models[1][0].bn1) is fastbn.BatchNorm2d
    _same_steps(models)


def test_spectral_and_weight_norm_of_neighbours():
    models = pair()
    for model in models:
        torch.manual_seed(3)
        parametrizations.spectral_norm(model[0].conv1)
        parametrizations.weight_norm(model[0].conv2)
    _same_steps(models, rtol=1e-3, atol=1e-4)


def test_pruning():
    models, x = [model.double() for model in pair()], images().double()
    for model in models:
        prune.l1_unstructured(model[0].bn1, "weight", amount=2)
        prune.ln_structured(model[0].conv2, "weight", amount=1, n=2, dim=0)
    assert models[1][0].bn1.weight.eq(0).sum() == 2
    _same_steps(models, x)
    for model in models:
        prune.remove(model[0].bn1, "weight")
    _same_steps(models, x)


def _step(optimizer):
    optimizer.step()
    optimizer.zero_grad()


def test_optimizers_in_backward():
    states = []
    for model in pair():
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p, o=optimizers: _step(o[p]))
        for _ in range(2):
            model(images()).square().sum().backward()
        states.append(dict(model.state_dict()))
    assert_same(states[1], states[0])


def test_inference_mode():
    stock, fast = (model.eval() for model in pair())
    with torch.inference_mode():
        torch.testing.assert_close(fast(images()), stock(images()))


def test_profiler_and_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in pair():
        with FlopCounterMode(display=False) as counter:
            step(model, images())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
