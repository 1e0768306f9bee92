"""Layers of other libraries as torch's: names of parameters, and what moving averages mean.

    running = decay * running + (1 - decay) * batch       textbooks, Keras, Flax, ONNX: "momentum" is decay
    running = (1 - momentum) * running + momentum * batch   torch

The variance of a batch in that average is divided by n elements (biased) in some, and by n - 1 in others.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Convention(NamedTuple):
    """What a library calls and means by the parts of a layer.

    weight, bias, mean, var: names of its arrays. momentum, eps: the defaults of its layer, in its own meaning.
    is_decay: whether its momentum is the share of the old value. is_biased: whether its moving variance averages biased
    ones.
    """

    weight: str
    bias: str
    mean: str
    var: str
    momentum: float
    eps: float
    is_decay: bool
    is_biased: bool


# docs/variants.md has the sources.
CONVENTIONS = {
    "torch": Convention("weight", "bias", "running_mean", "running_var", 0.1, 1e-5, False, False),
    "keras": Convention("gamma", "beta", "moving_mean", "moving_variance", 0.99, 1e-3, True, True),
    # The kernel of TensorFlow that tf.keras 2 runs on tensors of four dimensions.
    "keras_fused": Convention("gamma", "beta", "moving_mean", "moving_variance", 0.99, 1e-3, True, False),
    "flax": Convention("scale", "bias", "mean", "var", 0.99, 1e-5, True, True),
    "onnx": Convention("scale", "B", "input_mean", "input_var", 0.9, 1e-5, True, True),
}
_COLLECTIONS = frozenset(("params", "batch_stats"))  # flax keeps the arrays of a layer in two trees


def batch_norm_arguments(
    convention: str | Convention, *, momentum: float | None = None, eps: float | None = None
) -> dict[str, float]:
    """Return `momentum` and `eps` of a torch.nn or fastbn layer that moves its averages as another library's.

    convention: a key of `CONVENTIONS`, or a Convention. momentum, eps: the layer's there; None for that library's
    defaults. Raises ValueError for an unknown name, and for a momentum outside of [0, 1].
    """
    known = _known(convention)
    momentum = known.momentum if momentum is None else momentum
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum: expected a number from 0 to 1, got {momentum}")
    return {"momentum": 1 - momentum if known.is_decay else momentum, "eps": known.eps if eps is None else eps}


def batch_norm_state(
    arrays: Mapping[str | tuple[str, ...], Any],
    convention: str | Convention,
    *,
    elements: int | Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Return the state of the BatchNorm layers among another library's arrays, under torch's names.

    arrays: by path, as "block/bn/gamma", "block/bn/gamma:0", "block.bn.gamma" or ("block", "bn", "gamma"); flax's
    "params" and "batch_stats" at the beginning of a path are left out. A layer is what has both moving averages; other
    arrays are ignored. Its tensors, copies with the dtypes of the arrays, are named "block.bn.weight", "block.bn.bias",
    "block.bn.running_mean" and "block.bn.running_var", or without a path "weight" and so on: weight is 1 and bias is 0
    where the library's layer has none. No library but torch counts batches, and `load_state_dict` leaves the counter of
    a layer alone where a state without a version has none.
    convention: a key of `CONVENTIONS`, or a Convention.
    elements: the number of elements per channel in a training batch (for images N * H * W), one for all layers or by
    their names. Where the library averages biased variances, each is made unbiased by n / (n - 1), as a training in
    torch would have it. None leaves them, so that evaluation gives what it gave there.

    Raises ValueError for an unknown convention, if there is no layer among the arrays, and for fewer than two elements
    or a layer that `elements` leaves out, and TypeError for elements that are not whole numbers.
    """
    known = _known(convention)
    found: dict[str, dict[str, Any]] = {}
    for path, array in arrays.items():
        *parents, last = _parts(path)
        found.setdefault(".".join(parents), {})[last] = array
    layers = {name: of for name, of in found.items() if known.mean in of and known.var in of}
    if not layers:
        raise ValueError(f"batch_norm_state: expected arrays {known.mean} and {known.var} of a layer, got neither")
    state = {}
    for name, of in layers.items():
        mean, var = torch.as_tensor(of[known.mean]), torch.as_tensor(of[known.var])
        if elements is not None and known.is_biased:
            n = _number_of(elements, name)
            var = var * (n / (n - 1))
        weight = torch.as_tensor(of.get(known.weight, torch.ones_like(mean)))
        bias = torch.as_tensor(of.get(known.bias, torch.zeros_like(mean)))
        prefix = f"{name}." if name else ""
        for key, value in {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}.items():
            state[prefix + key] = value.detach().clone()
    return state


def _number_of(elements: Any, name: str) -> int:
    """Return the number of elements per channel for the layer of that name."""
    layer = name or "the layer"
    if isinstance(elements, Mapping):
        if name not in elements:
            raise ValueError(f"elements: expected a number for every layer, got none for {layer}")
        elements = elements[name]
    if not isinstance(elements, numbers.Integral):
        raise TypeError(f"elements: expected whole numbers, got {type(elements).__name__} for {layer}")
    if elements < 2:
        raise ValueError(f"elements: expected at least 2 per channel, got {elements} for {layer}")
    return int(elements)


def _known(convention: str | Convention) -> Convention:
    if isinstance(convention, Convention):
        return convention
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: expected one of {', '.join(CONVENTIONS)}, got {convention!r}")
    return CONVENTIONS[convention]


def _parts(path: str | Iterable[str]) -> list[str]:
    """Return the parts of an array's path, the last of which is its name."""
    parts = path.split(":")[0].replace("/", ".").split(".") if isinstance(path, str) else list(path)
    return parts[1:] if parts[0] in _COLLECTIONS else parts
