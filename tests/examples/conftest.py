"""What the tests of trainings on small tensors share."""

import pytest
import torch

from examples.lenet.data import load_digits


@pytest.fixture(scope="module")
def data():
    return load_digits(seed=0)


@pytest.fixture
def one_thread():
    """Compute on one thread, as the commands do: the tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
