"""Train LeNet with sigmoids three times from one initialisation, on the same batches: without BatchNorm, with
torch.nn.BatchNorm, and with fastbn through fastbn.convert. Compare losses, accuracies and the time spent in BatchNorm,
and draw the curves."""

import argparse
from pathlib import Path

import torch

from fastbn.cli import clone
from fastbn.cli.arguments import integer, number, path

SUMMARY = "train LeNet without BatchNorm, with torch.nn's and with fastbn's"

EPOCHS = {"idx": 10, "digits": 30}
# The largest seed that NumPy takes, which splits the digits.
MAX_SEED = 2**32 - 1
# SGD multiplies by the learning rate in the type of the parameters.
MAX_LR = torch.finfo(torch.float32).max

_NOTE = """\
Time in BatchNorm is the median over the training steps. Forward runs from a module's call to its return, backward from
the gradient of its output to that of its input, both with what launching them costs; the clock is the host's, or CUDA
events with --device cuda. Other work on the machine shows in it.

Rounding differs between any two implementations, and training amplifies it: nets that agree to the last digits in the
first step are visibly different nets after an epoch, though not better or worse ones. The verdict therefore asks that
the loss of the first step is equal up to rounding, that fastbn evaluates the net that torch.nn trained as torch.nn
does, and that the training losses lie close to each other compared with the net without BatchNorm. Test accuracies
and the logits after an epoch are reported, not judged.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fastbn demo`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _NOTE
    parser.add_argument(
        "--data",
        type=path,
        metavar="DIR",
        help="directory of Fashion-MNIST's (or MNIST's) four IDX files {train,t10k}-{images-idx3,labels-idx1}-ubyte, "
        "each with or without .gz (default: the digits that scikit-learn bundles, scaled up to 28x28)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train (default: cpu)")
    parser.add_argument(
        "--epochs",
        type=integer(1),
        metavar="N",
        help=f"default: {EPOCHS['idx']} with --data, {EPOCHS['digits']} without, since an epoch is then 6 steps",
    )
    parser.add_argument(
        "--batch-size",
        type=integer(2),
        default=256,
        metavar="N",
        help="at least 2, since one image has no statistics (default: 256)",
    )
    parser.add_argument("--lr", type=number(MAX_LR), default=1.0, help="SGD's learning rate (default: 1.0)")
    parser.add_argument(
        "--seed", type=integer(0, MAX_SEED), default=0, help="of initialisation, order and split (default: 0)"
    )
    where = "where curves.png and results.json go (default: demo)"
    parser.add_argument("--out", type=path, default=Path("demo"), metavar="DIR", help=where)


def run(args: argparse.Namespace) -> int:
    """Run examples/lenet of the clone. Returns 0, or 1 where fastbn does not train as torch.nn does."""
    status: int = clone.load("demo", "examples.lenet.command").run(args)
    return status
