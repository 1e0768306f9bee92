"""The accelerator of fastbn.functional.batch_norm: csrc/node for exactly the installed torch, or None."""

from __future__ import annotations

import importlib
import os
import re
from typing import Any

import torch

from fastbn.backends import native


def module_name() -> str:
    """Return the name of the extension that csrc/node/node.cpp is compiled to, for the installed torch."""
    return "fastbn._node_" + re.sub(r"\W", "_", torch.__version__)


def load() -> Any:
    """Return the extension, or None if it was not built for the installed torch, or FASTBN_NODE is 0."""
    if os.environ.get("FASTBN_NODE") == "0":
        return None
    try:
        return importlib.import_module(module_name())
    except ImportError:
        return None


def serves_gpu(index: int) -> bool:
    """Return whether the compiled ops have kernels for a GPU of this machine, by its index."""
    return native.why_no_kernels(torch.device("cuda", index)) is None


def describe() -> str:
    """Return "yes: ..." or "no: ..." with the module that is loaded, or why there is none."""
    if NODE is not None:
        return f"yes: {NODE.__name__}"
    if os.environ.get("FASTBN_NODE") == "0":
        return "no: FASTBN_NODE=0"
    return f"no: {module_name()} was not built; calls that are differentiated take some 15 us more"


NODE = load()
