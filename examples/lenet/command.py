"""The work of `fastbn demo`: train the three nets, print and judge how they compare, write curves and numbers."""

import json
import math

import torch

from examples.lenet.data import Dataset, load_digits, load_idx_directory
from examples.lenet.experiment import FASTBN, PLAIN, STOCK, Experiment
from fastbn.cli.arguments import check_directory
from fastbn.cli.demo import EPOCHS
from fastbn.cli.errors import CommandError, RunError, device, reason, require
from fastbn.cli.text import table

CURVES, RESULTS = "curves.png", "results.json"
_BOUNDED = [
    ("first_loss", "loss of the first step"),
    ("same_net_logits", "logits of torch.nn's trained net, evaluated by each"),
    ("loss", "training loss of an epoch"),
]


def run(args) -> int:
    """Train and report. Returns 0, or 1 if fastbn does not train as torch.nn does. Raises CommandError for misuse."""
    where = device(args.device)
    progress = require("demo", "matplotlib", "tqdm").tqdm
    check_directory("--out", args.out, RESULTS, CURVES)
    data = load_idx_directory(args.data) if args.data else load_digits(args.seed)
    epochs = args.epochs or EPOCHS["idx" if args.data else "digits"]

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
        # If fastbn's diverges alone, the verdict says so.
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
        "milliseconds_per_step": {name: run.timer.medians() for name, run in runs.items()},
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
    # `difference > bound` would let NaN pass.
    beyond = [name for name, bound in bounds.items() if not difference[name] <= bound]
    return {"agree": not beyond, "beyond": beyond, "bounds": bounds}


def _report(results):
    yield "Milliseconds per training step in BatchNorm (median)"
    rows = [["", "forward", "backward", "whole step"]]
    for name, times in results["milliseconds_per_step"].items():
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
    from examples.lenet.curves import save_curves

    settings = results["settings"]
    title = f"LeNet with sigmoids on {data.name}: batch {settings['batch_size']}, SGD lr {settings['lr']:g}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
        save_curves(out / CURVES, title, results["loss"], results["accuracy"])
    except OSError as error:
        raise RunError(f"--out: cannot write to {out}: {reason(error)}") from None
    print(f"Saved {out / CURVES} and {out / RESULTS}.")
