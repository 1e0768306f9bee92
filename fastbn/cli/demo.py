"""Train LeNet with sigmoids three times from one initialisation, on the same batches: without BatchNorm, with
torch.nn.BatchNorm, and with fastbn through fastbn.convert. Compare losses, accuracies and the time spent in BatchNorm,
and draw the curves."""

import argparse
import json
import math
from pathlib import Path

import torch

from fastbn.cli.arguments import check_directory, integer, number, path
from fastbn.cli.data import Dataset, load_digits, load_idx_directory
from fastbn.cli.errors import CommandError, RunError, device, reason, require
from fastbn.cli.lenet import FASTBN, PLAIN, STOCK, Experiment
from fastbn.cli.text import table

SUMMARY = "train LeNet without BatchNorm, with torch.nn's and with fastbn's"

CURVES, RESULTS = "curves.png", "results.json"
# NumPy's, which splits the digits.
MAX_SEED = 2**32 - 1
# SGD multiplies by it in the parameters' type.
MAX_LR = torch.finfo(torch.float32).max

_EPOCHS = {"idx": 10, "digits": 30}
_BOUNDED = [
    ("first_loss", "loss of the first step"),
    ("same_net_logits", "logits of torch.nn's trained net, evaluated by each"),
    ("loss", "training loss of an epoch"),
]
_NOTE = """\
Time in BatchNorm is the median over the training steps. Forward runs from a module's call to its return, backward from
the gradient of its output to that of its input, both with what launching them costs; the clock is the host's, or CUDA
events with --device cuda. Other work on the machine shows in it.

Rounding differs between any two implementations, and training amplifies it: nets that agree to the last digits in the
first step are visibly different nets after an epoch, though not better or worse ones. The verdict therefore asks that
the loss of the first step is equal but for rounding, that fastbn evaluates the net that torch.nn trained as torch.nn
does, and that the training losses lie close to each other compared with the net without BatchNorm. Test accuracies
and the logits after an epoch are reported, not judged.
"""


def add_arguments(parser):
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
        help=f"default: {_EPOCHS['idx']} with --data, {_EPOCHS['digits']} without, since an epoch is then 6 steps",
    )
    parser.add_argument(
        "--batch-size",
        type=integer(2),
        default=256,
        metavar="N",
        help="at least 2, for one image has no statistics (default: 256)",
    )
    parser.add_argument("--lr", type=number(MAX_LR), default=1.0, help="SGD's learning rate (default: 1.0)")
    parser.add_argument(
        "--seed", type=integer(0, MAX_SEED), default=0, help="of initialisation, order and split (default: 0)"
    )
    where = "where curves.png and results.json go (default: demo)"
    parser.add_argument("--out", type=path, default=Path("demo"), metavar="DIR", help=where)


def run(args) -> int:
    where = device(args.device)
    progress = require("demo", "matplotlib", "tqdm").tqdm
    check_directory("--out", args.out, RESULTS, CURVES)
    data = load_idx_directory(args.data) if args.data else load_digits(args.seed)
    epochs = args.epochs or _EPOCHS["idx" if args.data else "digits"]

    experiment = Experiment(data, where, batch_size=args.batch_size, lr=args.lr, seed=args.seed)
    if experiment.steps == 0:
        raise CommandError(f"expected at least 2 training images, got {len(data.train_labels)}")
    print(_headline(data, where, args))
    _train(experiment, epochs, args.lr, progress)

    results = _results(experiment, args, epochs)
    print("\n" + "\n".join(_report(results)))
    _save(args.out, data, results)
    return 0 if results["verdict"]["agree"] else 1


def _headline(data: Dataset, where, args):
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    sizes = f"{len(data.train_labels)} training and {len(data.test_labels)} test images"
    return f"{data.name}: {sizes}; batch {args.batch_size}, SGD lr {args.lr:g}, seed {args.seed}, on {name}\n"


def _train(experiment, epochs, lr, progress):
    names = list(experiment.runs)
    print(f"{'':5}  {'training loss':^34}  {'test accuracy':^34}")
    print("  ".join(["epoch", *(f"{name:>10}" for name in names * 2)]))
    for epoch in range(1, epochs + 1):
        steps = progress(
            experiment.epoch(), total=experiment.steps, desc=f"epoch {epoch}/{epochs}", unit="step", leave=False
        )
        for _ in steps:
            pass
        losses = [f"{run.loss[-1]:10.4f}" for run in experiment.runs.values()]
        accuracies = [f"{run.accuracy[-1]:10.2%}" for run in experiment.runs.values()]
        print("  ".join([f"{epoch:5}", *losses, *accuracies]), flush=True)
        # With fastbn's alone the verdict deals.
        diverged = [name for name in (PLAIN, STOCK) if not math.isfinite(experiment.runs[name].loss[-1])]
        if diverged:
            got = f"{experiment.runs[diverged[0]].loss[-1]} of {diverged[0]} after epoch {epoch}"
            raise RunError(f"expected a finite loss, got {got}: choose a smaller --lr than {lr:g}")


