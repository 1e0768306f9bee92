"""fastbn.population_stats against float64 statistics of all data at once, and what it leaves as it was."""

from __future__ import annotations

import collections
import copy
import importlib.util
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbn
from fastbn.transforms import population
from tests.stock import assert_same, normal

SIZES = (4, 3, 5)  # of batches


def _data(*shape):
    """Return data whose mean drifts, in float64, and its batches."""
    x = normal(sum(SIZES), *shape) + torch.arange(float(sum(SIZES))).view(-1, *[1] * len(shape)) / 4
    return x, x.split(SIZES)


def _model(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Dropout(0.9), nn.Conv2d(4, 5, 3), norm(5)]
    return nn.Sequential(*layers).double()


def _expected(rows):
    """Return mean, unbiased variance and number of what is given as parts (N, C, *), all at once."""
    rows = torch.cat([part.transpose(0, 1).flatten(1) for part in rows], 1)
    return rows.mean(1), rows.var(1), rows.shape[1]


def _inputs(model, batches):
    """Return the inputs of both layers where each normalises by the batch, by torch's functions alone."""
    first, second = [], []
    for x in batches:
        first.append(F.conv2d(x, model[0].weight, model[0].bias))
        y = F.batch_norm(first[-1], None, None, model[1].weight, model[1].bias, True)
        second.append(F.conv2d(F.relu(y), model[4].weight, model[4].bias))
    return first, second


def _check(model, result, batches, prefix=""):
    for name, inputs in zip(("1", "5"), _inputs(model, batches), strict=True):
        mean, var, count = _expected(inputs)
        layer, moments = model[int(name)], result[prefix + name]
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_var, var)
        torch.testing.assert_close(moments.mean, mean)
        torch.testing.assert_close(moments.var, var * (count - 1) / count)
        assert moments.elements.tolist() == [count]


LAYERS = {
    "torch": nn.BatchNorm2d,
    "fastbn": fastbn.BatchNorm2d,
    "sync": nn.SyncBatchNorm,
    "renorm": fastbn.BatchRenorm2d,
    "accumulated": fastbn.AccumulatedBatchNorm2d,
}


