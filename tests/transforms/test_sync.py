"""fastbn.convert(model, sync=True) and the way back. tests/nn/sync_checks.py runs such models in several processes."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastbn
from fastbn.nn.folded import FoldedBatchNorm
from tests.stock import assert_same, normal, step


def _types(model):
    return [type(module) for module in model]


def _stock():
    return nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm2d(5), nn.BatchNorm3d(5), nn.SyncBatchNorm(5))


def test_there_and_back():
    model, group = _stock(), object()
    before = [(type(module), set(vars(module))) for module in model]
    parameters = list(model.parameters())
    fastbn.convert(model, sync=True, process_group=group)
    assert _types(model) == [fastbn.SyncBatchNorm] * 4
    assert all(module.process_group is group for module in model)
    assert list(model.state_dict()) == list(_stock().state_dict())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    fastbn.convert(model, sync=True)  # they stay, with their group
    assert all(module.process_group is group for module in model)
    fastbn.convert(model)
    assert _types(model) == [fastbn.SyncBatchNorm] * 4
    fastbn.revert(model)
    assert [(type(module), set(vars(module))) for module in model] == before


def test_from_fastbn_layers_and_without_sync():
    model = nn.Sequential(fastbn.BatchNorm2d(3, activation="relu"), fastbn.SyncBatchNorm(3), nn.SyncBatchNorm(3))
    assert _types(fastbn.convert(copy.deepcopy(model))) == [fastbn.BatchNorm2d] + [fastbn.SyncBatchNorm] * 2
    fastbn.convert(model, sync=True)
    assert _types(model) == [fastbn.SyncBatchNorm] * 3 and model[0].activation == "relu"
    with pytest.raises(ValueError, match="revert: expected modules without an activation, got 0: relu"):
        fastbn.revert(model)
    model[0].activation = None
    assert _types(fastbn.revert(model)) == [nn.BatchNorm2d, nn.SyncBatchNorm, nn.SyncBatchNorm]


def test_copies_remember_what_they_were():
    model = fastbn.convert(_stock(), sync=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert _types(fastbn.revert(other)) == _types(_stock())


def test_reverted_for_a_tool():
    model = fastbn.convert(_stock(), sync=True)
    with fastbn.reverted(model):
        assert _types(model) == _types(_stock())
    assert _types(model) == [fastbn.SyncBatchNorm] * 4
    assert _types(fastbn.revert(model)) == _types(_stock())


def test_torchs_own_conversion_afterwards():
    """It replaces fastbn's layers by torch's, as any BatchNorm; `convert` brings them back."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(fastbn.convert(_stock(), sync=True))
    assert _types(model) == [nn.SyncBatchNorm] * 4
    assert _types(fastbn.convert(model)) == [fastbn.SyncBatchNorm] * 4
    assert _types(fastbn.SyncBatchNorm.convert_sync_batchnorm(_stock())) == [fastbn.SyncBatchNorm] * 4


def test_layers_that_stay_local_are_named():
    class Mine(nn.BatchNorm2d):
        pass

    model = nn.Sequential(Mine(3), fastbn.BatchRenorm2d(3), nn.BatchNorm2d(3), nn.InstanceNorm2d(3))
    with pytest.warns(UserWarning, match=r"statistics of 0 \(Mine\), 1 \(BatchRenorm2d\) are not synchronised"):
        fastbn.convert(model, sync=True)
    assert type(model[2]) is fastbn.SyncBatchNorm
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastbn.convert(_stock(), sync=True)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_is_refused_changes_nothing():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="expected layers that know their channels for sync=True, got Lazy.* at 1"):
        fastbn.convert(model, sync=True)
    with pytest.raises(ValueError, match="expected sync=True beside a process_group, got sync=False"):
        fastbn.convert(model, process_group=object())
    assert _types(model) == [nn.BatchNorm2d, nn.LazyBatchNorm2d]


def test_freezing_and_folding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)).double()
    model(normal(4, 3, 2, 2))
    twin = fastbn.convert(copy.deepcopy(model), sync=True)
    x = normal(4, 3, 2, 2)
    fastbn.freeze(model)
    fastbn.freeze(twin)
    assert type(twin[1]) is fastbn.FrozenBatchNorm2d
    assert_same(step(twin, x, x[:, :1].expand(4, 5, 2, 2)), step(model, x, x[:, :1].expand(4, 5, 2, 2)))
    assert type(fastbn.unfreeze(twin)[1]) is fastbn.SyncBatchNorm
    twin.eval()
    expected, folded = twin(x), fastbn.fold(twin)
    assert type(folded[1]) is FoldedBatchNorm
    torch.testing.assert_close(folded(x), expected)
    with pytest.raises(ValueError, match="freeze: expected layers of known dimensions, got fastbn.SyncBatchNorm at 0"):
        fastbn.freeze(nn.Sequential(fastbn.SyncBatchNorm(3)))


def test_checkpoint_safety_and_fusion_stay():
    model = fastbn.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), sync=True, checkpoint_safe=True)
    assert isinstance(model[0], fastbn.SyncBatchNorm)
    assert [layer.outcome for layer in fastbn.transforms.report(model).layers] == ["fused with relu"]
    copied = copy.deepcopy(model)
    assert type(copied[0]) is type(model[0])
    assert _types(fastbn.revert(model)) == [nn.BatchNorm2d, nn.ReLU]


SAFE = pytest.mark.parametrize("safe", [False, True], ids=["", "checkpoint_safe"])


def _frozen(safe):
    """Return a frozen model that was synchronised, what its layer was, and a function that checks that it is frozen."""
    model = fastbn.convert(nn.Sequential(nn.BatchNorm2d(3)), sync=True, process_group=7, checkpoint_safe=safe)
    was = type(model[0])
    fastbn.freeze(model)

    def check():
        before = copy.deepcopy(model.state_dict())
        model.train()(normal(4, 3, 2, 2, dtype=torch.float32))
        assert type(model[0]) is fastbn.FrozenBatchNorm2d and not model[0].weight.requires_grad
        assert_same(dict(model.state_dict()), dict(before), rtol=0, atol=0)

    return model, was, check


def _assert_unfrozen(model, was):
    fastbn.unfreeze(model)
    assert type(model[0]) is was and model[0].process_group == 7 and model[0].weight.requires_grad
    fastbn.revert(model)
    assert type(model[0]) is nn.BatchNorm2d and set(vars(model[0])) == set(vars(nn.BatchNorm2d(3)))


@SAFE
def test_frozen_layers_stay_frozen_when_it_is_reverted(safe):
    model, was, check = _frozen(safe)
    fastbn.revert(model)
    check()
    _assert_unfrozen(model, was)


@SAFE
def test_freezing_twice_is_freezing_once(safe):
    model, was, check = _frozen(safe)
    fastbn.freeze(model)
    check()
    _assert_unfrozen(model, was)


@SAFE
def test_frozen_layers_are_frozen_for_a_tool(safe):
    model, was, check = _frozen(safe)
    with fastbn.reverted(model):
        check()
    check()
    _assert_unfrozen(model, was)


def test_a_layer_with_another_class_keeps_it():
    model = fastbn.convert(nn.Sequential(nn.BatchNorm2d(3)), sync=True)
    model[0].__class__ = fastbn.BatchRenorm2d
    assert _types(fastbn.freeze(fastbn.revert(model))) == [fastbn.BatchRenorm2d]
