"""The option to measure the limits of plans: what is measured, when, and that nothing of it shows but the plan.

There may be no GPU, so times are invented: a table of them by the limits that are tried.
"""

from __future__ import annotations

import json

import pytest
import torch

import fastbn
from fastbn.backends import reference
from fastbn.backends.triton import tuning
from tests import implementations


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Turn the option on, with a file of its own. Returns the limits that were tried, and times by what changed."""
    implementation = implementations.load("triton")
    from fastbn.backends.triton import ops

    monkeypatch.setattr(ops, "limits_of", tuning.limits_of)
    monkeypatch.setattr(tuning, "IS_ON", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tried, times = [], {}

    def milliseconds(call):
        call()
        tried.append(tuning._tried.get())
        return next((times[name] for name in times if getattr(tried[-1], name[0]) == name[1]), 1.0)

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    _forget()
    yield implementation, tried, times
    _forget()


def _forget():
    """Forget what this process knows, as a new one would."""
    tuning._file.cache_clear()
    tuning._variants.cache_clear()


def _train(implementation, n, channels=3, side=8, dtype=torch.float32):
    x = torch.randn(n, channels, side, side, dtype=dtype, device=implementation.device)
    arguments = (x, None, None, None, None, None, None, 0.1, 1e-5, 0, False)
    got, exact = (ops.batch_norm_train(*arguments)[0] for ops in (implementation.namespace, reference))
    torch.testing.assert_close(got, exact)
    return x


def test_the_fastest_variant_is_used_from_then_on(tuned):
    implementation, tried, times = tuned
    times["resident_elements", 0] = 0.5
    x = _train(implementation, 4)
    assert len(tried) == len({id(limits) for limits in tried}) > 1
    known = tuning.known_limits(x.device, tuning.plans.layout_of_tensor(x), x.dtype, "forward")
    assert known.resident_elements == 0
    plan = fastbn.explain(x, backend="triton")
    assert plan.kernel == "split_channels" and plan.launches == 3


def test_a_new_batch_size_measures_nothing_and_another_kind_does(tuned):
    implementation, tried, times = tuned
    _train(implementation, 4)
    count = len(tried)
    _train(implementation, 5)
    _train(implementation, 4)
    assert len(tried) == count
    _train(implementation, 4, channels=2)
    assert len(tried) > count


def test_backward_is_measured_by_itself(tuned):
    implementation, tried, times = tuned
    x = _train(implementation, 4).requires_grad_()
    count = len(tried)
    fastbn.functional.batch_norm(x, None, None, training=True, backend="triton").sum().backward()
    assert len(tried) > count


def test_the_rules_stay_where_nothing_is_clearly_faster(tuned):
    implementation, tried, times = tuned
    times["resident_elements", 0] = 0.98
    x = _train(implementation, 4)
    layout = tuning.plans.layout_of_tensor(x)
    assert tuning.known_limits(x.device, layout, x.dtype, "forward") == tuning._limits_by_rule(x.device)


def test_a_later_process_reads_the_file(tuned):
    implementation, tried, times = tuned
    times["resident_elements", 0] = 0.5
    _train(implementation, 4)
    count = len(tried)
    assert list(json.loads(tuning._file().read_text()).values()) == [{"resident_elements": 0}]
    _forget()
    x = _train(implementation, 4)
    assert len(tried) == count and fastbn.explain(x, backend="triton").launches == 3


def test_a_file_that_is_none_is_written_again(tuned):
    implementation, tried, times = tuned
    tuning._file().parent.mkdir()
    tuning._file().write_text("{")
    _train(implementation, 4)
    assert tried and json.loads(tuning._file().read_text())


def test_a_folder_that_cannot_be_written_costs_the_file_only(tuned, tmp_path):
    implementation, tried, times = tuned
    (tmp_path / "fastbn").write_text("a file, not a folder")
    _train(implementation, 4)
    count = len(tried)
    _train(implementation, 4)
    assert len(tried) == count > 0


def test_out_of_memory_leaves_the_rules(tuned, monkeypatch):
    implementation, tried, times = tuned

    def fail(*call):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tuning, "_example", fail)
    x = _train(implementation, 4)
    layout = tuning.plans.layout_of_tensor(x)
    assert tuning.known_limits(x.device, layout, x.dtype, "forward") == tuning._limits_by_rule(x.device)


def test_nothing_is_measured_while_a_graph_is_captured(tuned, monkeypatch):
    implementation, tried, times = tuned
    monkeypatch.setattr(tuning, "_is_capturing", lambda device: True)
    _train(implementation, 4)
    assert not tried


def test_random_numbers_of_the_user_are_left_alone(tuned):
    implementation, tried, times = tuned
    torch.manual_seed(7)
    _train(implementation, 4)
    after = torch.rand(1)
    assert tried
    torch.manual_seed(7)
    _train(implementation, 4)
    assert torch.equal(after, torch.rand(1))


def test_it_is_off_unless_asked_for():
    assert not tuning.IS_ON
