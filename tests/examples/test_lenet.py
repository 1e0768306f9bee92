"""examples/lenet, which `fastbn demo` runs: its data, its nets, what it prints and writes, and how it refuses."""

import gzip
import importlib
import json
import struct
import sys

import pytest
import torch

from examples.lenet.bn_timer import BatchNormTimer
from examples.lenet.data import load_digits, load_idx_directory
from examples.lenet.experiment import FASTBN, PLAIN, STOCK, lenet, variants
from examples.lenet.idx import read_idx
from fastbn import functional
from fastbn.backends import native, registry
from fastbn.backends.triton.plans import Limits
from fastbn.cli import main
from fastbn.cli.errors import CommandError
from fastbn.nn import BatchNorm1d
from tests import implementations

UBYTE = 0x08

TRAIN_IMAGES = "train-images-idx3-ubyte"

TEST_LABELS = "t10k-labels-idx1-ubyte"


def idx_bytes(tensor, kind=UBYTE):
    header = struct.pack(f">I{tensor.dim()}I", kind << 8 | tensor.dim(), *tensor.shape)
    return header + bytes(tensor.byte().flatten().tolist())


@pytest.fixture
def idx_directory(tmp_path):
    """Return a folder of 66 training and 20 test images; the training files are compressed."""
    generator = torch.Generator().manual_seed(0)
    directory = tmp_path / "images"
    directory.mkdir()
    for part, count in [("train", 66), ("t10k", 20)]:
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        for name, tensor in [(f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)]:
            if part == "train":
                (directory / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(tensor), mtime=0))
            else:
                (directory / name).write_bytes(idx_bytes(tensor))
    return directory


@pytest.mark.parametrize("shape", [(7,), (2, 3, 5)])
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_round_trip(tmp_path, shape, compressed):
    expected = torch.randint(256, shape, dtype=torch.uint8)
    path = tmp_path / ("x.gz" if compressed else "x")
    path.write_bytes(gzip.compress(idx_bytes(expected), mtime=0) if compressed else idx_bytes(expected))
    got = read_idx(path, len(shape))
    assert got.dtype == torch.uint8
    torch.testing.assert_close(got, expected)


WHOLE = idx_bytes(torch.zeros(2, 3, 5, dtype=torch.uint8))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x", b"", "expected an IDX header of 16 bytes, got a file of 0 bytes"),
        ("x", WHOLE[:15], "expected an IDX header of 16 bytes, got a file of 15 bytes"),
        ("x", WHOLE[:-1], r"expected 30 bytes of data \(2 x 3 x 5\), got 29"),
        ("x", WHOLE + b"\0", r"expected 30 bytes of data \(2 x 3 x 5\), got more"),
        ("x", idx_bytes(torch.zeros(20)), "expected magic number 0x00000803 .* got 0x00000801"),
        ("x", idx_bytes(torch.zeros(2, 3, 5), 0x0D), "expected magic number 0x00000803 .* got 0x00000d03"),
        ("x", gzip.compress(WHOLE, mtime=0), "expected magic number 0x00000803 .* got 0x1f8b0800"),
        ("x", idx_bytes(torch.zeros(0, 3, 5)), r"expected at least one element, got sizes \[0, 3, 5\]"),
        ("x.gz", WHOLE, "expected a whole gzip file"),
        ("x.gz", gzip.compress(WHOLE, mtime=0)[:-9], "expected a whole gzip file"),
    ],
)
def test_idx_errors(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CommandError, match=message) as error:
        read_idx(path, 3)
    assert str(error.value).startswith(f"{path}: ")


def test_idx_directory(idx_directory):
    data = load_idx_directory(idx_directory)
    assert data.name == "images"
    assert data.train_images.shape == (66, 1, 28, 28) and data.test_images.shape == (20, 1, 28, 28)
    assert data.train_labels.dtype == torch.int64
    assert data.test_labels.tolist() == [*range(10)] * 2


