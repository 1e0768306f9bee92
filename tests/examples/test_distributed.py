"""examples/distributed.py: two processes reach the accuracy of one."""

from __future__ import annotations

import pytest
import torch

from examples import distributed
from examples.lenet.data import Dataset


@pytest.mark.slow
def test_two_processes_reach_the_accuracy_of_one(capsys):
    alone, together = distributed.main(["--processes", "2", "--epochs", "3"])
    # An image of the test set is 0.28 %: rounding may turn a few that are close calls.
    assert alone > 0.9 and abs(alone - together) < 0.01
    assert f"2 processes: {together:.2%} of the test images" in capsys.readouterr().out


def test_shares_of_a_batch_add_up_to_it():
    """One step of a network without BatchNorm moves by the average of what the shares move by."""
    images = torch.randint(0, 256, (distributed.BATCH + 1, 1, 28, 28), dtype=torch.uint8)
    labels = torch.arange(len(images)) % 10
    data = Dataset("noise", images, labels, images, labels)
    moves = []
    for rank, processes in ((0, 1), (0, 2), (1, 2)):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)).double()
        before = net[1].weight.detach().clone()
        distributed.train(_InDouble(net), data, 1, 0.1, rank, processes)
        moves.append(net[1].weight.detach() - before)
    torch.testing.assert_close(moves[0], (moves[1] + moves[2]) / 2)


class _InDouble(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images.double())
