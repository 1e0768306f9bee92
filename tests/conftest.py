"""Skips large and interpreted tests unless asked for, and tests whose packages are missing; fills unwritten outputs
with NaN; provides the fixture `ops`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch

from fastbn.backends import crossings
from fastbn.testing import cases
from tests import implementations, packages, tiers
from tests.emulator import build

# One setup of so many is in the fast tier where Triton is interpreted.
INTERPRETED_SAMPLE = 41


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for name in ("large", "interpreted"):
        if name in config.getoption("markexpr"):
            continue
        for item in items:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"{name}: ask for it with -m {name}"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        packages.require(*mark.args)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test of `ops` on every implementation; if it takes a `setup` too, on the setups that suit each."""
    marked = any(m.name == "parametrize" and "ops" in m.args[0] for m in metafunc.definition.iter_markers())
    if "ops" not in metafunc.fixturenames or marked:
        return
    if "setup" not in metafunc.fixturenames:
        metafunc.parametrize("ops", implementations.params(), indirect=True)
        return
    pairs = []
    for param in implementations.params():
        # Where a launch costs milliseconds per block, cases are small, and those that kernels see: dense.
        table = cases.SMALL_DENSE if implementations.is_slow(param.id) else cases.ORDINARY
        for number, setup in enumerate(cases.setups(table)):
            is_sampled = param.id in implementations.TRITON_LIMITS and number % INTERPRETED_SAMPLE == 0
            marks = [*(() if is_sampled else param.marks), *tiers.marks(setup.case)]
            pairs.append(pytest.param(param.id, setup, id=f"{param.id}-{setup}", marks=marks))
    metafunc.parametrize("ops,setup", pairs, indirect=["ops"])


@pytest.fixture(autouse=True)
def _whatever_their_size() -> Iterator[None]:
    """Give the ops the small calls too, of which tests are made."""
    with crossings.ignored():
        yield


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        implementations.require_gpu()


@pytest.fixture(scope="session")
def _loaded() -> dict[str, implementations.Implementation | Exception]:
    return {}


@pytest.fixture
def ops(request: pytest.FixtureRequest, _gpu: None, _loaded: dict) -> implementations.Implementation:
    if request.param not in _loaded:
        try:
            _loaded[request.param] = implementations.load(request.param)
        except Exception as error:  # remembered, so that a broken build is tried once and not per test
            _loaded[request.param] = error
    if isinstance(_loaded[request.param], Exception):
        raise _loaded[request.param]
    if request.param in implementations.TRITON_LIMITS:
        implementations.set_triton_limits(request.param)
    if request.param in implementations.EMULATED_LIMITS:
        build.load().set_limits(**implementations.EMULATED_LIMITS[request.param])
        # Each test gets a schedule of its own, the same from run to run.
        build.load().set_seed(zlib.crc32(request.node.nodeid.encode()))
    return _loaded[request.param]


@pytest.fixture
def one_thread():
    """Run torch on one thread: for calls on few elements, where waking a second thread takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """Fill fresh tensors with NaN, also those that an op allocates, so that an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill
