"""A LightningModule with BatchNorm, and the plugin of docs/tools.md; spawned processes import it, so it has a file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import nn

import fastbn
from tests.stock import normal

SAMPLES, STEPS = 8, 3


class FastSyncBatchNorm(TorchSyncBatchNorm):
    def apply(self, model):
        return fastbn.convert(model, sync=True)

    def revert(self, model):
        return fastbn.revert(model)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
        ).double()

    def training_step(self, batch):
        assert type(self.net[1]) is fastbn.SyncBatchNorm and self.trainer.world_size == 2
        return self.loss(*batch)

    def loss(self, images, labels):
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        # Lightning shares the samples out: an epoch is a step, of half of them in each process.
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples()), batch_size=SAMPLES // 2)


def samples():
    """Return images and labels."""
    return normal(SAMPLES, 3, 4, 4), torch.arange(SAMPLES) % 5
