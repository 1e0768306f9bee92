"""The images of the demo: Fashion-MNIST from its four IDX files, or scikit-learn's digits."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from examples.lenet.idx import find_idx, read_idx
from fastbn.cli.errors import CommandError, reason, require

SIDE, CLASSES = 28, 10


@dataclass(frozen=True)
class Dataset:
    """A data set. Images are uint8 (N, 1, 28, 28), labels int64 (N,) from 0 to 9."""

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    def to(self, device: torch.device) -> "Dataset":
        return Dataset(self.name, *(getattr(self, field).to(device) for field in list(self.__dataclass_fields__)[1:]))


def load_idx_directory(directory: Path) -> Dataset:
    """Load the data set in the files {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz] of `directory`.

    Raises CommandError where a file is missing or is not what its name says, or where images and labels do not match.
    """
    try:
        is_directory, why = stat.S_ISDIR(directory.stat().st_mode), "a file"
    except OSError as error:
        is_directory, why = False, reason(error)
    if not is_directory:
        raise CommandError(f"--data: expected a directory, got {directory}: {why}")
    # The name is printed, drawn and written, and may contain bytes that are not text.
    name = os.fsencode(directory.resolve().name).decode(errors="replace")
    return Dataset(name, *_part(directory, "train"), *_part(directory, "t10k"))


def load_digits(seed: int) -> Dataset:
    """Load scikit-learn's 1,797 digits, scaled up bilinearly from 8x8 pixels; a stratified fifth is the test set."""
    datasets = require("demo", "sklearn.model_selection", "sklearn.datasets")
    from sklearn.model_selection import train_test_split

    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(images).view(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear").mul(255).round().to(torch.uint8)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    labels = torch.from_numpy(labels).long()
    return Dataset("scikit-learn digits", images[train], labels[train], images[test], labels[test])


def _part(directory, part):
    images_path = find_idx(directory, f"{part}-images-idx3-ubyte")
    labels_path = find_idx(directory, f"{part}-labels-idx1-ubyte")

    def check_images(sizes):
        if sizes[1:] != (SIDE, SIDE):
            got = " x ".join(map(str, sizes[1:]))
            raise CommandError(f"{images_path}: expected images of {SIDE} x {SIDE} pixels, got {got}")

    def check_labels(sizes):
        if sizes != (len(images),):
            raise CommandError(f"{labels_path}: expected {len(images)} labels, one per image, got {sizes[0]}")

    images = read_idx(images_path, 3, check_images)
    labels = read_idx(labels_path, 1, check_labels)
    if labels.max() >= CLASSES:
        raise CommandError(f"{labels_path}: expected labels from 0 to {CLASSES - 1}, got {labels.max()}")
    return images.unsqueeze(1), labels.long()
