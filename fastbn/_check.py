"""What fastbn needs before anything of it can be imported: a torch that is new enough, and the binaries of this build.

Each thing that is missing is one ImportError of one sentence, which the command prints without a traceback.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

OLDEST_TORCH = (2, 10)


def _fail(message: str, cause: Exception | None = None) -> None:
    # runpy prints the message alone, without a traceback, if the error names the package.
    raise ImportError(message, name="fastbn") from cause


def check_torch() -> None:
    """Import torch, which loads the libraries that fastbn's own ones call.

    Raises ImportError if there is none, if it cannot be loaded, or if it is older than OLDEST_TORCH.
    """
    oldest = ".".join(map(str, OLDEST_TORCH))
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            _fail(f"fastbn needs PyTorch {oldest} or newer, and the installed one cannot be imported: {error}", error)
        _fail(f"fastbn needs PyTorch {oldest} or newer, got none: pip install torch", error)
    except (ImportError, OSError) as error:
        _fail(f"fastbn needs PyTorch {oldest} or newer, and the installed one cannot be imported: {error}", error)
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is not None and (int(version[1]), int(version[2])) < OLDEST_TORCH:
        _fail(f"fastbn needs PyTorch {oldest} or newer, got {torch.__version__}: pip install --upgrade torch")


def check_binaries() -> None:
    """Import fastbn._C, which loads libfastbn.so.

    Raises ImportError if it was not built for this Python, or if the library is missing or not of the same build.
    """
    try:
        importlib.import_module("fastbn._C")
    except ModuleNotFoundError as error:
        this = f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}"
        built = [path.name for path in sorted(Path(__file__).parent.glob("_C.*.so"))]
        _fail(
            f"fastbn._C was not built for this Python ({this}; there is {', '.join(built) or 'none for any'}): install "
            "a wheel that has it, or run 'pip install --no-build-isolation .' in a clone of fastbn",
            error,
        )
    except ImportError as error:
        _fail(f"fastbn._C could not be loaded: {error}", error)


check_torch()
check_binaries()
