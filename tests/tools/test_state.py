"""What keeps, moves or makes a model: checkpoints, processes, devices, averages."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import skip_init

import fastbn
from tests.packages import needs
from tests.stock import assert_same
from tests.tools.models import images, layers, pair, step


def test_load_state_dict_strict_both_ways():
    stock, fast = pair()
    for source, target in ((stock, fast), (fast, stock)):
        fresh = copy.deepcopy(target)
        for tensor in fresh.state_dict().values():
            tensor.zero_()
        assert not any(fresh.load_state_dict(source.state_dict(), strict=True))
        assert_same(dict(fresh.state_dict()), dict(source.state_dict()))
    fast.load_state_dict(stock.state_dict(), assign=True)
    assert fast[0].bn1.running_mean.data_ptr() == stock[0].bn1.running_mean.data_ptr()
    torch.testing.assert_close(fast.eval()(images()), stock.eval()(images()))


@needs("safetensors")
def test_safetensors(tmp_path):
    import safetensors.torch

    stock, fast = pair()
    safetensors.torch.save_model(fast, str(tmp_path / "model.safetensors"))
    for tensor in stock.state_dict().values():
        tensor.zero_()
    safetensors.torch.load_model(stock, str(tmp_path / "model.safetensors"))
    assert_same(dict(stock.state_dict()), dict(fast.state_dict()))


def test_distributed_checkpoint(tmp_path):
    from torch.distributed import checkpoint

    stock, fast = pair()
    expected = copy.deepcopy(dict(fast.state_dict()))
    checkpoint.save(fast.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state = {key: torch.zeros_like(value) for key, value in stock.state_dict().items()}
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert_same(state, expected)


def _evaluate(queue, model, x):
    torch.set_num_threads(1)
    queue.put(model(x).detach().numpy())


@pytest.mark.slow
def test_spawned_process():
    _, fast = pair()
    fast.eval()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_evaluate, args=(queue, fast, images()))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    torch.testing.assert_close(torch.from_numpy(queue.get()), fast(images()).detach())


def test_shared_memory():
    _, fast = pair()
    expected = copy.deepcopy(fast)(images())
    assert all(tensor.is_shared() for tensor in fast.share_memory().state_dict().values())
    torch.testing.assert_close(fast(images()), expected)


def test_meta_device_and_to_empty():
    stock, fast = pair()
    with torch.device("meta"):
        empty = fastbn.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
        assert empty(torch.empty(2, 3, 4, 4)).shape == (2, 4, 4, 4)
    moved = copy.deepcopy(fast).to("meta").to_empty(device="cpu")
    moved.load_state_dict(stock.state_dict())
    assert_same(step(moved, images()), step(stock, images()))


def test_skip_init():
    layer = skip_init(fastbn.BatchNorm2d, 5, eps=0.1, activation="relu")
    assert layer.weight.device.type == "cpu" and layer.activation == "relu" and vars(layer)["eps"] == 0.1


def test_average_of_weights_and_update_bn():
    averages = []
    for model in pair():
        average = torch.optim.swa_utils.AveragedModel(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        average.update_parameters(model)
        torch.optim.swa_utils.update_bn([images(), 2 * images() + 1], average)
        averages.append(dict(average.state_dict()))
    assert_same(averages[1], averages[0])


def test_exponential_average():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    averages = []
    for model in pair():
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        for _ in range(2):
            model(images())
            average.update_parameters(model)
        averages.append(dict(average.state_dict()))
    assert_same(averages[1], averages[0])


def test_weight_decay_and_initialisation_by_isinstance():
    """User code that treats BatchNorm apart knows fastbn's layers, with an activation and without."""
    _, fast = pair()
    fast.append(fastbn.BatchNorm1d(2, activation="relu"))
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    without_decay = {id(p) for m in fast.modules() if isinstance(m, norms) for p in m.parameters(recurse=False)}
    assert len(without_decay) == 6
    for module in fast.modules():
        if isinstance(module, norms):
            nn.init.constant_(module.weight, 2.0)
            module.eval()
    assert layers(fast)[0].weight.eq(2).all() and not fast[-1].training and fast[-1].weight.eq(2).all()


def test_names_of_classes():
    """Libraries that match the name of a class, and those that print models, see torch's names."""
    for stock, fast in zip(*map(layers, pair()), strict=True):
        assert type(fast).__name__ == type(stock).__name__ and repr(fast) == repr(stock)
