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
from fastbn.inspect.doctor.diagnosis import Diagnosis, in_order
from fastbn.inspect.doctor.faults import FAULTS, SEVERITIES, Finding
from fastbn.inspect.doctor.layers import device_of, is_frozen, norms_of, readable, setting, twin_of
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
    findings: list[Finding] = []
    left_out = []
    norms = norms_of(model)
    mode = model.training if training is None else training
    subject = f"{type(model).__name__} in {'training' if mode else 'evaluation'} mode"
    for name, norm in norms.items():
        findings += settings.check_settings(name, norm)
    findings += _values(norms, mode)
    if not all(readable(norm.running_var) for norm in norms.values() if norm.running_var is not None):
        left_out.append("values of tensors that are on the meta device, or not initialised yet")
    conversion = None
    where = device_of(model)
    with _generators_kept(where):
        try:
            twin_of(model)
        except Exception as error:  # whatever a module raises that cannot be copied
            why = str(error).partition(". ")[0]
            left_out.append(f"modes, order, batches and conversion, since the model cannot be copied: {why}")
        else:
            examined = _Twins(model, training)
            findings += settings.check_modes(examined.make(), examined.modes, examined.modes_after_train)
            findings += order.check_order(examined.make())
            seen: dict[str, list[observed.Seen]] = {}
            if input is None:
                left_out.append("batches and traffic, which take an input")
            else:
                twin = examined.make()
                seen = observed.observe(twin, observed.arguments_of(input, model))
                findings += observed.check_calls(twin, seen)
                if where.type == "meta" and gpu is None:
                    left_out.append("traffic, which takes a device for a model on the meta device")
            conversion = predict(examined.make(), seen, where, gpu)
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


class _Twins:
    """Copies of a model in the mode that is examined, and the modes of its layers before and after `.train()`."""

    def __init__(self, model: nn.Module, training: bool | None) -> None:
        self._model, self._training = model, training
        self.modes = _modes(model)
        self.modes_after_train = _modes(twin_of(model).train())

    def make(self) -> nn.Module:
        twin = twin_of(self._model)
        return twin if self._training is None else twin.train(self._training)


def _modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def _values(norms: dict[str, Any], mode: bool) -> Iterator[Finding]:
    found = {}
    for name, norm in norms.items():
        tensors = dict(norm.named_parameters(recurse=False)) | dict(norm.named_buffers(recurse=False))
        found[name] = values_of(name, tensors, setting(norm, "eps") or 0.0)
    others_moved = any(values.count for values in found.values())
    for name, values in found.items():
        norm = norms[name]
        yield from check_values(values)
        if setting(norm, "momentum") == 0 and not is_frozen(norm):
            continue  # zero-momentum says why they are as they were
        yield from check_counter(
            values,
            is_used=not mode or not norm.training or is_frozen(norm),
            others_moved=others_moved,
            cumulative=not is_frozen(norm) and setting(norm, "momentum") is None,
        )
