"""What tests of fusion share: the calls of the op, and the comparison of a converted model with its twin in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import fastbn
from fastbn import functional


@contextmanager
def recorded_calls() -> Iterator[list[str]]:
    """Within the block, list each call of the op by what is fused: "add+relu", "relu", "add", ""."""
    calls: list[str] = []
    original = functional.batch_norm

    def spy(*args, residual=None, activation=None, **kwargs):
        calls.append("+".join([*["add"] * (residual is not None), *([activation] if activation else [])]))
        return original(*args, residual=residual, activation=activation, **kwargs)

    functional.batch_norm = spy
    try:
        yield calls
    finally:
        functional.batch_norm = original


def random_state(model: nn.Module) -> nn.Module:
    """Return the model in float64 with parameters and statistics that are none at its initial value."""
    generator = torch.Generator().manual_seed(1)
    model = model.double()
    with torch.no_grad():
        for module in model.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if name in ("weight", "running_var") and tensor.dim() == 1:
                    tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.5)
                elif tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.5)
    return model


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(model: nn.Module, *args, backward: bool = True) -> dict[str, Tensor]:
    """Return output, inputs, gradients and buffers after a forward and backward pass of the model on copies of `args`.

    backward: whether there is one; in-place changes may forbid it.
    """
    leaves = [
        a.detach().clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    ]
    # Modules may change their input in place, which a leaf does not allow.
    given = [a * 1 if isinstance(a, Tensor) and a.is_floating_point() else a for a in leaves]
    model.zero_grad()
    torch.manual_seed(0)
    with torch.set_grad_enabled(backward):
        output = model(*given)
    output = list(output.values()) if isinstance(output, dict) else output
    outputs = [o for o in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(o, Tensor)]
    if backward:
        sum((o * torch.arange(o.numel(), dtype=o.dtype).view(o.shape).cos()).sum() for o in outputs).backward()
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    results |= {f"input {i}": a.detach() for i, a in enumerate(given) if isinstance(a, Tensor)}
    results |= {f"grad of input {i}": a.grad for i, a in enumerate(leaves) if isinstance(a, Tensor)}
    results |= {f"grad of {name}": p.grad for name, p in model.named_parameters()}
    return results | {name: b.clone() for name, b in model.named_buffers()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
        else:
            torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def check(
    model: nn.Module, *args, fused: list[str], modes=(True, False), change=None, backward=True, **tolerance
) -> nn.Module:
    """Compare the converted `model` with its unconverted twin in training and evaluation; return it.

    fused: the calls of the op that each pass makes, in their order. change: what is done to both after conversion.
    """
    model = random_state(model)
    twin = copy.deepcopy(model)
    fastbn.convert(model)
    if change is not None:
        change(model), change(twin)
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-9}
    for training in modes:
        model.train(training), twin.train(training)
        with recorded_calls() as calls:
            results = step(model, *args, backward=backward)
        assert_same(results, step(twin, *args, backward=backward), **tolerance)
        assert calls == fused, f"training={training}: expected {fused}, got {calls}"
    return model
