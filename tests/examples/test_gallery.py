"""examples/gallery: what its modules compute, that they draw it, and that docs/gallery.md says what was computed."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import fastbn
from examples.gallery import (
    PICTURES,
    activations,
    axes,
    batch_size,
    conv_bias,
    learning_rate,
    predictiveness,
    running_mean,
    training,
)
from examples.gallery.__main__ import compute, digest, draw, main, picture, written
from examples.gallery.style import BN, NOISY, PLAIN

DOCS = Path(__file__).resolve().parents[2] / "docs"
# Settings with which a picture takes less than a second.
TINY = {
    "activations": {"images": 16, "batch": 8, "steps": 3, "layers": 3, "seeds": 2, "probe": 16},
    # At the second rate the VGG without BatchNorm diverges.
    "learning_rate": {
        **{"images": 32, "test_images": 50, "batch": 8, "seeds": 1},
        **{"steps": {"LeNet": 3, "VGG": 3}, "lrs": [0.1, 1e15]},
    },
    "predictiveness": {
        "images": 16,
        "test_images": 16,
        "batch": 8,
        "steps": 2,
        "every": 1,
        "multiples": [0.5, 4.0],
        "seeds": 1,
    },
    "batch_size": {"images": 64, "test_images": 40, "batches": [4, 16], "seeds": 1},
    "axes": {},
    "running_mean": {"steps": 12, "channels": 4},
    "conv_bias": {"images": 16, "probe": 16, "batch": 8, "steps": 2, "biases": [0.1, 10.0]},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_from_its_json_alone(data, name, tmp_path):
    results = compute(name, data, **TINY[name])
    assert results["settings"] == {**picture(name).SETTINGS, **TINY[name]}
    # NaN and infinity are not JSON, and `results` may hold nothing that JSON loses.
    again = json.loads(written(results), parse_constant=pytest.fail)
    assert again.keys() == results.keys()
    assert all(row.startswith("| ") and row.endswith(" |") for row in picture(name).facts(again))
    draw(name, again, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.width == 960 and drawn.text["Source"] == digest(results)


def test_a_setting_that_a_picture_lacks_is_refused(data):
    with pytest.raises(TypeError, match=r"axes: expected settings among \['element', 'shape'\], got \['steps'\]"):
        compute("axes", data, steps=3)


def test_the_command_computes_and_redraws(tmp_path, capsys):
    main(["axes", "--out", str(tmp_path)])
    assert "| BatchNorm, training | 36 |" in capsys.readouterr().out
    drawn = (tmp_path / "axes.png").read_bytes()
    changed = (tmp_path / "axes.json").read_text().replace("InstanceNorm", "something else")
    (tmp_path / "axes.json").write_text(changed)
    main(["axes", "--out", str(tmp_path), "--redraw"])
    assert (tmp_path / "axes.json").read_text() == changed
    assert (tmp_path / "axes.png").read_bytes() != drawn


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["axes", "--redraw"], "--redraw: expected the file"),
        (["axes", "--data", "nowhere"], "--data: expected a directory, got nowhere"),
        (["nothing"], "invalid choice"),
    ],
)
def test_the_command_refuses(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_written_numbers_are_short_and_read_back():
    text = written({"a": {"b": [1 / 3, True, None, "x"]}, "c": 2})
    assert json.loads(text) == {"a": {"b": [0.333333, True, None, "x"]}, "c": 2}


def test_batches_are_those_of_shuffled_epochs(data):
    images = training.Images(data, 64)
    batches = list(images.batches(24, 5, seed=1))
    assert [len(labels) for _, labels in batches] == [24] * 5
    for epoch in (batches[:2], batches[2:4]):
        rows = torch.cat([x for x, _ in epoch]).flatten(1)
        assert len(rows.unique(dim=0)) == 48
    assert not torch.equal(batches[0][0], batches[2][0])
    torch.testing.assert_close(images.train.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)  # rounding of 50,000 terms
    torch.testing.assert_close(images.train.std(), torch.tensor(1.0))


def test_variants_of_a_net_start_from_the_same_weights():
    noise = learning_rate.Noise(0.5, 1.25, 0.1)
    for name in ("LeNet", "VGG"):
        weights = []
        for variant in (PLAIN, BN, NOISY):
            torch.manual_seed(3)
            model = learning_rate.net(name, variant, noise)
            weights.append([m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))])
            norms = [m for m in model.modules() if isinstance(m, (fastbn.BatchNorm1d, fastbn.BatchNorm2d))]
            assert len(norms) == (0 if variant == PLAIN else len(weights[0]) - 1)
            assert sum(m is noise for m in model.modules()) == (variant == NOISY)
        assert all(torch.equal(a, b) for pair in (weights[1:], weights[:2]) for a, b in zip(*pair, strict=True))


def test_noise_moves_mean_and_scale_of_each_channel_at_each_step():
    torch.manual_seed(0)
    noise = learning_rate.Noise(0.5, 1.25, 0.1)
    x = torch.randn(2000, 3, 2, 2)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    outputs = [noise(x) for _ in range(200)]
    means = torch.stack([y.mean((0, 2, 3)) for y in outputs])
    stds = torch.stack([y.std((0, 2, 3)) for y in outputs])
    # A uniform distribution over an interval of length 1 has the standard deviation sqrt(1 / 12); 600 draws of it give
    # that within some 3 %. Jitter adds a variance of 0.1^2 to the scale and of 0.1^2 / 3 to the mean of an image.
    assert means.std() == pytest.approx(math.sqrt(1 / 12), rel=0.1)
    assert means.abs().max() < 0.52 and means.mean().abs() < 0.05
    assert 1 < stds.min() and stds.max() < math.sqrt(1.25**2 + 0.1**2 + 0.1**2 / 3) + 0.02
    assert stds.std() > 0.05
    torch.testing.assert_close(noise.eval()(x), x * 1.125)


def test_shift_is_the_movement_of_means_over_the_spread_of_elements():
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    watch = learning_rate.Watch(model)
    spread = torch.tensor([-2.0, 2.0]).view(2, 1)
    for step in range(8):
        model(spread + step % 2)
    # Of the four means 0, 1, 0, 1 the standard deviation is sqrt(1 / 3), and 2 that of the elements.
    assert watch.shift() == pytest.approx(math.sqrt(1 / 3) / 2)
    for _ in range(8):
        model(torch.ones(2, 1))
    assert watch.shift() is None


def test_a_diverged_run_is_recorded_as_one(data):
    results = compute("learning_rate", data, **TINY["learning_rate"])["runs"]["VGG"][PLAIN]
    assert results["loss"][1] == [None] and results["accuracy"][1] == [0.1] and results["shift"][1] == [None]
    assert math.isfinite(results["loss"][0][0])


def test_histograms_count_what_enters_each_relu(data):
    torch.manual_seed(0)
    images = training.Images(data, 32).train
    model = activations.net(BN, layers=2, channels=4)
    found = activations.layers_of(model, images)
    assert len(found["histogram"]) == len(found["std"]) == 2
    assert found["std"] == pytest.approx([1, 1], rel=1e-3)  # eps, and n for n - 1
    entering = model[1](model[0](images))
    middle = activations.BINS // 2
    inside = ((entering >= 0) & (entering < activations.LIMIT * 2 / activations.BINS)).double().mean().item()
    assert found["histogram"][0][middle] == pytest.approx(inside, abs=1e-4)  # five digits, and elements at an edge


def test_a_probe_measures_the_gradient_along_itself_and_leaves_the_model(data):
    torch.manual_seed(0)
    images = training.Images(data, 64)
    model = training.vgg(training.batch_norm).double()
    before = copy.deepcopy(model.state_dict())
    batch = images.train[:8].double(), images.train_labels[:8]
    found = predictiveness.probe(model, *batch, [1e-8, 2e-8])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    loss, gradient = predictiveness.gradient(model, *batch)
    # Steps so short that no ReLU changes sides: the loss falls by their length times the squared norm of the gradient.
    square = sum((part * part).sum().item() for part in gradient)
    assert loss - found["loss"][1] == pytest.approx(1e-8 * square, rel=1e-3)
    assert found["distance"][1] == pytest.approx(2 * found["distance"][0], rel=1e-3)
    assert found["smoothness"] == pytest.approx([found["distance"][0] / (1e-8 * math.sqrt(square))] * 2, rel=1e-3)


def test_measuring_leaves_the_running_statistics(data):
    torch.manual_seed(0)
    model = training.vgg(training.batch_norm).train()
    before = copy.deepcopy(model.state_dict())
    images = training.Images(data, 64)
    batch_size.measure(model, images.train[:60], images.train_labels[:60], 8)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


EXPECTED = {
    "BatchNorm, training": (slice(None), 2),
    "BatchNorm, evaluation": (1, 2, 1, 1),
    "LayerNorm over C, H, W": (1,),
    "LayerNorm over C": (1, slice(None), 1, 1),
    "GroupNorm, 2 groups": (1, slice(0, 3)),
    "InstanceNorm": (1, 2),
}


@pytest.mark.parametrize("name", axes.LAYERS)
def test_what_an_element_depends_on(data, name):
    shape, element = axes.SETTINGS["shape"], axes.SETTINGS["element"]
    expected = torch.zeros(shape, dtype=torch.bool)
    expected[EXPECTED[name]] = True
    assert torch.equal(axes.shared(axes.LAYERS[name](shape), shape, element), expected)


@pytest.mark.parametrize("ratio", [1e-4, 1 / 90, 1.0, 50.0])
def test_the_steady_gain_is_what_the_filter_of_a_random_walk_comes_to(ratio):
    variance = 1e6  # of the estimate, in variances of a measurement: nothing is known
    for _ in range(2000):
        predicted = variance + ratio
        gain = predicted / (predicted + 1)
        variance = (1 - gain) * predicted
    assert running_mean.steady_gain(ratio) == pytest.approx(gain)
    assert running_mean.ratio_for(gain) == pytest.approx(ratio)
    assert running_mean.steady_error(gain, ratio) == pytest.approx(math.sqrt(variance))
    # No other constant gain has a smaller error.
    assert all(running_mean.steady_error(gain * f, ratio) > math.sqrt(variance) for f in (0.9, 1.01))


def test_momentum_none_is_the_filter_of_a_constant():
    batches = torch.randn(20, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = running_mean.estimates(batches, None)
    estimate, variance = torch.zeros(3, dtype=torch.float64), math.inf
    for step, measured in enumerate(batches.mean(1)):
        gain = 1.0 if math.isinf(variance) else variance / (variance + 1)
        assert gain == pytest.approx(1 / (step + 1))
        estimate = estimate + gain * (measured - estimate)
        variance = 1.0 if math.isinf(variance) else (1 - gain) * variance
        torch.testing.assert_close(got[step], estimate)


def test_biases_before_batch_norm_have_no_effect(data):
    results = compute("conv_bias", data, **TINY["conv_bias"])
    assert max(results["ratios"][BN]["float64"]) < 1e-12 < 1e-3 < min(results["ratios"][PLAIN]["float64"])
    absorbed = results["absorbed"]
    expected = [(1 - 0.9**2) * bias for bias in absorbed["bias"]]
    # The two trainings differ by rounding in float64, and biases are some 1.
    assert absorbed["running_mean"] == pytest.approx(expected, abs=1e-9)
    assert absorbed["losses"][0] < 1e-9


def test_adam_and_fixed_statistics_give_such_biases_something_to_do(data):
    torch.manual_seed(0)
    images = training.Images(data, 32)
    model = training.vgg(training.batch_norm)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for batch in images.batches(16, 2, seed=0):
        training.step(model, optimizer, *batch)
    assert all(layer.bias.abs().max() > 1e-4 for layer in conv_bias.convolutions(model))
    assert min(conv_bias.gradients(model.eval(), images.train, images.train_labels)) > 1e-3


def test_a_diverged_seed_is_marked_at_its_rate(kept):
    """Marks are inside the axes, and none is on top of another."""
    results = kept["learning_rate"]
    axes = learning_rate.draw(results).axes[1]
    marks = [tuple(point) for line in axes.lines if line.get_marker() == "x" for point in line.get_xydata()]
    assert sorted(x for x, _ in marks) == [1, 3, 10, 10, 10] and len(set(marks)) == len(marks)
    assert {x for x, _ in marks} <= set(results["settings"]["lrs"])
    assert all(2.6 < y < axes.get_ylim()[1] for _, y in marks)


def test_an_accuracy_in_the_picture_says_of_how_many_seeds(kept):
    titles = [axes.get_title() for axes in activations.draw(kept["activations"]).axes]
    assert sum(title.endswith("(mean of 3 seeds)") for title in titles) == 3


@pytest.fixture(scope="module")
def page():
    return (DOCS / "gallery.md").read_text()


@pytest.fixture(scope="module")
def kept():
    return {name: json.loads((DOCS / "gallery" / f"{name}.json").read_text()) for name in PICTURES}


@pytest.mark.parametrize("name", PICTURES)
def test_the_page_has_the_numbers_that_are_kept(page, kept, name):
    assert kept[name]["settings"] == picture(name).SETTINGS
    assert kept[name]["made"]["data"] == "fashion-mnist"
    for row in picture(name).facts(kept[name]):
        assert row.removesuffix(" |") in page
    assert f"](gallery/{name}.png)" in page and f"python -m examples.gallery {name}" in page


@pytest.mark.parametrize("name", PICTURES)
def test_a_kept_picture_was_drawn_from_the_numbers_beside_it(kept, name):
    with Image.open(DOCS / "gallery" / f"{name}.png") as drawn:
        assert drawn.width == 960 and drawn.text["Source"] == digest(kept[name])


def mean(values):
    return sum(values) / len(values)


def test_the_page_on_batch_sizes(kept):
    """Train mode is the worst at every size, the gap shrinks, and population statistics help most at 2."""
    runs = {name: [mean(seeds) for seeds in run["accuracy"]] for name, run in kept["batch_size"]["runs"].items()}
    by_batch, running, population = (runs[name] for name in batch_size._STYLES)
    gaps = [after - before for before, after in zip(by_batch, running, strict=True)]
    assert min(gaps) > 0 and gaps == sorted(gaps, reverse=True)
    assert gaps[0] == pytest.approx(0.066, abs=5e-4) and 0.004 < gaps[-1] < 0.006
    gains = [after - before for before, after in zip(running, population, strict=True)]
    assert 0.008 < gains[0] < 0.011 and all(0 < gain < gains[0] for gain in gains[1:])
    assert running[3] - running[0] == pytest.approx(0.062, abs=5e-4) and max(running) == running[3]


def test_the_page_on_running_means(kept):
    """`None` is best where the mean stays, at each step; where it drifts 0.1 is, and has the error of the theory."""
    results = kept["running_mean"]
    stays = results["error"][running_mean.STAYS]
    others = [errors for momentum, errors in stays.items() if momentum != "None"]
    assert all(own < min(rest) for own, *rest in zip(stays["None"], *others, strict=True))
    assert running_mean.steady_error(0.01, 0) < running_mean.steady_error(0.1, 0) < stays["0.01"][-1]
    drifts = {momentum: running_mean.final(results, running_mean.DRIFTS, momentum) for momentum in stays}
    assert min(drifts, key=drifts.get) == "0.1"
    # 512 streams of 100 steps, of which some ten are independent, give an error within 1 / sqrt(2 * 5000) of it.
    assert drifts["0.1"] == pytest.approx(running_mean.steady_error(0.1, results["ratio"]), rel=0.03)
    assert running_mean.steady_gain(results["ratio"]) == pytest.approx(0.1, rel=1e-4)
    late = results["error"][running_mean.DRIFTS]["None"]
    assert late[-1] > late[150] > late[50]


def test_the_page_on_biases(kept):
    results = kept["conv_bias"]
    assert max(results["ratios"][BN]["float64"]) < 1e-14
    assert max(results["ratios"][BN]["float32"]) == results["ratios"][BN]["float32"][0]
    assert results["outputs"][PLAIN][-1] > 100 and max(results["outputs"][BN]) < 1e-3
    absorbed = results["absorbed"]
    assert absorbed["running_mean"] == pytest.approx(absorbed["bias"], abs=4 * 0.9**100)
    assert absorbed["losses"][0] < 1e-12 and absorbed["moved"][0] < 1e-15


def test_the_page_on_predictiveness(kept):
    """At 0.03 every seed's range and change are smaller with BN; at 0.1 the change is, and the range is not."""
    results = kept["predictiveness"]

    def of(lr, measure):
        return [predictiveness.widest(results, lr, variant, measure) for variant in (PLAIN, BN)]

    for lr in (0.03, 0.1):
        for measure in ("distance", "smoothness"):
            plain, normalised = of(lr, measure)
            assert max(normalised) < min(plain)
    plain, normalised = of(0.03, "loss")
    assert mean(normalised) / mean(plain) == pytest.approx(0.1, abs=0.02) and max(normalised) < min(plain)
    plain, normalised = of(0.03, "distance")
    assert mean(normalised) / mean(plain) == pytest.approx(0.25, abs=0.05)
    plain, normalised = of(0.1, "loss")
    assert max(normalised) > min(plain)