@pytest.mark.parametrize("norm", LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_statistics_are_those_of_all_batches(norm):
    model, (_, batches) = _model(norm), _data(3, 8, 8)
    for layer in (model[1], model[5]):  # statistics from before must not matter
        layer.running_mean.fill_(7)
        layer.weight.uniform_(0.5, 2)
    before = copy.deepcopy(model)
    result = fastbn.population_stats(model, batches, progress=False)
    assert list(result) == ["1", "5"]
    _check(model, result, batches)
    changed = {name for name, value in before.state_dict().items() if not torch.equal(value, model.state_dict()[name])}
    assert changed == {"1.running_mean", "1.running_var", "5.running_mean", "5.running_var"}


@pytest.mark.parametrize("transform", [fastbn.convert, fastbn.checkpoint_safe], ids=["convert", "checkpoint_safe"])
@torch.no_grad()
def test_fused_and_checkpoint_safe_models(transform):
    model, (_, batches) = transform(_model()), _data(3, 8, 8)
    classes = [type(module) for module in model.modules()]
    _check(model, fastbn.population_stats(model, batches, progress=False), batches)
    assert [type(module) for module in model.modules()] == classes


def test_an_average_of_averages_is_something_else():
    """The worked example of docs/variants.md."""
    batches = [torch.tensor([[0.0], [2]]), torch.tensor([[4.0], [6], [8], [10]])]
    exact, average = nn.BatchNorm1d(1), nn.BatchNorm1d(1, momentum=None)
    result = fastbn.population_stats(exact, batches, progress=False)
    torch.optim.swa_utils.update_bn(batches, average)
    assert (exact.running_mean.item(), exact.running_var.item()) == (5, 14)
    assert (average.running_mean.item(), average.running_var.item()) == pytest.approx((4, 13 / 3))
    assert result[""].elements.item() == 6


def _record(model):
    """Return what must stay: flags, attributes, hooks, gradients, states of generators."""
    return [
        [(type(m), m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        [
            (m.track_running_stats, m.momentum)
            for m in model.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ],
        [parameter.grad for parameter in model.parameters()],
        [parameter.requires_grad for parameter in model.parameters()],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    ]


class _Breaks(Exception):
    pass


@pytest.mark.parametrize("breaks", [False, True], ids=["", "exception"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, fastbn.BatchRenorm2d], ids=["torch", "renorm"])
def test_everything_else_is_as_it_was(norm, breaks):
    model, (x, batches) = _model(norm), _data(3, 8, 8)
    model[4].eval()
    model[5].eval()
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    model(x).sum().backward()
    before, state = _record(model), copy.deepcopy(model.state_dict())

    def loader():
        for number, batch in enumerate(batches):
            if breaks and number == 2:
                raise _Breaks
            torch.rand(3)  # as a sampler draws
            yield batch

    if breaks:
        with pytest.raises(_Breaks):
            fastbn.population_stats(model, loader(), progress=False)
        assert_same(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    else:
        fastbn.population_stats(model, loader(), progress=False)
        assert not torch.equal(model[5].running_mean, state["5.running_mean"])
    assert _record(model) == before and seen == [True] + [False] * (2 if breaks else 3)


def test_buffers_hold_their_own_values_throughout():
    model, (_, batches) = _model(), _data(3, 8, 8)
    state = copy.deepcopy(model.state_dict())

    def forward(model, batch):
        model(batch)
        assert_same(dict(model.state_dict()), dict(state), rtol=0, atol=0)

    fastbn.population_stats(model, batches, forward=forward, progress=False)


class _Subclass(nn.BatchNorm2d):
    """A layer that moves its statistics in a way of its own."""

    def forward(self, input):
        self.running_mean += 1
        return super().forward(input)


@torch.no_grad()
def test_a_subclass_that_moves_its_buffers_anyway():
    model, (_, batches) = _model(_Subclass), _data(3, 8, 8)
    state = copy.deepcopy(model.state_dict())
    _check(model, fastbn.population_stats(model, batches, progress=False), batches)
    model.load_state_dict(state)
    with pytest.raises(ZeroDivisionError):
        fastbn.population_stats(model, (1 / 0 if b is batches[2] else b for b in batches), progress=False)
    assert_same(dict(model.state_dict()), dict(state), rtol=0, atol=0)


class _Masked(nn.BatchNorm1d):
    def moments_of(self, input, mask):
        return fastbn.functional.channel_stats(input[mask])

    def forward(self, input, mask):
        return input


def test_a_subclass_that_leaves_elements_out():
    layer, x, mask = _Masked(2), normal(10, 2, dtype=torch.float32), torch.arange(10) % 3 > 0
    batches = [{"input": x[:6], "mask": mask[:6]}, {"input": x[6:], "mask": mask[6:]}]
    fastbn.population_stats(layer, batches, progress=False)
    torch.testing.assert_close(layer.running_var, x[mask].var(0))


def test_padding_is_left_out():
    layer, x, lengths = fastbn.MaskedBatchNorm1d(2), normal(4, 2, 7, dtype=torch.float32), torch.tensor([7, 0, 3, 1])
    x = torch.where(torch.arange(7) < lengths.view(4, 1, 1), x, torch.nan)
    batches = [{"input": x[:2], "lengths": lengths[:2]}, {"input": x[2:], "lengths": lengths[2:]}]
    found = fastbn.population_stats(layer, batches, progress=False)
    assert [moments.elements.item() for moments in found.values()] == [11]
    torch.testing.assert_close(layer.running_mean, x.nanmean((0, 2)))
    elements = x.movedim(1, 0).flatten(1)
    torch.testing.assert_close(layer.running_var, torch.stack([e[~e.isnan()].var() for e in elements]))


class _Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.unused = nn.BatchNorm1d(2)

    def forward(self, image, target=None):
        return self.norm(image)


Pair = collections.namedtuple("Pair", ["image", "target"])


@pytest.mark.parametrize(
    "batch_of",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x],
        lambda x: Pair(x, "names"),
        lambda x: {"image": x, "target": torch.zeros(len(x))},
    ],
    ids=["tensor", "tuple", "list", "namedtuple", "mapping"],
)
def test_batches_as_loaders_give_them(batch_of):
    model, x = _Named(), normal(10, 2, dtype=torch.float32)
    result = fastbn.population_stats(model, [batch_of(part) for part in x.split(4)], progress=False)
    torch.testing.assert_close(model.norm.running_var, x.var(0))
    assert list(result) == ["norm"] and model.unused.running_var.tolist() == [1, 1]


def test_a_forward_of_ones_own():
    model, x = _Named(), normal(10, 2, dtype=torch.float32)
    batches = [types.SimpleNamespace(x=part) for part in x.split(4)]
    with pytest.raises(TypeError, match="that is a tensor, a tuple, a list or a mapping, got SimpleNamespace: give `f"):
        fastbn.population_stats(model, batches, progress=False)
    fastbn.population_stats(model, batches, forward=lambda model, batch: model(image=batch.x), progress=False)
    torch.testing.assert_close(model.norm.running_mean, x.mean(0))


def test_batches_are_moved():
    moved = []

    def forward(model, batch):
        (image, others), number, pair = batch
        moved.append(
            (image.device.type, others["a"].device.type, others["b"], number, type(pair), pair.image.device.type)
        )
        raise _Breaks

    batch = [(torch.ones(2, 2), {"a": torch.ones(1), "b": "name"}), 3, Pair(torch.ones(1), 4)]
    for device in ("meta", torch.device("cpu"), None):
        with pytest.raises(_Breaks):
            fastbn.population_stats(_Named(), [batch], device=device, forward=forward, progress=False)
    assert moved == [(device, device, "name", 3, Pair, device) for device in ("meta", "cpu", "cpu")]


def test_all_calls_of_a_layer_count():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = self.again = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(x) + self.again(input=x[: len(x) // 2] + 3)[0]

    model, x = Twice(), normal(12, 2, dtype=torch.float32)
    result = fastbn.population_stats(model, x.split(6), progress=False)
    rows = torch.cat([x, x[:3] + 3, x[6:9] + 3])
    torch.testing.assert_close(model.norm.running_mean, rows.mean(0))
    torch.testing.assert_close(model.norm.running_var, rows.var(0))
    assert {name: moments.elements.item() for name, moments in result.items()} == {"norm": 18}


def test_nothing_to_count():
    model = _model()
    state = copy.deepcopy(model.state_dict())
    for loader in ([], [torch.zeros(0, 3, 8, 8).double()]):
        with pytest.raises(ValueError, match="expected a loader with data for the layers, got none"):
            fastbn.population_stats(model, loader, progress=False)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        fastbn.population_stats(nn.Sequential(nn.BatchNorm1d(2)), [torch.ones(3, 2), torch.ones(1, 2)], progress=False)
    assert_same(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    unread = iter([torch.ones(1)])
    for other in (nn.ReLU(), nn.BatchNorm1d(2, track_running_stats=False), fastbn.FrozenBatchNorm1d(2)):
        assert fastbn.population_stats(other, unread) == {}
    assert next(unread) is not None
    with pytest.raises(TypeError, match="population_stats: expected a torch.nn.Module, got int"):
        fastbn.population_stats(3, [])
    with pytest.raises(ValueError, match="got a Lazy one: 1"):
        fastbn.population_stats(nn.Sequential(nn.ReLU(), nn.LazyBatchNorm1d()), [])


def test_half_types():
    x = normal(64, 3, 5, dtype=torch.bfloat16)
    layer = fastbn.BatchNorm1d(3)
    fastbn.population_stats(layer, x.split(24), progress=False)
    mean, var, _ = _expected([x.double()])
    # Kernels add up some terms of about 1 in float32 before they go on in float64; the buffers are float32.
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=0, atol=2e-6)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=0, atol=2e-6)


@torch.no_grad()
def test_a_compiled_model():
    model, (_, batches) = _model(), _data(3, 8, 8)
    compiled = torch.compile(model, backend="eager")
    compiled(batches[0])
    _check(model, fastbn.population_stats(compiled, batches, progress=False), batches, prefix="_orig_mod.")


def test_progress(monkeypatch):
    shown = []
    bar = types.SimpleNamespace(tqdm=lambda loader, **options: shown.append(options["desc"]) or loader)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(population.importlib, "import_module", lambda name: bar)
    for installed, progress, expected in ((True, True, 1), (False, True, 1), (True, False, 1)):
        found = (lambda name: True) if installed else (lambda name: None if name == "tqdm" else find_spec(name))
        monkeypatch.setattr(population.importlib.util, "find_spec", found)
        fastbn.population_stats(nn.BatchNorm1d(2), [torch.rand(3, 2)], progress=progress)
        assert shown == ["population_stats"] * expected


def _on_rank(rank: int, store: str, batches: list[list[Tensor]], results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=len(batches))
    model = nn.parallel.DistributedDataParallel(_model())
    result = fastbn.population_stats(model, batches[rank], progress=False)
    empty = ""
    try:
        fastbn.population_stats(model, [])
    except ValueError as error:
        empty = str(error)
    torch.save((model.module.state_dict(), result, empty), f"{results}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_with_uneven_parts_of_the_data(tmp_path):
    _, batches = _data(3, 8, 8)
    parts = [[batches[0], batches[1]], [], [batches[2]]]
    torch.multiprocessing.spawn(_on_rank, (str(tmp_path / "store"), parts, str(tmp_path)), len(parts))
    for rank in range(len(parts)):
        state, result, empty = torch.load(tmp_path / str(rank), weights_only=False)
        model = _model()
        model.load_state_dict(state)
        with torch.no_grad():
            _check(model, result, batches)
        assert "got none" in empty


class _Renamed(fastbn.BatchNorm2d):
    def forward(self, x, residual=None):
        return super().forward(x, residual)


@pytest.mark.parametrize(
    "layer, name",
    [(fastbn.BatchNorm2d(3), "input"), (fastbn.checkpoint_safe(fastbn.BatchNorm2d(3)), "input"), (_Renamed(3), "x")],
    ids=["fastbn", "checkpoint_safe", "renamed"],
)
def test_the_input_by_its_name(layer, name):
    x = normal(4, 3, 2, 2, dtype=torch.float32)
    call = lambda layer, batch: layer(residual=batch + 7, **{name: batch})  # noqa: E731
    fastbn.population_stats(layer, x.split(2), forward=call, progress=False)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))


def test_a_call_without_an_input():
    layer = fastbn.BatchNorm2d(3)
    with pytest.raises(TypeError, match="expected calls of layers with an input, got residual$"):
        fastbn.population_stats(
            layer, [torch.ones(2, 3, 2, 2)], forward=lambda layer, x: layer(residual=x), progress=False
        )


def test_a_rank_outside_of_the_group(tmp_path):
    unread = iter([torch.rand(3, 2)])
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="population_stats: expected a process_group that this rank is in, got"):
            outside = torch.distributed.GroupMember.NON_GROUP_MEMBER
            fastbn.population_stats(nn.BatchNorm1d(2), unread, process_group=outside)
    finally:
        torch.distributed.destroy_process_group()
    assert next(unread) is not None
