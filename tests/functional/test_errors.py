"""Bad calls raise torch's exception with torch's words for the same call, and change no buffer."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

import fastbn
from fastbn.ops import contract, dispatch
from fastbn.ops.activations import ACTIVATIONS
from tests.stock import FAST, STOCK, normal


def _zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


FOUR = _zeros(4)
# name: (input, running_mean, running_var, other arguments of F.batch_norm)
CALLS = {
    "one_value": (_zeros(1, 4), FOUR, FOUR, {"training": True}),
    "one_value_and_space": (_zeros(1, 4, 1, 1), None, None, {"training": True}),
    "mean_size": (_zeros(3, 4), _zeros(3), FOUR, {}),
    "mean_size_train": (_zeros(3, 4), _zeros(3), FOUR, {"training": True}),
    "var_size_train": (_zeros(3, 4), FOUR, _zeros(3), {"training": True}),
    "weight_size": (_zeros(3, 4), FOUR, FOUR, {"weight": _zeros(5)}),
    "weight_size_train": (_zeros(3, 4), FOUR, FOUR, {"weight": _zeros(5), "training": True}),
    "bias_size_train": (_zeros(3, 4), FOUR, FOUR, {"bias": _zeros(5), "training": True}),
    "no_stats_in_eval": (_zeros(3, 4), None, None, {}),
    "no_mean_in_eval": (_zeros(3, 4), None, FOUR, {}),
    "no_var_in_eval": (_zeros(3, 4), FOUR, None, {}),
    "no_mean_in_train": (_zeros(3, 4), None, FOUR, {"training": True}),
    "no_var_in_train": (_zeros(3, 4), FOUR, None, {"training": True}),
    "stats_require_grad": (_zeros(3, 4), _zeros(4).requires_grad_(), FOUR, {"training": True}),
    "var_requires_grad": (_zeros(3, 4), FOUR, _zeros(4).requires_grad_(), {"training": True}),
    "var_requires_grad_eval": (_zeros(3, 4), FOUR, _zeros(4).requires_grad_(), {}),
    "integers": (_zeros(3, 4, dtype=torch.int32), FOUR, FOUR, {}),
    "integers_train": (_zeros(3, 4, dtype=torch.int32), FOUR, FOUR, {"training": True}),
    "no_channels": (_zeros(3, 0), _zeros(0), _zeros(0), {}),
    "no_channels_train": (_zeros(3, 0), _zeros(0), _zeros(0), {"training": True}),
    "no_channels_affine": (_zeros(3, 0), _zeros(0), _zeros(0), {"weight": _zeros(0), "training": True}),
    "no_dimensions": (_zeros(), FOUR, FOUR, {}),
    "one_dimension": (_zeros(4), FOUR, FOUR, {}),
    "negative_eps": (_zeros(3, 4), FOUR, FOUR, {"eps": -1.0}),
    "zero_eps": (_zeros(3, 4), FOUR, FOUR, {"eps": 0.0}),
    "zero_eps_train": (_zeros(3, 4), FOUR, FOUR, {"eps": 0.0, "training": True}),
    "negative_eps_train": (_zeros(3, 4), FOUR, FOUR, {"eps": -1.0, "training": True}),
    "double_input": (_zeros(3, 4, dtype=torch.float64), FOUR, FOUR, {"training": True}),
    "half_parameters": (_zeros(3, 4), *[_zeros(4, dtype=torch.bfloat16)] * 2, {"training": True}),
    "double_parameters": (
        _zeros(3, 4, dtype=torch.bfloat16),
        *[_zeros(4, dtype=torch.float64)] * 2,
        {"training": True},
    ),
    "different_parameters": (
        _zeros(3, 4, dtype=torch.bfloat16),
        FOUR,
        FOUR,
        {"weight": _zeros(4, dtype=torch.bfloat16), "training": True},
    ),
    "momentum_text": (_zeros(3, 4), FOUR, FOUR, {"training": True, "momentum": "0.1"}),
    "momentum_text_eval": (_zeros(3, 4), FOUR, FOUR, {"momentum": "0.1"}),
    "momentum_list": (_zeros(3, 4), FOUR, FOUR, {"training": True, "momentum": [0.1]}),
    "momentum_complex": (_zeros(3, 4), FOUR, FOUR, {"training": True, "momentum": 1j}),
    "momentum_int": (normal(3, 4).float(), FOUR, FOUR, {"training": True, "momentum": 1}),
    "momentum_bool": (normal(3, 4).float(), FOUR, FOUR, {"training": True, "momentum": True}),
    "momentum_tensor": (normal(3, 4).float(), FOUR, FOUR, {"training": True, "momentum": torch.tensor(0.5)}),
    "momentum_vector": (normal(3, 4).float(), FOUR, FOUR, {"training": True, "momentum": FOUR}),
    "training_int": (_zeros(3, 4), FOUR, FOUR, {"training": 1}),
    "training_zero": (_zeros(3, 4), FOUR, FOUR, {"training": 0}),
    "training_none": (_zeros(3, 4), FOUR, FOUR, {"training": None}),
    "training_text": (_zeros(3, 4), FOUR, FOUR, {"training": "yes"}),
    "eps_text": (_zeros(3, 4), FOUR, FOUR, {"training": True, "eps": "1e-5"}),
    "eps_none": (_zeros(3, 4), FOUR, FOUR, {"eps": None}),
    "eps_int": (normal(3, 4).float(), FOUR, FOUR, {"eps": 1}),
    "float_weight_and_half_bias": (
        normal(3, 4).float(),
        FOUR,
        FOUR,
        {"weight": FOUR, "bias": _zeros(4, dtype=torch.bfloat16), "training": True},
    ),
    "half_bias_and_one_dimension": (
        _zeros(3),
        _zeros(3),
        _zeros(3),
        {"weight": _zeros(3), "bias": _zeros(3, dtype=torch.bfloat16), "training": True},
    ),
    "half_weight_and_double_bias": (
        normal(3, 4).half(),
        *[_zeros(4, dtype=torch.half)] * 2,
        {"weight": _zeros(4, dtype=torch.half), "bias": FOUR.double(), "training": True},
    ),
    "complex": (_zeros(3, 4, dtype=torch.complex64), FOUR, FOUR, {"training": True}),
}


def _outcome(function, arguments):
    """Return the result or the error of a call on copies, and those of its tensors that it changed."""
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    try:
        result = function(*copies)
    except Exception as error:
        result = error
    changed = [not torch.equal(a, b) for a, b in zip(copies, arguments, strict=True) if isinstance(a, torch.Tensor)]
    return result, any(changed)


@pytest.mark.parametrize("name", CALLS)
def test_functional(name):
    input, mean, var, options = CALLS[name]
    call = lambda function: lambda *tensors: function(*tensors, **options)  # noqa: E731
    expected, _ = _outcome(call(F.batch_norm), (input, mean, var))
    counter = torch.tensor(3)
    fast = lambda *t: fastbn.functional.batch_norm(*t[:3], num_batches_tracked=t[3], **options)  # noqa: E731
    actual, changed = _outcome(fast, (input, mean, var, counter))
    if isinstance(expected, Exception):
        assert type(actual) is type(expected), f"expected {expected!r}, got {actual!r}"
        assert str(actual).split("\nException raised")[0] == str(expected).split("\nException raised")[0]
        assert not changed
    else:
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_a_counter_stays_where_the_activation_fails():
    counter, x = torch.tensor(3), _zeros(0, 4, dtype=torch.int32)  # torch normalises no integers without an error
    with pytest.raises(RuntimeError):
        fastbn.functional.batch_norm(x, None, None, training=True, activation="gelu", num_batches_tracked=counter)
    assert counter.item() == 3


MODULE_CALLS = {
    "dimensions_1d": (1, _zeros(3, 5, 2, 2), True, {}),
    "dimensions_2d": (2, _zeros(3, 5, 2), True, {}),
    "dimensions_2d_eval": (2, _zeros(3, 5, 2), False, {}),
    "dimensions_3d": (3, _zeros(3, 5, 2, 2), True, {}),
    "channels": (2, _zeros(3, 4, 2, 2), True, {}),
    "channels_eval": (2, _zeros(3, 4, 2, 2), False, {}),
    "channels_without_affine": (2, _zeros(3, 4, 2, 2), True, {"affine": False}),
    "one_value": (2, _zeros(1, 5, 1, 1), True, {}),
    "integers": (2, _zeros(3, 5, 2, 2, dtype=torch.int64), True, {}),
    "doubles": (2, _zeros(3, 5, 2, 2, dtype=torch.float64), True, {}),
    "zero_eps": (2, _zeros(3, 5, 2, 2), True, {"eps": 0.0}),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", MODULE_CALLS)
def test_modules(name, momentum):
    """Not even the counter moves, although torch's modules increment it before they fail."""
    dim, input, training, options = MODULE_CALLS[name]
    errors = []
    for module in (kind[dim](5, momentum=momentum, **options).train(training) for kind in (STOCK, FAST)):
        with pytest.raises(Exception) as caught:
            module(input)
        errors.append(caught.value)
    assert type(errors[1]) is type(errors[0])
    assert str(errors[1]).split("\nException raised")[0] == str(errors[0]).split("\nException raised")[0]
    assert module.num_batches_tracked.item() == 0
    assert torch.equal(module.running_mean, torch.zeros(5)) and torch.equal(module.running_var, torch.ones(5))