def test_the_page_on_activations(kept):
    """Without BN torch's initialisation fades and does not train, He's trains and grows. With BN all are near 1."""
    runs = kept["activations"]["runs"]
    plain, he, normalised = (runs[variant] for variant in (PLAIN, activations.HE, BN))
    for stds, between in zip(plain["start"]["std"], plain["between"], strict=True):
        assert (between[-1] / between[0]) ** (1 / 9) == pytest.approx(0.37, abs=0.01)
        assert max(stds[5:]) < 0.01
    assert mean([between[-1] for between in plain["between"]]) == pytest.approx(4e-5, abs=0.5e-5)
    assert max(plain["accuracy"]) < 0.11 and min(he["accuracy"]) > 0.25
    factors = sorted(stds[-1] / stds[0] for stds in he["start"]["std"])
    assert factors[0] < 0.25 and 0.75 < factors[-1] < 1.25
    assert all(stds[-1] > 8 for stds in he["trained"]["std"])
    assert min(normalised["accuracy"]) > max(he["accuracy"])
    for when, most in (("start", 1.001), ("trained", 1.2)):
        assert all(0.95 < value < most for stds in normalised[when]["std"] for value in stds)


def test_the_page_on_learning_rates(kept):
    """Noisy BN trains where BN does, almost as well, although its inputs move more than those of the net without BN."""
    results = kept["learning_rate"]
    lrs, runs = results["settings"]["lrs"], results["runs"]
    trained = {
        (name, variant): learning_rate.trained(results, name, variant) for name in runs for variant in runs[name]
    }
    assert trained["LeNet", PLAIN] == [] and max(max(seeds) for seeds in runs["LeNet"][PLAIN]["accuracy"]) < 0.12
    assert trained["LeNet", BN] == lrs[1:] and set(lrs[1:]) - set(trained["LeNet", NOISY]) == {1.0}
    assert trained["VGG", BN][-1] == trained["VGG", NOISY][-1] == pytest.approx(3 * trained["VGG", PLAIN][-1])
    best = {
        (name, variant): max(map(mean, numbers["accuracy"])) for name in runs for variant, numbers in runs[name].items()
    }
    assert best["VGG", PLAIN] + 0.05 < best["VGG", NOISY] < best["VGG", BN] < best["VGG", NOISY] + 0.01
    shifts = [learning_rate.shift(results, "VGG", variant) for variant in (PLAIN, BN, NOISY)]
    assert shifts[1] < 0.01 and 2 * shifts[0] < shifts[2] == pytest.approx(0.256, abs=0.001)
    # The blemish: a low loss and a bad test, at 1, of one seed.
    at = lrs.index(1.0)
    noisy = runs["LeNet"][NOISY]
    assert noisy["accuracy"][at] == pytest.approx([0.76, 0.74, 0.26], abs=0.01) and noisy["loss"][at][2] < 0.7
    # At the smallest rate the VGG without BN is ahead, and up to 0.3 the noise costs the VGG something.
    vgg = {variant: [mean(seeds) for seeds in runs["VGG"][variant]["accuracy"]] for variant in (PLAIN, BN, NOISY)}
    assert vgg[PLAIN][0] > vgg[BN][0]
    assert all(noisy < normalised for noisy, normalised in zip(vgg[NOISY][:6], vgg[BN][:6], strict=True))
