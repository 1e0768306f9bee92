"""The bill of materials of a wheel, in CycloneDX 1.6: what was compiled into its binaries beside fastbn, and by what.

It goes to the folder sboms of dist-info (PEP 770). Headers count, since templates and inline functions end up in the
binaries; libraries that are found at run time, torch's above all, are dependencies in METADATA.
"""

from __future__ import annotations

import re
import subprocess
from typing import Any

BSD = {"license": {"id": "BSD-3-Clause"}}
NVIDIA = {"license": {"name": "NVIDIA CUDA Toolkit EULA"}}


def component(kind: str, name: str, version: str, licence: dict[str, Any], description: str, of_python: bool) -> dict:
    """Return one part. Packages of Python have a package URL."""
    part: dict[str, Any] = {"type": kind, "bom-ref": name, "name": name, "version": version, "licenses": [licence]}
    part["description"] = description
    if of_python:
        part["purl"] = f"pkg:pypi/{name}@{version.replace('+', '%2B')}"
    return part


def cuda_version(nvcc: str) -> str:
    """Return the version of a CUDA toolkit, such as 13.0.88."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    version = re.search(r"V(\d+(?:\.\d+)+)", text)
    if version is None:
        raise ValueError(f"{nvcc} --version: expected a version such as V13.0.88, got {text!r}")
    return version[1]


def document(version: str, pybind11: str, torch: str, compiler: str, cuda: str | None) -> dict[str, Any]:
    """Return the bill of materials of a wheel of fastbn `version`.

    The other arguments are versions too: of the two sets of headers, of the C++ compiler as it names itself in a
    binary ("GCC: (GNU) 14.2.1"), and of the CUDA toolkit, or None for a wheel without CUDA.
    """
    parts = [
        component("library", "pybind11", pybind11, BSD, "headers, compiled into fastbn._C", True),
        component("library", "torch", torch, BSD, "headers, compiled into libfastbn.so and fastbn._node_*", True),
    ]
    name, _, release = compiler.partition(":")
    tools = [{"type": "application", "name": name, "version": release.strip() or "unknown"}]
    if cuda:
        static = "the CUDA runtime, linked into libfastbn.so"
        parts.append(component("library", "cudart_static", cuda, NVIDIA, static, False))
        tools.append({"type": "application", "name": "nvcc", "version": cuda})
    subject = component("library", "fastbn", version, BSD, "BatchNorm for PyTorch with fused kernels", True)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": subject, "tools": {"components": tools}},
        "components": parts,
        "dependencies": [{"ref": "fastbn", "dependsOn": [part["bom-ref"] for part in parts]}],
    }
