"""fastbn.population_stats: the mean and variance of what every BatchNorm layer gets, over a whole data set.

Moments of batches are merged by Chan's formula, so batches may have any sizes. An average over batches of their
statistics, as a cumulative moving average makes, weighs a short last batch like the others, and leaves out what the
means of batches differ by.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastbn import nn as layers
from fastbn._torch import BatchNormBase, without_compiled_code
from fastbn.functional import Moments, channel_stats, merge_stats
from fastbn.transforms.checkpoint import class_without_checkpoint_safety, set_class
from fastbn.transforms.module import require_module

# Layers whose training differs from batch normalisation by their class alone.
_PLAIN = {
    layers.AccumulatedBatchNorm1d: layers.BatchNorm1d,
    layers.AccumulatedBatchNorm2d: layers.BatchNorm2d,
    layers.AccumulatedBatchNorm3d: layers.BatchNorm3d,
    layers.BatchRenorm1d: layers.BatchNorm1d,
    layers.BatchRenorm2d: layers.BatchNorm2d,
    layers.BatchRenorm3d: layers.BatchNorm3d,
}


def population_stats(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = True,
    process_group: Any = None,
) -> dict[str, Moments]:
    """Set running_mean and running_var of every BatchNorm layer of `model` to those of the data set in `loader`.

    The layers are torch.nn's BatchNorms and SyncBatchNorms with running statistics, and subclasses of them, fastbn's
    among them; frozen, whitening and uncalled layers are left alone. Their statistics are taken over all elements that
    they get in one pass over the loader, in all their calls: the mean, and the unbiased variance, as BatchNorm keeps
    it. A subclass whose statistics leave out elements has a method `moments_of`, which gets the arguments of forward
    and returns the moments of those that count.
    During the pass each of them normalises by the batch, as in training, so a layer's statistics depend on the sizes of
    the batches that the layers before it saw; give batches as large as memory allows. Everything else is in evaluation
    mode: dropout is off, as it will be where the statistics are used.

    Only these buffers change. `num_batches_tracked` counts training steps and stays, and so do training flags,
    gradients, hooks and the state of torch's random number generators (on the CPU and the model's GPUs). An exception
    changes nothing. A compiled model runs as if it were not, since compiled code would not call what counts here.

    loader: yields batches: a tensor; a tuple or list whose first element the model is called with; or a mapping, whose
    items are the keyword arguments. Anything else, or another call, needs `forward`.
    device: where the tensors of a batch are moved; None for the device of the first layer.
    forward: called as forward(model, batch) with each moved batch instead of the model.
    progress: show a bar if tqdm is installed (on the first rank only).
    process_group: where torch.distributed is initialised, the group (None for the default one) whose ranks each call
    this with their part of the data, as many batches as they have; their moments are gathered once, at the end. A
    SyncBatchNorm's own collectives still need equally many batches on each rank. The module inside a
    DistributedDataParallel is run without it. A rank that raises in its pass leaves the others waiting for its moments
    until the group's timeout.

    Returns a mapping from the name of each layer that was called to its moments (fastbn.functional.Moments: mean and
    biased variance, float64 (C,), and the number of elements per channel), on all ranks the same. A model without
    such layers returns {}, and the loader is not read.

    Raises TypeError if `model` is not a torch.nn.Module, or for batches that need `forward`; ValueError for a Lazy
    layer without its first input, for a process_group that this rank is not in, and if no layer got two elements per
    channel, as with an empty loader; and what the model raises, as for a batch with one value per channel.
    """
    require_module("population_stats", model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    found: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNormBase) and module.running_mean is not None and module.running_var is not None
    }
    if not found:
        return {}
    for name, layer in found.items():
        if nn.parameter.is_lazy(layer.running_mean):
            raise ValueError(f"population_stats: expected layers with their number of channels, got a Lazy one: {name}")
    target = next(iter(found.values())).running_mean.device if device is None else torch.device(device)
    group = _Group(process_group)
    seen: dict[nn.Module, Moments] = {}
    with _observed(model, list(found.values()), seen):
        for batch in _with_bar(loader, progress and group.rank == 0):
            _run(model, _moved(batch, target), forward)
    merged = zip(found, group.merge(list(found.values()), seen), strict=True)
    results = {name: moments for name, moments in merged if moments.elements.item() > 1}
    if not results:
        raise ValueError("population_stats: expected a loader with data for the layers, got none")
    with torch.no_grad():
        for name, (mean, var, elements) in results.items():
            found[name].running_mean.copy_(mean)
            found[name].running_var.copy_(var * (elements / (elements - 1)))
    return results


@contextlib.contextmanager
def _observed(model: nn.Module, norms: list[Any], seen: dict[nn.Module, Moments]) -> Iterator[None]:
    """Within the block, layers normalise by the batch, and `seen` gets the moments of what they are called with.

    Layers do not track while the block runs, so that their buffers hold their own values throughout; those of classes
    that track anyway are put back. So is everything else.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    before = [(norm, type(norm), norm.track_running_stats) for norm in norms]
    handles: list[Any] = []

    def observe(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if hasattr(norm, "moments_of"):  # of a layer whose statistics leave out elements, as padding
            own = norm.moments_of(*args, **kwargs)
        else:
            own = channel_stats(_input_of(norm, args, kwargs))
        seen[norm] = merge_stats(seen[norm], own) if norm in seen else own

    gpus = {buffer.device.index for buffer, _ in buffers if buffer.is_cuda}
    try:
        for module, _ in modes:
            module.training = False
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
            plain = _PLAIN.get(class_without_checkpoint_safety(type(norm)))
            if plain is not None:
                set_class(norm, plain)
            handles.append(norm.register_forward_pre_hook(observe, with_kwargs=True))
        with torch.random.fork_rng(sorted(gpus)), torch.no_grad(), without_compiled_code():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for norm, cls, tracks in before:
            norm.__class__, norm.track_running_stats = cls, tracks
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _input_of(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the input of a call of a layer, which a subclass may have given another name."""
    if args:
        return args[0]
    for name in (next(iter(inspect.signature(norm.forward).parameters), "input"), "input"):
        if name in kwargs:
            return kwargs[name]
    got = ", ".join(kwargs) or "no arguments"
    raise TypeError(f"population_stats: expected calls of layers with an input, got {got}")


class _Group:
    """The ranks whose moments are merged: those of a process group, or this process alone."""

    def __init__(self, process_group: Any) -> None:
        is_initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.process_group = process_group
        self.size = torch.distributed.get_world_size(process_group) if is_initialized else 1
        self.rank = torch.distributed.get_rank(process_group) if is_initialized else 0
        if self.rank < 0:
            raise ValueError(
                f"population_stats: expected a process_group that this rank is in, got {process_group!r} on rank "
                f"{torch.distributed.get_rank()}"
            )

    def merge(self, norms: list[Any], seen: Mapping[nn.Module, Moments]) -> list[Moments]:
        """Return the moments of each layer over all ranks; those of a layer that got nothing are 0."""
        own = [seen[norm] if norm in seen else _nothing(norm.running_mean) for norm in norms]
        if self.size == 1:
            return own
        device = own[0].mean.device  # layers of one process may be on several
        packed = torch.cat([value.to(device) for moments in own for value in moments])
        gathered = [torch.empty_like(packed) for _ in range(self.size)]
        torch.distributed.all_gather(gathered, packed, self.process_group)
        lengths = [value.numel() for moments in own for value in moments]
        ranks = [iter(rank.split(lengths)) for rank in gathered]
        merged = [merge_stats(*(Moments(next(rank), next(rank), next(rank)) for rank in ranks)) for _ in own]
        return [Moments(*(v.to(like.mean.device) for v in m)) for m, like in zip(merged, own, strict=True)]


def _nothing(like: Tensor) -> Moments:
    zeros = torch.zeros_like(like, dtype=torch.float64)
    return Moments(zeros, zeros.clone(), zeros.new_zeros(1))


def _run(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None) -> None:
    if forward is not None:
        forward(model, batch)
    elif isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)) and batch:
        model(batch[0])
    else:
        raise TypeError(
            f"population_stats: expected a batch that is a tensor, a tuple, a list or a mapping, got "
            f"{type(batch).__name__}: give `forward`"
        )


def _moved(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors, also those inside of tuples, lists and mappings, on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if type(batch) in (tuple, list):
        return type(batch)(_moved(value, device) for value in batch)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    return batch


def _with_bar(loader: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress or importlib.util.find_spec("tqdm") is None:
        return loader
    return importlib.import_module("tqdm.auto").tqdm(loader, desc="population_stats", leave=False)
