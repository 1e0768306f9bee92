"""Finds what a clone of fastbn has and the wheel has not: the benchmark and the examples."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import fastbn
from fastbn.cli.errors import CommandError


def load(command: str, name: str) -> ModuleType:
    """Import module `name` of the clone that fastbn was installed from in place, or else of the current directory's.

    Raises CommandError, naming `fastbn command`, where neither is such a clone.
    """
    for root in (Path(fastbn.__file__).parents[1], Path.cwd()):
        if (root / name.replace(".", "/")).with_suffix(".py").is_file():
            if str(root) not in sys.path:
                sys.path.insert(0, str(root))
            return importlib.import_module(name)
    folder = name.partition(".")[0]
    raise CommandError(f"fastbn {command} runs in a clone of fastbn: expected the folder {folder} in {Path.cwd()}")
