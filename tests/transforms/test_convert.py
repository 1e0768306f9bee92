"""fastbn.convert and fastbn.revert change the class of a module and nothing else."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastbn.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from fastbn.transforms import report
from fastbn.transforms.convert import convert, revert
from tests.transforms.fused import recorded_calls

PAIRS = [
    (nn.BatchNorm1d, BatchNorm1d, (5, 3)),
    (nn.BatchNorm2d, BatchNorm2d, (5, 3, 4, 2)),
    (nn.BatchNorm3d, BatchNorm3d, (5, 3, 2, 3, 2)),
]


def small_net():
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=None), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 2))
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3), nn.ReLU(), block, head)


def batch_norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def images():
    return torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stock, fast, shape", PAIRS)
def test_root_module(stock, fast, shape):
    module = stock(3)
    assert convert(module) is module
    assert type(module) is fast
    assert module(torch.randn(shape)).shape == shape
    assert revert(module) is module
    assert type(module) is stock
    assert module(torch.randn(shape)).shape == shape


def test_nested_modules_and_settings():
    net = convert(small_net())
    assert [type(m) for m in batch_norms(net)] == [BatchNorm2d, BatchNorm2d, BatchNorm1d]
    assert [m.eps for m in batch_norms(net)] == [1e-3, 1e-5, 1e-5]
    assert [m.momentum for m in batch_norms(net)] == [0.1, None, 0.1]
    assert all(m.activation is None for m in batch_norms(net))
    revert(net)
    assert [type(m) for m in batch_norms(net)] == [nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm1d]


def test_idempotent():
    net = convert(convert(small_net()))
    assert [type(m) for m in batch_norms(net)] == [BatchNorm2d, BatchNorm2d, BatchNorm1d]
    revert(revert(net))
    assert [type(m) for m in batch_norms(net)] == [nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm1d]


def test_shared_module_stays_shared():
    shared = nn.BatchNorm2d(3)
    net = convert(nn.Sequential(shared, nn.ReLU(), shared))
    assert net[0] is net[2] is shared
    assert type(shared) is BatchNorm2d


def test_model_without_batch_norm():
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert revert(convert(net)) is net


@pytest.mark.parametrize("swap", [convert, revert])
def test_state_dict_keeps_keys_storage_and_metadata(swap):
    net = small_net() if swap is convert else convert(small_net())
    before = net.state_dict()
    after = swap(net).state_dict()
    assert list(after) == list(before)
    assert [t.data_ptr() for t in after.values()] == [t.data_ptr() for t in before.values()]
    assert after._metadata == before._metadata


def test_optimiser_keeps_its_parameters():
    net = small_net()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    convert(net)
    assert [id(p) for p in optimiser.param_groups[0]["params"]] == [id(p) for p in net.parameters()]
    before = [p.detach().clone() for p in net.parameters()]
    net(images()).square().sum().backward()
    optimiser.step()
    moved = {name: not torch.equal(p, q) for (name, p), q in zip(net.named_parameters(), before)}
    assert moved["1.weight"] and moved["3.1.bias"]


def test_training_flags_and_requires_grad_stay():
    net = small_net()
    net[3].eval()
    net[1].weight.requires_grad_(False)
    flags = [m.training for m in net.modules()]
    convert(net)
    assert [m.training for m in net.modules()] == flags
    assert not net[1].weight.requires_grad
    revert(net)
    assert [m.training for m in net.modules()] == flags


def test_hooks_stay():
    net, calls = small_net(), []
    net[1].register_forward_pre_hook(lambda *_: calls.append("pre"))
    net[1].register_forward_hook(lambda *_: calls.append("forward"))
    net[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    convert(net)(images()).sum().backward()
    assert calls == ["pre", "forward", "backward"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("training", [True, False])
def test_copies_of_a_converted_model(copied, training):
    net = convert(small_net()).train(training)
    twin = copied(net)
    assert [type(m) for m in twin.modules()] == [type(m) for m in net.modules()]
    assert batch_norms(twin)[0].weight is not batch_norms(net)[0].weight
    torch.testing.assert_close(twin(images()), net(images()), rtol=0, atol=0)


def test_checkpoints_load_across(tmp_path):
    stock, fast = small_net(), convert(small_net())
    for source, target in [(stock, fast), (fast, stock)]:
        source.train()(images())
        torch.save(source.state_dict(), tmp_path / "checkpoint.pt")
        target.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=True)
        torch.testing.assert_close(target.eval()(images()), source.eval()(images()))


def test_checkpoint_from_before_num_batches_tracked():
    state = small_net().state_dict()
    state = {key: value for key, value in state.items() if "num_batches_tracked" not in key}
    net = convert(small_net())
    net[1].num_batches_tracked.fill_(7)
    net.load_state_dict(state, strict=True)
    assert net[1].num_batches_tracked.dtype == torch.int64


def test_subclasses_are_left_alone():
    class Mine(nn.BatchNorm2d):
        pass

    class MineOnFast(BatchNorm2d):
        pass

    net = nn.Sequential(Mine(3), MineOnFast(3), nn.InstanceNorm2d(3))
    types = [type(m) for m in net]
    assert [type(m) for m in convert(net)] == types
    assert [type(m) for m in revert(net)] == types


def test_parametrised_module_is_left_alone():
    norm = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    parametrised = type(norm)
    assert type(convert(norm)) is parametrised


LAZY = [
    (nn.LazyBatchNorm1d, LazyBatchNorm1d, BatchNorm1d, (5, 3)),
    (nn.LazyBatchNorm2d, LazyBatchNorm2d, BatchNorm2d, (5, 3, 4, 2)),
    (nn.LazyBatchNorm3d, LazyBatchNorm3d, BatchNorm3d, (5, 3, 2, 3, 2)),
]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("stock, fast, ready, shape", LAZY)
def test_lazy_modules(stock, fast, ready, shape):
    module = stock(eps=0.1)
    assert report(module).layers[0].reason == "not converted"
    assert type(convert(module)) is fast and type(revert(module)) is stock
    twin = stock(eps=0.1)
    x = torch.randn(shape)
    torch.testing.assert_close(convert(module)(x), twin(x))
    assert type(module) is ready and type(revert(module)) is type(twin) and vars(module).keys() == vars(twin).keys()
    assert type(convert(module)) is ready


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_follows_a_lazy_module_is_fused_from_its_second_call_on():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.relu = nn.LazyBatchNorm2d(), nn.ReLU()

        def forward(self, x):
            return self.relu(self.norm(x) + x)

    net, twin = (nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU(), Block()) for _ in range(2))
    convert(net)
    for expected in (["", ""], ["relu", "add+relu"]):
        with recorded_calls() as calls:
            torch.testing.assert_close(net(images()), twin(images()))
        assert calls == expected
    assert [type(m) for m in revert(net).modules()] == [type(m) for m in twin.modules()]


def test_revert_names_fused_modules_and_changes_nothing():
    net = convert(small_net())
    net[3][1].activation = "relu"
    with pytest.raises(ValueError, match=r"revert: expected modules without an activation, got 3\.1: relu$"):
        revert(net)
    assert all(type(m).__module__.startswith("fastbn") for m in batch_norms(net))
    net[3][1].activation = None
    revert(net)
    assert not any("activation" in vars(m) for m in batch_norms(net))


def test_revert_names_the_root():
    norm = convert(nn.BatchNorm2d(3))
    norm.activation = "silu"
    with pytest.raises(ValueError, match="the model itself"):
        revert(norm)


@pytest.mark.parametrize("swap", [convert, revert])
def test_only_modules(swap):
    with pytest.raises(TypeError, match=f"{swap.__name__}: expected a torch.nn.Module, got dict"):
        swap({})
