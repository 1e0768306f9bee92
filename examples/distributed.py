"""The demo's LeNet in several processes on a CPU, by DistributedDataParallel and synchronised BatchNorm.

    python -m examples.distributed --processes 2 --epochs 3

Each process has its share of each batch. Statistics are those of the whole batch, so what comes out is what one process
computes, which is trained first for comparison; without `sync=True` it would be another network. On GPUs the same code
takes "nccl" and a device for each process.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.multiprocessing
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fastbn
from examples.lenet.data import Dataset, load_digits
from examples.lenet.experiment import lenet

BATCH, SEED = 64, 0


def train(net: nn.Module, data: Dataset, epochs: int, lr: float, rank: int = 0, processes: int = 1) -> None:
    """Train with this rank's samples of each batch. A last batch that is not full is left out, so that all shares are
    equal: the average of their gradients is that of the batch only then."""
    optimiser, order = torch.optim.SGD(net.parameters(), lr=lr), torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_labels), generator=order).split(BATCH):
            if len(batch) == BATCH:
                own = batch.chunk(processes)[rank]
                optimiser.zero_grad()
                cross_entropy(net(data.train_images[own].float() / 255), data.train_labels[own]).backward()
                optimiser.step()


@torch.no_grad()
def accuracy(net: nn.Module, data: Dataset) -> float:
    """Return the share of the test images that the network gets right in evaluation."""
    predicted: Tensor = net.eval()(data.test_images.float() / 255).argmax(1)
    return (predicted == data.test_labels).double().mean().item()


def new_net() -> nn.Module:
    torch.manual_seed(SEED)
    return lenet(batch_norm=True)


def work(rank: int, processes: int, folder: str, epochs: int, lr: float) -> None:
    """Be one of the processes; the first one writes the trained state."""
    torch.set_num_threads(1)
    store = Path(folder, "store").as_uri()
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    net = DistributedDataParallel(fastbn.convert(new_net(), sync=True))
    train(net, load_digits(SEED), epochs, lr, rank, processes)
    if rank == 0:
        torch.save(net.module.state_dict(), Path(folder, "state.pt"))
    distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Train both ways, print and return the accuracies on the test set: of one process, and of several."""
    parser = argparse.ArgumentParser(prog="python -m examples.distributed", description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=2, choices=(1, 2, 4, 8), help="default: 2")
    parser.add_argument("--epochs", type=int, default=3, help="default: 3")
    parser.add_argument("--lr", type=float, default=1.0, help="SGD's learning rate (default: 1)")
    args = parser.parse_args(argv)
    data, alone = load_digits(SEED), fastbn.convert(new_net())
    train(alone, data, args.epochs, args.lr)
    with tempfile.TemporaryDirectory() as folder:
        arguments = args.processes, folder, args.epochs, args.lr
        torch.multiprocessing.spawn(work, arguments, args.processes)
        together = new_net()
        together.load_state_dict(torch.load(Path(folder, "state.pt")))
    results = accuracy(alone, data), accuracy(together, data)
    for processes, result in zip((1, args.processes), results, strict=True):
        print(f"{processes} process{'es' if processes > 1 else '  '}: {result:.2%} of the test images")
    return results


if __name__ == "__main__":
    main()
