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


def load() -> tuple[Any, str]:
    """Return the extension and "yes: <its name>", or None and "no: <why there is none>"."""
    if os.environ.get("FASTBN_NODE") == "0":
        return None, "no: FASTBN_NODE=0"
    name = module_name()
    try:
        return importlib.import_module(name), f"yes: {name}"
    except ModuleNotFoundError:
        return None, f"no: {name} was not built; calls take some 10 to 20 us more"
    except ImportError as error:
        return None, f"no: {error}"


def serves_gpu(index: int) -> bool:
    """Return whether the compiled ops have kernels for a GPU of this machine, by its index."""
    return native.why_no_kernels(torch.device("cuda", index)) is None


NODE, DESCRIPTION = load()