def test_input_of_another_device():
    fast = FAST[2](5)
    with pytest.raises(Exception) as caught:
        fast(torch.zeros(3, 5, 2, 2, device="meta"))
    with pytest.raises(type(caught.value)):
        STOCK[2](5)(torch.zeros(3, 5, 2, 2, device="meta"))
    assert fast.num_batches_tracked.item() == 0


def test_an_error_of_a_hook_is_not_taken_for_a_refusal_of_the_op():
    """Taken for a refusal, the call would go to torch's batch_norm, and the hook would run again."""
    asked = []

    def refuse(tensor):
        asked.append(tensor)
        raise RuntimeError("nowhere to keep it")

    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda tensor: tensor):
        with pytest.raises(RuntimeError, match="nowhere to keep it"):
            FAST[2](5)(normal(3, 5, 4, 6, dtype=torch.float32).requires_grad_())
    assert len(asked) == 1


def test_names_that_do_not_exist():
    x = normal(3, 4)
    with pytest.raises(ValueError, match="activation: expected one of none, relu, .*, got 'selu'"):
        fastbn.functional.batch_norm(x, None, None, training=True, activation="selu")
    with pytest.raises(ValueError, match="backend: expected one of cpu, cuda, triton, reference, torch.*, got 'mps'"):
        fastbn.functional.batch_norm(x, None, None, training=True, backend="mps")


