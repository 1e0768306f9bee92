"""What the tests of trainings on small tensors share."""

import pytest

from examples.lenet.data import load_digits


@pytest.fixture(scope="module")
def data():
    return load_digits(seed=0)
