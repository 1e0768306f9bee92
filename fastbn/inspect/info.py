"""fastbn.info(): what was built, what can run here, and why not the rest."""

from __future__ import annotations

import platform

import torch

from fastbn import _C
from fastbn._version import __version__


def info() -> dict:
    """A dict of strings, lists and nested dicts, ready to print or to dump as JSON."""
    build = _C.build_info()
    architectures = build["cuda_architectures"]
    if not architectures:
        cuda = "no: fastbn was built without CUDA (no nvcc, or FASTBN_CUDA=0)"
    elif not torch.version.cuda:
        cuda = "no: this torch was built without CUDA"
    elif not build["finds_cuda_stream"]:
        cuda = "no: this torch does not offer its CUDA stream"
    elif not torch.cuda.is_available():
        cuda = "no: torch sees no GPU"
    else:
        cuda = "yes"
    return {
        "fastbn": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "build": {
            "compiler": build["compiler"],
            "against torch": build["built_with_torch"],
            "CUDA architectures": architectures or "none",
            "CPU instruction sets usable here": ", ".join(build["cpu_instruction_sets"]),
        },
        "runs here": {
            "cpu": f"yes: {build['cpu_instruction_set']}, {torch.get_num_threads()} threads",
            "cuda": cuda,
            "reference": "yes: float64, for comparison",
        },
        "devices": {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())} or "cpu only",
    }
