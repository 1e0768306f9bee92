"""The machine that ran the benchmark, its versions, and the revision of the source."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import fastbn
from fastbn.measure.machine import cpu_name

ROOT = Path(__file__).resolve().parents[1]
# NVIDIA's datasheets, in GB/s, by a part of the device's name. The first match counts.
_DATASHEET_GB_PER_S = {
    "B200": 8000,
    "H200": 4800,
    "H100 PCIe": 2000,
    "H100 NVL": 3900,
    "H100": 3350,
    "A100-SXM4-80GB": 2039,
    "A100 80GB PCIe": 1935,
    "A100": 1555,
}


def machine(device: torch.device) -> dict:
    """Describe this machine in a dict, flat except for `gpu`; None where something is not known."""
    info = fastbn.info()
    gpu = _gpu() if device.type == "cuda" else None
    return {
        "device": device.type,
        "name": gpu["name"] if gpu else cpu_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "datasheet_gb_per_s": _datasheet(gpu["name"]) if gpu else None,
        "system": platform.platform(),
        "python": info["python"],
        "torch": info["torch"],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "triton": _triton(),
        "fastbn": info["fastbn"],
        "instruction_set": fastbn._C.build_info()["cpu_instruction_set"],
        **_source(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def describe(machine: dict) -> str:
    """Write the device and the versions in one line."""
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    cuda = f", CUDA {machine['cuda']}" if machine["device"] == "cuda" else ""
    revision = (machine["revision"] or "unknown revision")[:10] + (" and changes" if machine["modified"] else "")
    return f"{machine['name']}{threads}; torch {machine['torch']}{cuda}; fastbn {machine['fastbn']} ({revision})"


def _gpu() -> dict:
    properties = torch.cuda.get_device_properties("cuda")
    return {
        "name": properties.name,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "sm_count": properties.multi_processor_count,
    }


def _datasheet(name: str) -> int | None:
    return next((speed for part, speed in _DATASHEET_GB_PER_S.items() if part in name), None)


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _source() -> dict:
    """Return the git revision of the checkout; FASTBN_REVISION names it for a tree without its history."""
    revision = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if revision is None:
        return {"revision": os.environ.get("FASTBN_REVISION"), "modified": None}
    return {
        "revision": revision,
        "modified": bool(_output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")),
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
