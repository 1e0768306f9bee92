"""fastbn.doctor: what is wrong with the BatchNorms of a model or a state_dict, and what `fastbn.convert` would gain."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastbn import _C
from fastbn.inspect.doctor import checkpoint, observed, order, settings
from fastbn.inspect.doctor.conversion import Conversion, Traffic, predict
from fastbn.inspect.doctor.diagnosis import Diagnosis, in_order, listed
from fastbn.inspect.doctor.faults import FAULTS, SEVERITIES, Finding
from fastbn.inspect.doctor.layers import is_frozen, norms_of, readable, setting
from fastbn.inspect.doctor.twins import Twins, device_of, modes_of
from fastbn.inspect.doctor.values import check_counter, check_values, values_of

__all__ = ["FAULTS", "SEVERITIES", "Conversion", "Diagnosis", "Finding", "Traffic", "doctor"]

_OF_MODULES = ("settings, modes, order, batches and conversion, which take the module",)


def doctor(
    model: nn.Module | Mapping[str, Any],
    input: Any = None,
    *,
    training: bool | None = None,
    device: str | None = None,
) -> Diagnosis:
    """Return what is wrong with the BatchNorms of `model`, a module or a state_dict, and what `convert` would gain.

    Looks at running statistics, parameters, settings and modes; in a module also at the order of calls, in the graphs
    that torch.fx makes of its forwards; and with `input` at the batches that each layer gets, in one forward pass.
    docs/doctor.md describes every fault. `model` is left as it is, bit by bit: modes, buffers and what traces and runs
    are those of copies, which share the memory of the parameters. Hooks of the model run in the forward pass.

    model: a torch.nn.Module, or a state_dict or checkpoint that holds some.
    input: for a module: the shape of a batch, such as (32, 3, 224, 224), a tensor, or a tuple of forward's arguments.
    training: examine the model after `.train()` (True) or `.eval()` (False); None, as it is.
    device: "a100", "h100", "h200" or "b200" predicts the traffic on that GPU, which need not be here; None, where the
    model is.

    Raises TypeError for another `model` or `input`; ValueError for a state_dict with `input` or without any BatchNorm,
    for an unknown device, and if the forward pass raises.
    """
    if device is not None:
        _C.named_device(device)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("doctor: expected a torch.nn.Module in Python or a state_dict, got TorchScript")
    if isinstance(model, nn.Module):
        return _of_model(getattr(model, "_orig_mod", model), input, training, device)
    if not isinstance(model, Mapping):
        raise TypeError(f"doctor: expected a torch.nn.Module or a state_dict, got {type(model).__name__}")
    if input is not None:
        raise ValueError("doctor: expected a torch.nn.Module beside an input, got a state_dict")
    layers = checkpoint.layers_in(model)
    if not layers:
        raise ValueError("doctor: expected a state_dict with running_mean and running_var, got none in this one")
    return Diagnosis("state_dict", len(layers), in_order(list(checkpoint.check_state(layers))), _OF_MODULES)


def _of_model(model: nn.Module, input: Any, training: bool | None, gpu: str | None) -> Diagnosis:
    norms, where, left_out = norms_of(model), device_of(model), []
    twins: Twins | None = None
    conversion: Conversion | None = None
    findings: list[Finding] = []
    with _generators_kept(where):
        try:
            twins = Twins(model, training)
        except Exception as error:  # whatever a module raises that cannot be copied
            why = str(error).partition(". ")[0]
            left_out.append(f"modes, order, batches and conversion, since the model cannot be copied: {why}")
        modes = modes_of(model) if twins is None else twins.examined
        for name, norm in norms.items():
            findings += settings.check_settings(name, norm)
        findings += _values(norms, modes)
        if not all(readable(norm.running_var) for norm in norms.values() if norm.running_var is not None):
            left_out.append("values of tensors that are on the meta device, or not initialised yet")
        if twins is not None:
            findings += settings.check_modes(twins)
            found, unplaced = order.check_order(twins.make())
            findings += found
            if unplaced:
                left_out.append(f"order of {listed(unplaced)}: torch.fx can trace no forward that calls these")
            seen: dict[str, list[observed.Seen]] = {}
            if input is not None:
                twin = twins.make()
                seen = observed.observe(twin, observed.arguments_of(input, model))
                findings += observed.check_calls(twin, seen)
            conversion = predict(twins.make(), seen, where, gpu)
            if input is None:
                left_out.append("batches and traffic, which take an input")
            elif where.type == "meta" and gpu is None:
                left_out.append("traffic, which takes a device for a model on the meta device")
    subject = f"{type(model).__name__} in {'training' if modes[''] else 'evaluation'} mode"
    return Diagnosis(subject, len(norms), in_order(findings), tuple(left_out), conversion)


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Leave the random generators of Python and torch as they are, whatever forwards draw within the block."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(state)


def _values(norms: dict[str, Any], modes: dict[str, bool]) -> Iterator[Finding]:
    """Yield what is wrong with the numbers in layers. modes: whether each module is in training mode."""
    found = {}
    for name, norm in norms.items():
        tensors = dict(norm.named_parameters(recurse=False)) | dict(norm.named_buffers(recurse=False))
        found[name] = values_of(name, tensors, setting(norm, "eps") or 0.0)
    others_moved = any(values.count for values in found.values())
    for name, values in found.items():
        norm = norms[name]
        yield from check_values(values)
        if is_frozen(norm):
            yield from check_counter(values, is_used=True, others_moved=others_moved, cumulative=False)
        elif setting(norm, "momentum") != 0:  # zero-momentum says why statistics are as they were
            cumulative = setting(norm, "momentum") is None
            yield from check_counter(values, is_used=not modes[name], others_moved=others_moved, cumulative=cumulative)
