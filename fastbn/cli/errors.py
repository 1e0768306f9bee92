"""Errors of the command line: one sentence and an exit status, no traceback."""

from __future__ import annotations

import importlib
from typing import Any

import torch

# Import names of the packages whose distribution is called otherwise.
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


class CommandError(Exception):
    """Misuse, which the user can put right; the message says what was expected and what was got."""

    status = 2


class RunError(CommandError):
    """A failure of a command that was used rightly."""

    status = 1


def reason(error: OSError) -> str:
    """Return the system's own words for `error`, without number and path."""
    return error.strerror or str(error)


def require(command: str, *names: str) -> Any:
    """Import the optional modules `names` for `fastbn command`, whose extra has the command's name.

    Returns the last one. Raises CommandError where the package is not installed.
    """
    module = None
    for name in names:
        package = name.partition(".")[0]
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != package:
                raise
            needed = _DISTRIBUTIONS.get(package, package)
            raise CommandError(f"fastbn {command} needs {needed}: pip install 'fastbn[{command}]'") from None
    return module


def device(name: str) -> torch.device:
    """Return the torch.device called `name`. Raises CommandError where this torch cannot reach it."""
    if name == "cuda" and not torch.cuda.is_available():
        why = "finds no GPU" if torch.version.cuda or torch.version.hip else "was built for the CPU alone"
        raise CommandError(f"--device cuda needs a GPU, but this torch ({torch.__version__}) {why}")
    return torch.device(name)
