"""fastbn.info(): what was built, what can run here, and why not the rest."""

from __future__ import annotations

import platform
from typing import Any

import torch

from fastbn import _C
from fastbn._version import __version__
from fastbn.backends import node, registry


def info() -> dict[str, Any]:
    """Return a dict of strings, lists and nested dicts, ready to print or to dump as JSON."""
    build = _C.build_info()
    return {
        "fastbn": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "build": {
            "compiler": build["compiler"],
            "against torch": build["built_with_torch"],
            "CUDA architectures": build["cuda_architectures"] or "none",
            "CPU instruction sets usable here": ", ".join(build["cpu_instruction_sets"]),
        },
        "runs here": {name: registry.get(name).availability() for name in registry.names()}
        | {"C++ autograd node": node.DESCRIPTION},
        "devices": {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())} or "cpu only",
    }