@pytest.mark.parametrize(
    "name, content, message",
    [
        (TEST_LABELS, None, f"expected a file {TEST_LABELS} or {TEST_LABELS}.gz, got neither"),
        (TEST_LABELS, torch.zeros(19), "expected 20 labels, one per image, got 19"),
        (TEST_LABELS, torch.full((20,), 10), "expected labels from 0 to 9, got 10"),
        (TRAIN_IMAGES, torch.zeros(66, 28, 27), "expected images of 28 x 28 pixels, got 28 x 27"),
        (TRAIN_IMAGES, torch.zeros(66), "expected magic number"),
    ],
)
def test_demo_refuses_bad_data(idx_directory, capsys, tmp_path, name, content, message):
    if content is None:
        (idx_directory / name).unlink()
    else:
        (idx_directory / name).write_bytes(idx_bytes(content.byte()))
    assert main(["demo", "--data", str(idx_directory), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_demo_refuses_a_missing_directory(capsys, tmp_path):
    assert main(["demo", "--data", str(tmp_path / "nowhere")]) == 2
    assert "--data: expected a directory" in capsys.readouterr().err


def test_demo_refuses_an_output_that_is_a_file(idx_directory, capsys, tmp_path):
    (tmp_path / "out").write_text("")
    assert main(["demo", "--data", str(idx_directory), "--out", str(tmp_path / "out")]) == 2
    assert "--out: expected a directory" in capsys.readouterr().err


def test_demo(idx_directory, capsys, tmp_path):
    out = tmp_path / "a" / "b"
    # 66 images in batches of 13 leave one image, which has no statistics for BatchNorm1d.
    arguments = ["--epochs", "1", "--batch-size", "13", "--lr", "0.01", "--out", str(out)]
    assert main(["demo", "--data", str(idx_directory), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "66 training and 20 test images" in printed
    assert "Verdict: fastbn trains as torch.nn does." in printed
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    assert set(results["loss"]) == set(results["accuracy"]) == {PLAIN, STOCK, FASTBN}
    assert all(len(values) == 1 for values in results["loss"].values())
    times = results["milliseconds_per_step"]
    assert times[PLAIN]["forward"] == times[PLAIN]["backward"] == 0
    for name in (STOCK, FASTBN):
        assert 0 < times[name]["forward"] + times[name]["backward"] < times[name]["step"]


def test_demo_reports_a_divergence(idx_directory, capsys, tmp_path, monkeypatch):
    forward = BatchNorm1d.forward
    monkeypatch.setattr(BatchNorm1d, "forward", lambda self, x: forward(self, x) * 1.5)
    arguments = ["--epochs", "1", "--batch-size", "33", "--out", str(tmp_path)]
    assert main(["demo", "--data", str(idx_directory), *arguments]) == 1
    assert "does NOT train as torch.nn does" in capsys.readouterr().out
    assert "first_loss" in json.loads((tmp_path / "results.json").read_text())["verdict"]["beyond"]


def test_digits():
    data = load_digits(seed=0)
    assert data.train_images.shape == (1437, 1, 28, 28) and data.test_images.shape == (360, 1, 28, 28)
    assert data.train_images.dtype == torch.uint8 and data.train_images.max() == 255
    assert data.test_labels.bincount().min() >= 34


def test_variants_start_equal():
    nets = variants(seed=3)
    stock, fast, plain = (nets[name].state_dict() for name in (STOCK, FASTBN, PLAIN))
    assert list(stock) == list(fast)
    assert all(torch.equal(stock[key], fast[key]) for key in stock)
    assert set(stock) - set(plain) == {key for key in stock if key.startswith("bn")}
    assert all(torch.equal(stock[key], plain[key]) for key in plain)


def test_timer_does_not_change_the_result():
    torch.manual_seed(0)
    net, images = lenet(batch_norm=True), torch.rand(4, 1, 28, 28)

    def gradients():
        net.zero_grad()
        net(images).square().sum().backward()
        return [parameter.grad.clone() for parameter in net.parameters()]

    expected = gradients()
    timer = BatchNormTimer(net, torch.device("cpu"), warm_up=1)
    for _ in range(3):
        with timer:
            got = gradients()
    assert all(map(torch.equal, got, expected))
    times = timer.medians()
    assert 0 < times["forward"] and 0 < times["backward"]
    assert times["forward"] + times["backward"] < times["step"]


@pytest.fixture
def triton_calls(monkeypatch):
    """Let the CPU stand for a GPU that the extension has no kernels for. Returns the names of ops that Triton runs."""
    implementations.load("triton")  # to be interpreted
    ops = importlib.import_module("fastbn.backends.triton.ops")
    names = []

    def record(name):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *arguments: names.append(name) or op(*arguments))

    for name in ("batch_norm_train", "batch_norm_backward", "batch_norm_eval"):
        record(name)
    monkeypatch.setattr(ops, "limits_of", lambda *call: Limits(sm_count=1))  # each program takes long
    monkeypatch.setitem(registry._offered, "cpu", [native.CUDA, registry.get("triton")])
    monkeypatch.setattr(functional, "NODE", None)
    return names


@pytest.mark.skipif(torch.cuda.is_available(), reason="the one below runs what this one stands for")
def test_demo_where_triton_alone_serves_the_device(triton_calls, idx_directory, capsys, tmp_path):
    """FASTBN_CUDA=0 pip install, then the demo on a GPU: it takes no other step."""
    arguments = ["--epochs", "1", "--batch-size", "33", "--lr", "0.01", "--out", str(tmp_path)]
    assert main(["demo", "--data", str(idx_directory), *arguments]) == 0
    assert "Verdict: fastbn trains as torch.nn does." in capsys.readouterr().out
    steps, layers = 2, 4
    assert triton_calls.count("batch_norm_train") == triton_calls.count("batch_norm_backward") == steps * layers
    assert triton_calls.count("batch_norm_eval") >= layers


@pytest.mark.gpu
def test_demo_on_a_gpu(idx_directory, tmp_path):
    arguments = ["--device", "cuda", "--epochs", "2", "--batch-size", "13", "--lr", "0.01", "--out", str(tmp_path)]
    assert main(["demo", "--data", str(idx_directory), *arguments]) == 0


@pytest.mark.parametrize(
    "package, distribution", [("matplotlib", "matplotlib"), ("tqdm", "tqdm"), ("sklearn", "scikit-learn")]
)
def test_missing_extra(package, distribution, capsys, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"fastbn demo needs {distribution}: pip install 'fastbn[demo]'\n"
