"""The faults that `fastbn.doctor` knows, by their codes: how bad each is, why it matters and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
# The worst first. error: results are wrong, or a call raises. warning: hardly what was meant. note: a cost or a risk.
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class Fault(NamedTuple):
    """What is the same for every layer that has a fault."""

    severity: Severity
    why: str
    advice: str


@dataclass(frozen=True)
class Finding:
    """One fault of one layer.

    layer: its path in the model or state_dict. code: the fault's name, a key of FAULTS and a heading of docs/doctor.md.
    severity: "error", "warning" or "note". message: what was seen in this layer. why: why that matters. advice: what to
    do about it.
    """

    layer: str
    code: str
    severity: Severity
    message: str
    why: str
    advice: str


def finding(code: str, layer: str, message: str) -> Finding:
    """Return the finding of the fault `code` in `layer`, of which `message` says what was seen there."""
    fault = FAULTS[code]
    return Finding(layer, code, fault.severity, message, fault.why, fault.advice)


# In the order of the report: by severity, then values, settings, modes, order, batches.
FAULTS: dict[str, Fault] = {
    "not-finite": Fault(
        "error",
        "NaN or infinity in a statistic or parameter is in every output of the channel, and a moving average keeps it.",
        "Restore the layer from an earlier checkpoint, and look for the batch or the loss that made the value.",
    ),
    "negative-variance": Fault(
        "error",
        "A variance is never below 0. Below -eps its square root is NaN, and so is the channel in evaluation. "
        "Arithmetic on checkpoints (extrapolation, differences of weights) makes such values, or a damaged file.",
        "Leave running statistics out of such arithmetic, and compute them again: fastbn.population_stats.",
    ),
    "incomplete-statistics": Fault(
        "error",
        "Neither can be used without the other, and load_state_dict refuses such a checkpoint.",
        "Save the whole state_dict, buffers included.",
    ),
    "zero-eps": Fault(
        "error",
        "A channel whose variance is 0 is divided by 0, and torch refuses to train without a positive eps.",
        "Set eps to 1e-5, torch's default, or to the value that the model was trained with.",
    ),
    "one-value-per-channel": Fault(
        "error",
        "One value has no variance, and torch raises ValueError in training.",
        "Use larger batches; drop_last=True in the DataLoader where it is the last batch of an epoch.",
    ),
    "zero-variance": Fault(
        "warning",
        "Either the channel was constant in training, a dead one, or the buffer was overwritten. In evaluation a "
        "deviation from the running mean is multiplied by weight / sqrt(eps), 316 for a weight of 1.",
        "Prune or reset dead channels. Where every channel is 0, compute the statistics: fastbn.population_stats.",
    ),
    "exploded-statistics": Fault(
        "warning",
        "Activations of that size overflow float16, whose largest number is 65504. Mostly the network before the layer "
        "diverged for a few batches, or its inputs are not scaled.",
        "Check the scale of the inputs and the learning rate, and then compute the statistics again: "
        "fastbn.population_stats.",
    ),
    "never-updated": Fault(
        "warning",
        "Evaluation normalises by statistics that come from no data: the layer only applies its weight and bias.",
        "Run some batches in training mode first, or load the buffers too; fastbn.population_stats computes them.",
    ),
    "lost-counter": Fault(
        "warning",
        "With momentum=None the next batch has the factor 1 / 1, and replaces all that the statistics hold.",
        "Set num_batches_tracked to the number of batches that they come from, or give a momentum.",
    ),
    "zero-momentum": Fault(
        "warning",
        "In torch the momentum is the weight of the newest batch, so the running statistics never move.",
        "Set momentum to 0.1, torch's default; to keep statistics on purpose, use fastbn.freeze(model).",
    ),
    "large-momentum": Fault(
        "warning",
        "In torch the momentum is the weight of the newest batch, so the statistics are mostly those of the last one. "
        "TensorFlow and Keras count the other way: their 0.99 is 0.01 in torch.",
        "Set it to 1 minus the value of the other framework.",
    ),
    "frozen-by-eval": Fault(
        "warning",
        "The layer normalises by its running statistics while the model trains, until the next model.train(), which "
        "undoes it.",
        "To freeze it, use fastbn.freeze(model), which survives .train(); otherwise call model.train().",
    ),
    "half-frozen": Fault(
        "warning",
        "requires_grad=False stops weight and bias alone: the layer normalises by the batch, and its statistics "
        "move. A freeze by .eval() that .train() has undone looks like this.",
        "Use fastbn.freeze(model), whose layers keep their statistics in every mode.",
    ),
    "training-in-eval": Fault(
        "warning",
        "Outputs depend on what else is in the batch, and every evaluation moves the running statistics.",
        "Call model.eval() after everything else that sets modes.",
    ),
    "activation-before-norm": Fault(
        "warning",
        "Most layers of this model come before their activation. After it, the statistics are those of what the "
        "activation has cut, and the block ends without one.",
        "Swap the two, unless it is meant.",
    ),
    "dropout-before-norm": Fault(
        "warning",
        "Dropout raises the variance in training and not in evaluation, so that the running variance does not fit "
        "there (Li et al. 2019).",
        "Put the dropout after the last BatchNorm.",
    ),
    "shared-layer": Fault(
        "warning",
        "Its running statistics are a mix of all that it is given, which fits none of it in evaluation, and move once "
        "a call.",
        "Give each place a layer of its own; weight and bias may be shared.",
    ),
    "missing-counter": Fault(
        "note",
        "Nothing depends on it, except with momentum=None, where the next batch would replace the statistics. Old "
        "checkpoints and those of other frameworks have none.",
        "Set it to the number of batches that the statistics come from, if momentum is None.",
    ),
    "zero-weight": Fault(
        "note",
        "The layer gives its bias, whatever its input. As an initial value of a residual branch that is usual, but "
        "training should have moved it.",
        "Check that the weight is trained, or remove the branch.",
    ),
    "untracked-statistics": Fault(
        "note",
        "Evaluation normalises by the batch as training does: outputs depend on what else is in it, and a batch of one "
        "may fail.",
        "Use track_running_stats=True, unless batches are as large and mixed in use.",
    ),
    "bias-before-norm": Fault(
        "note",
        "Normalisation subtracts the mean and the bias with it: its gradient is 0, yet it is computed, stored and "
        "reduced among processes.",
        "Make the layer with bias=False; the BatchNorm has a bias.",
    ),
    "small-batch": Fault(
        "note",
        "The statistics of training are noisy, and evaluation, which uses their average, computes something else.",
        "Use larger batches, fastbn.SyncBatchNorm or fastbn.accumulate, freeze the layers, or use GroupNorm.",
    ),
}