@pytest.mark.parametrize(
    "backend,input,reason",
    [
        ("cpu", _zeros(3, 4, dtype=torch.int32), "no kernels for torch.int32"),
        ("reference", _zeros(1, 4), "but one value a channel"),
        ("cuda", _zeros(3, 4), "the CUDA kernels take no cpu tensors"),
        ("cpu", torch.zeros(3, 4, device="meta"), "the C\\+\\+ kernels take no meta tensors"),
    ],
)
def test_a_backend_that_cannot(backend, input, reason):
    with pytest.raises(ValueError, match=f"batch_norm: backend '{backend}' cannot take this call: .*{reason}"):
        fastbn.functional.batch_norm(input, None, None, training=True, backend=backend)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("trained", [0, 1], ids=["running_mean", "running_var"])
def test_a_backend_cannot_differentiate_running_statistics(trained, training):
    statistics = [torch.zeros(4), torch.ones(4)]
    statistics[trained].requires_grad_()
    with pytest.raises(ValueError, match="cannot take this call: running statistics require a gradient"):
        fastbn.functional.batch_norm(_zeros(3, 4), *statistics, training=training, backend="cpu")


COUNT = len(ACTIVATIONS)
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def _arguments(**changed):
    """Return arguments of batch_norm_train by name: right ones, except those in `changed`."""
    right = {
        "input": _zeros(3, 4, 2), "residual": None, "weight": None, "bias": None, "running_mean": _zeros(4),
        "running_var": _zeros(4), "num_batches_tracked": torch.tensor(0), "momentum": 0.1, "eps": 1e-5,
        "activation": 1, "save_mask": False,
    }  # fmt: skip
    return right | changed


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"input": _zeros(4)}, "expected input of at least 2 dimensions, got shape [4]"),
        ({"input": _zeros(3, 0)}, "expected input of at least one channel, got shape [3, 0]"),
        ({"input": _zeros(3, 4, dtype=torch.int32)}, "expected input of dtype Float, Double, BFloat16 or Half, got"),
        ({"residual": _zeros(3, 4, 1)}, "expected residual of shape [3, 4, 2], got [3, 4, 1]"),
        ({"residual": _zeros(3, 4, 2, dtype=torch.float64)}, "expected residual of dtype Float, got Double"),
        ({"weight": _zeros(5)}, "expected weight of shape [4], got [5]"),
        ({"bias": _zeros(4, 1)}, "expected bias of shape [4], got [4, 1]"),
        ({"weight": _zeros(4, dtype=torch.float64)}, "expected weight of dtype Float, got Double"),
        ({"running_mean": _zeros(8)[::2]}, "expected contiguous running_mean, got stride 2"),
        ({"running_var": _zeros(3)}, "expected running_var of shape [4], got [3]"),
        ({"num_batches_tracked": torch.tensor(0.0)}, "expected num_batches_tracked of dtype Long and one element, got"),
        (
            {"activation": len(ACTIVATIONS)},
            f"expected activation from 0 to {len(ACTIVATIONS) - 1}, got {len(ACTIVATIONS)}",
        ),
        ({"activation": -1}, f"expected activation from 0 to {COUNT - 1}, got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ops_say_what_they_expected(changed, message):
    arguments = _arguments(**changed)
    buffers = [t for t in (arguments[name] for name in BUFFERS) if t is not None]
    before = [t.clone() for t in buffers]
    with pytest.raises(RuntimeError, match=re.escape(f"batch_norm_train: {message}")):
        torch.ops.fastbn.batch_norm_train(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(buffers, before, strict=True))


REFUSED = [
    {"input": _zeros(4)},
    {"input": _zeros(3, 0)},
    {"input": _zeros(3, 4, dtype=torch.int32)},
    {"input": _zeros(3, 4).to_sparse()},
    {"input": torch.zeros(3, 4, device="meta")},
    {"running_mean": _zeros(8)[::2]},
    {"running_mean": _zeros(4, dtype=torch.float64)},
    {"num_batches_tracked": torch.tensor(0.0)},
    {"num_batches_tracked": torch.zeros(2, dtype=torch.int64)},
    *(
        {name: wrong}
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        for wrong in (_zeros(5), _zeros(4, 1), torch.zeros(4, device="meta"), torch.tensor(0, device="meta"))
    ),
]


@pytest.mark.parametrize("changed", [{}, *REFUSED], ids=str)
def test_ops_refuse_what_the_layer_takes_them_to_refuse(changed):
    """The layer calls the op first and asks for a reason afterwards; it fails or succeeds as torch does."""
    given = _arguments(**changed)
    call = dispatch.Call(**{name: given[name] for name in dispatch.Call._fields if name in given}, training=True)
    assert bool(dispatch.why_refused(call)) == bool(changed)
    if not changed:
        torch.ops.fastbn.batch_norm_train(**given)
        return
    with pytest.raises(RuntimeError):
        torch.ops.fastbn.batch_norm_train(**given)
    counter = call.num_batches_tracked
    operands = {name: given[name] for name in ("input", *BUFFERS[:2], "weight", "bias")}
    results, states = [], []
    for function, options in ((F.batch_norm, {}), (fastbn.functional.batch_norm, {"num_batches_tracked": counter})):
        arguments = {name: t if t is None else t.clone() for name, t in operands.items()}
        try:
            results.append(function(**arguments, training=True, **options))
        except Exception as error:
            results.append(f"{type(error)} {error}".split("\nException raised")[0])
        states.append([arguments[name] for name in ("running_mean", "running_var") if not arguments[name].is_meta])
    torch.testing.assert_close(*states)
    if isinstance(results[0], torch.Tensor):
        torch.testing.assert_close(results[1], results[0])
    else:
        assert results[1] == results[0]


def test_ops_check_what_backward_is_given():
    x, stats = _zeros(3, 4, 2), torch.ones(4, dtype=torch.float64)
    flags = (True, 1, True, True, True, True)
    for changed, message in (
        ({0: _zeros(3, 4)}, "expected grad_out of shape [3, 4, 2], got [3, 4]"),
        ({0: x.double()}, "expected grad_out of dtype Float, got Double"),
        *(
            (
                {3: torch.zeros(shape, dtype=torch.uint8)},
                f"expected contiguous mask of dtype Byte and shape [3, 4, 1], got Byte of shape {list(shape)}",
            )
            for shape in ((3, 4, 2), (3, 3, 1), (2, 4, 1))
        ),
        ({6: stats.float()}, "expected contiguous mean of dtype Double and shape [4], got Float of shape [4]"),
        ({7: stats[:3]}, "expected contiguous inv_std of dtype Double and shape [4], got Double of shape [3]"),
    ):
        arguments = [x, x, None, None, None, None, stats, stats]
        for position, value in changed.items():
            arguments[position] = value
        with pytest.raises(RuntimeError, match=re.escape(f"batch_norm_backward: {message}")):
            torch.ops.fastbn.batch_norm_backward(*arguments, *flags)
    with pytest.raises(RuntimeError, match="input_grad: expected all of sum_grad, sum_grad_xhat and count, or none"):
        torch.ops.fastbn.input_grad(x, x, None, None, None, None, stats, stats, stats, None, None, 0, False)


def test_every_op_is_listed():
    assert set(dir(torch.ops.fastbn)) >= set(contract.OPS)