def _results(experiment, args, epochs):
    runs = experiment.runs
    plain, stock, fast = runs[PLAIN], runs[STOCK], runs[FASTBN]
    same_net, largest_logit = experiment.same_net_gap()
    difference = {
        "first_loss": abs(fast.first_loss - stock.first_loss),
        "same_net_logits": same_net,
        "loss": _largest_gap(fast.loss, stock.loss),
        "accuracy": _largest_gap(fast.accuracy, stock.accuracy),
        "logits_after_epoch_1": (fast.logits - stock.logits).abs().max().item(),
    }
    gap = _largest_gap(plain.loss, stock.loss)
    return {
        "data": experiment.data.name,
        "device": str(experiment.device),
        "torch": torch.__version__,
        "settings": {"epochs": epochs, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed},
        "loss": {name: run.loss for name, run in runs.items()},
        "accuracy": {name: run.accuracy for name, run in runs.items()},
        "milliseconds_a_step": {name: run.timer.medians() for name, run in runs.items()},
        "difference_fastbn_torch": difference,
        "verdict": _verdict(difference, stock.first_loss, largest_logit, gap),
    }


def _largest_gap(first, second):
    return max(abs(a - b) for a, b in zip(first, second))


def _verdict(difference, first_loss, largest_logit, gap_without_bn):
    bounds = {
        # Float32 rounding through five layers is some 1e-6 of either; more is room for TF32 convolutions.
        "first_loss": 1e-4 * first_loss,
        "same_net_logits": 1e-3 * largest_logit,
        # An estimate: one ulp in one weight of torch.nn's net moves its curve by about a hundredth of this gap.
        "loss": 0.05 * gap_without_bn,
    }
    # Not `difference > bound`: NaN must count as beyond.
    beyond = [name for name, bound in bounds.items() if not difference[name] <= bound]
    return {"agree": not beyond, "beyond": beyond, "bounds": bounds}


def _report(results):
    yield "Milliseconds a training step in BatchNorm (median)"
    rows = [["", "forward", "backward", "whole step"]]
    for name, times in results["milliseconds_a_step"].items():
        spent = ["-", "-"] if name == PLAIN else [f"{times[part]:.3f}" for part in ("forward", "backward")]
        rows.append([name, *spent, f"{times['step']:.3f}"])
    yield from table(rows)

    difference = results["difference_fastbn_torch"]
    yield "\nLargest difference between fastbn and torch.nn"
    yield from table(
        [
            ["", "got", "at most"],
            *(_bounded(results, *row) for row in _BOUNDED),
            ["test accuracy of an epoch", f"{difference['accuracy']:.2%}", ""],
            ["logits of the test set after epoch 1", f"{difference['logits_after_epoch_1']:.2e}", ""],
        ]
    )

    best = {name: max(values) for name, values in results["accuracy"].items()}
    yield f"\nBest test accuracy: {', '.join(f'{name} {value:.2%}' for name, value in best.items())}."
    if results["verdict"]["agree"]:
        yield "Verdict: fastbn trains as torch.nn does."
    else:
        beyond = ", ".join(results["verdict"]["beyond"])
        yield f"Verdict: fastbn does NOT train as torch.nn does: {beyond} too far off."


def _bounded(results, name, text):
    got, bound = results["difference_fastbn_torch"][name], results["verdict"]["bounds"][name]
    return [text, f"{got:.2e}", f"{bound:.2e}"]


def _save(out, data, results):
    from fastbn.cli.curves import save_curves

    settings = results["settings"]
    title = f"LeNet with sigmoids on {data.name}: batch {settings['batch_size']}, SGD lr {settings['lr']:g}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
        save_curves(out / CURVES, title, results["loss"], results["accuracy"])
    except OSError as error:
        raise RunError(f"--out: cannot write to {out}: {reason(error)}") from None
    print(f"Saved {out / CURVES} and {out / RESULTS}.")
