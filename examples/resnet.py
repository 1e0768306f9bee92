"""A ResNet of torchvision through everything that one does with a model, converted by one line.

    python -m examples.resnet --model resnet50 --size 64

Each step prints what it did and how far its result is from torch's own; a step that differs by more than its tolerance
ends the program with an error. It needs torchvision, and onnx with onnxscript for the export.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

import fastbn

# Relative to the largest number of the output. On the way to its logits, a ResNet that was never trained multiplies the
# rounding errors of float32 by some hundred.
TOLERANCE = 1e-3
# Of an int8 model: what quantisation itself costs.
INT8_TOLERANCE = 0.5


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest number of `expected`."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def check(step: str, actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Print a step and its error. Raises ValueError if that is above the tolerance."""
    error = distance(actual, expected)
    print(f"{step:50} error {error:.1e}")
    if not error <= tolerance:
        raise ValueError(f"{step}: expected an error of at most {tolerance:g}, got {error:g}")


def step(model: nn.Module, batch: tuple[Tensor, Tensor], run: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Train `model` by one step, in which `run` calls it, and return the logits."""
    images, labels = batch
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    logits = (model if run is None else run)(images)
    F.cross_entropy(logits, labels).backward()
    optimizer.step()
    return logits.detach()


def train(stock: nn.Module, model: nn.Module, batch: tuple[Tensor, Tensor], backend: str) -> None:
    """Train `stock` by one step, and copies of `model` by the same step in three ways.

    All start from the same parameters: one update later, the errors of rounding are of the size of the logits.
    """
    eager, compiled, checkpointed = (copy.deepcopy(model).train() for _ in range(3))
    expected = step(stock.train(), batch)
    check("a training step", step(eager, batch), expected)

    run = torch.compile(compiled, backend=backend, fullgraph=True)
    check("a compiled training step, one graph", step(compiled, batch, run), expected)

    fastbn.checkpoint_safe(checkpointed)
    stages = nn.Sequential(*list(checkpointed.children())[:-1], nn.Flatten(1), checkpointed.fc)
    run = functools.partial(checkpoint_sequential, stages, 3, use_reentrant=False)
    check("a step with activation checkpoints", step(checkpointed, batch, lambda images: run(input=images)), expected)
    # Stock would update these statistics a second time, when backward runs forward again.
    check("running variance after it", checkpointed.bn1.running_var, stock.bn1.running_var)


def serve(stock: nn.Module, model: nn.Module, images: Tensor) -> None:
    """Fold, script and export the model, and load what was written."""
    stock, model = stock.eval(), model.eval()
    with torch.no_grad():
        expected = stock(images)
        check("evaluation", model(images), expected)
        folded = fastbn.fold(model)
        left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        check(f"folded into convolutions, {left} layers left", folded(images), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            scripted = torch.jit.script(model)
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        check("scripted, saved and loaded", torch.jit.load(buffer)(images), expected)
        if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript"):
            with tempfile.TemporaryDirectory() as folder:
                check("exported to ONNX, run by its reference", run_onnx(model, images, Path(folder)), expected)
        else:
            print("not exported to ONNX, which needs onnx and onnxscript")


def run_onnx(model: nn.Module, images: Tensor, folder: Path) -> Tensor:
    from onnx.reference import ReferenceEvaluator

    path = folder / "model.onnx"
    torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(path)
    evaluator = ReferenceEvaluator(str(path))
    return torch.from_numpy(evaluator.run(None, {evaluator.input_names[0]: images.numpy()})[0])


def quantize(model: nn.Module, images: Tensor) -> None:
    """Quantise the model to int8 by a tool that knows torch's layers only."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
        with fastbn.reverted(model):
            prepared = prepare_fx(copy.deepcopy(model).eval(), get_default_qconfig_mapping("x86"), (images,))
        expected = prepared(images)
        check("quantised to int8 while reverted", convert_fx(prepared)(images), expected, INT8_TOLERANCE)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.resnet", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet50", help="a ResNet of torchvision.models")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="height and width of the random images")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    args = parser.parse_args(arguments)
    import torchvision

    torch.manual_seed(0)
    stock = getattr(torchvision.models, args.model)()
    model = fastbn.convert(copy.deepcopy(stock), verbose=True)
    batch = torch.randn(args.batch, 3, args.size, args.size), torch.randint(1000, (args.batch,))
    train(stock, model, batch, args.backend)
    model.load_state_dict(stock.state_dict())
    serve(stock, model, batch[0])
    quantize(model, batch[0])
    fastbn.revert(model)
    classes = [type(module) for module in model.modules()]
    if (
        classes != [type(module) for module in stock.modules()]
        or model.state_dict().keys() != stock.state_dict().keys()
    ):
        raise ValueError("revert: expected the classes and keys of the model that was converted")
    print("reverted: the classes and keys are torchvision's again")


if __name__ == "__main__":
    main()
