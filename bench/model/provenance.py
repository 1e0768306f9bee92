"""Where a committed file of numbers comes from."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from bench.model.sass import find_tool


def git_revision(folder: Path) -> str:
    """Return the revision of the clone that holds a folder, with + if files differ from it, or "unknown"."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def tool_version(name: str) -> str:
    """Return the version that nvcc or nvdisasm reports."""
    tool = shutil.which(name) if name == "nvcc" else find_tool(name)
    if tool is None:
        return "unknown"
    text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"V(\d+\.\d+\.\d+)", text)
    return match[1] if match else "unknown"
