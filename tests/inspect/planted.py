"""Networks with planted faults, and the findings that `fastbn.doctor` owes: one network in training with a fault per
layer, one in evaluation, and a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHANNELS = 8
SHAPE = (4, 3, 8, 8)


def _unit(bias: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1, bias=bias), nn.BatchNorm2d(CHANNELS), nn.ReLU())


class Faulty(nn.Module):
    """A network in training mode, in which each layer but `sound`'s has the fault that its name says."""

    def __init__(self) -> None:
        super().__init__()
        self.sound = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        self.nan_mean, self.infinite_var, self.nan_weight, self.infinite_bias = (_unit() for _ in range(4))
        self.negative, self.zero, self.exploded, self.exploded_mean = (_unit() for _ in range(4))
        self.never_updated, self.unmoved, self.lost_counter, self.zero_weight = (_unit() for _ in range(4))
        self.zero_eps, self.zero_momentum, self.keras_momentum, self.untracked = (_unit() for _ in range(4))
        self.by_eval, self.half_frozen = _unit(), _unit()
        self.biased = _unit(bias=True)
        self.after_relu = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU(), nn.BatchNorm2d(CHANNELS))
        self.after_dropout = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        self.shared = nn.BatchNorm2d(CHANNELS)
        self.few, self.one = nn.BatchNorm1d(CHANNELS), nn.BatchNorm1d(CHANNELS)
        self.head = nn.Linear(CHANNELS, 10)
        self._plant()

    def _plant(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.num_batches_tracked.fill_(100)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
        with torch.no_grad():
            self.nan_mean[1].running_mean[1] = torch.nan
            self.infinite_var[1].running_var[2] = torch.inf
            self.nan_weight[1].weight[0] = torch.nan
            self.infinite_bias[1].bias[3:5] = -torch.inf
            self.negative[1].running_var[2] = -0.1
            self.zero[1].running_var[:3] = 0
            self.exploded[1].running_var[4] = 1e12
            self.exploded_mean[1].running_mean[4] = -1e6
            self.zero_weight[1].weight.zero_()
        self.never_updated[1].reset_running_stats()
        self.unmoved[1].running_mean.zero_()
        self.unmoved[1].running_var.fill_(1)
        self.lost_counter[1].momentum = None
        self.lost_counter[1].num_batches_tracked.zero_()
        self.zero_eps[1].eps = 0.0
        self.zero_momentum[1].momentum = 0.0
        self.keras_momentum[1].momentum = 0.99
        self.untracked[1] = nn.BatchNorm2d(CHANNELS, track_running_stats=False)
        self.by_eval[1].eval()
        self.half_frozen[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.infinite_bias(self.nan_weight(self.infinite_var(self.nan_mean(self.sound(x)))))
        x = self.exploded_mean(self.exploded(self.zero(self.negative(x))))
        x = self.zero_weight(self.lost_counter(self.unmoved(self.never_updated(x))))
        x = self.untracked(self.keras_momentum(self.zero_momentum(self.zero_eps(x))))
        x = self.biased(self.half_frozen(self.by_eval(x)))
        x = self.after_dropout(self.after_relu(x))
        x = self.shared(x) + self.shared(x + 1)
        x = self.few(x.mean((2, 3)))
        return self.head(x + self.one(x.mean(0, keepdim=True)))


FINDINGS = {
    ("not-finite", "nan_mean.1"),
    ("not-finite", "infinite_var.1"),
    ("not-finite", "nan_weight.1"),
    ("not-finite", "infinite_bias.1"),
    ("negative-variance", "negative.1"),
    ("zero-variance", "zero.1"),
    ("exploded-statistics", "exploded.1"),
    ("exploded-statistics", "exploded_mean.1"),
    ("never-updated", "never_updated.1"),
    ("never-updated", "unmoved.1"),
    ("lost-counter", "lost_counter.1"),
    ("zero-weight", "zero_weight.1"),
    ("zero-eps", "zero_eps.1"),
    ("zero-momentum", "zero_momentum.1"),
    ("large-momentum", "keras_momentum.1"),
    ("untracked-statistics", "untracked.1"),
    ("frozen-by-eval", "by_eval.1"),
    ("half-frozen", "half_frozen.1"),
    ("bias-before-norm", "biased.0"),
    ("activation-before-norm", "after_relu.2"),
    ("dropout-before-norm", "after_dropout.1"),
    ("shared-layer", "shared"),
    ("small-batch", "few"),
    ("one-value-per-channel", "one"),
}


def evaluated() -> tuple[nn.Module, set[tuple[str, str]]]:
    """Return a network in evaluation mode with the faults that only such a one can have, and its findings."""
    model = nn.Sequential(*(nn.BatchNorm2d(CHANNELS) for _ in range(3))).eval()
    for norm in model[1:]:
        nn.init.normal_(norm.running_mean)
        norm.num_batches_tracked.fill_(3)
    model[2].train()
    return model, {("never-updated", "0"), ("training-in-eval", "2")}


def checkpoint() -> tuple[dict[str, object], set[tuple[str, str]]]:
    """Return what a training loop might have saved, with faults, and the findings in it."""
    state = Faulty().state_dict()
    del state["sound.1.num_batches_tracked"]
    del state["by_eval.1.running_var"]
    state["half_frozen.1.num_batches_tracked"].zero_()
    saved = {"epoch": 3, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}}
    saved["state_dict"] = {f"module.{key}": tensor for key, tensor in state.items()}
    in_values = {
        "not-finite",
        "negative-variance",
        "zero-variance",
        "exploded-statistics",
        "never-updated",
        "zero-weight",
    }
    return saved, {(code, layer) for code, layer in FINDINGS if code in in_values} | {
        ("missing-counter", "sound.1"),
        ("missing-counter", "lost_counter.1"),
        ("missing-counter", "half_frozen.1"),
        ("incomplete-statistics", "by_eval.1"),
    }
