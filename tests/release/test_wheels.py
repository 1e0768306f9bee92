"""The audit of a wheel passes a good one, and finds what is planted in it; its bill of materials; the command."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from release import audit, sbom, wheels

INFO = "fastbn-1.0.dist-info"
NAME = "fastbn-1.0-cp310.cp311-cp310.cp311-manylinux_2_28_x86_64.whl"
MODULES = [f"fastbn/_C.cpython-3{minor}-x86_64-linux-gnu.so" for minor in (10, 11)]
METADATA = """Metadata-Version: 2.4
Name: fastbn
Version: 1.0
Summary: BatchNorm
Requires-Python: >=3.10
License-Expression: BSD-3-Clause
License-File: LICENSE
Project-URL: Source, https://example.org
Requires-Dist: torch>=2.10
Requires-Dist: numpy; extra == "bench"

What it is.
"""
WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: false\n" + "".join(
    f"Tag: cp3{python}-cp3{abi}-manylinux_2_28_x86_64\n" for python in (10, 11) for abi in (10, 11)
)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> bytes:
    """A binary that the audit has nothing to say against."""
    folder = tmp_path_factory.mktemp("library")
    code = 'extern "C" void torch_fill(char*); int use() { char text[64]; torch_fill(text); return text[1]; }'
    (folder / "a.cpp").write_text(code)
    flags = ("-fPIC", "-shared", "-fstack-protector-strong", "-Wl,-z,relro,-z,now,-z,noexecstack")
    subprocess.run(["g++", *flags, "a.cpp", "-o", "a.so"], cwd=folder, check=True)
    return (folder / "a.so").read_bytes()


def document(**changes) -> str:
    versions = {"version": "1.0", "pybind11": "3.0", "torch": "2.13.0+cpu", "compiler": "GCC: (GNU) 14.2", "cuda": None}
    return json.dumps(sbom.document(**(versions | changes)))


def files_of(library: bytes) -> dict[str, bytes]:
    files = {"fastbn/__init__.py": b"", "fastbn_command.py": b"", "fastbn/libfastbn.so": library}
    files |= {f"{INFO}/METADATA": METADATA.encode(), f"{INFO}/WHEEL": WHEEL.encode()}
    files |= {f"{INFO}/licenses/LICENSE": b"BSD", f"{INFO}/sboms/fastbn.cdx.json": document().encode()}
    return files


def plant(folder: Path, files: dict[str, bytes], name: str = NAME, record: str | None = None) -> Path:
    """Write a wheel with these files and the record that belongs to them, or another one."""
    lines = []
    for file, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{file},sha256={digest},{len(content)}\n")
    own = "".join(lines) + f"{INFO}/RECORD,,\n"
    with zipfile.ZipFile(folder / name, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
        archive.writestr(f"{INFO}/RECORD", own if record is None else record)
    return folder / name


def problems(path: Path) -> dict[str, str]:
    return {finding.check: finding.problem for finding in wheels.check(wheels.Wheel(path)) if finding.problem}


@pytest.fixture
def files(library) -> dict[str, bytes]:
    # What the modules are is for the audit of binaries to see; here they need only be there.
    return files_of(library) | dict.fromkeys(MODULES, library)


def test_a_good_wheel(files, tmp_path):
    assert problems(plant(tmp_path, files)) == {}


def metadata(old: str, new: str) -> dict[str, bytes]:
    assert old in METADATA
    return {f"{INFO}/METADATA": METADATA.replace(old, new).encode()}


SBOM = f"{INFO}/sboms/fastbn.cdx.json"
# The check, what replaces files (None takes one away), and what the audit says.
PLANTED = [
    ("tags", {f"{INFO}/WHEEL": WHEEL.rpartition("Tag")[0].encode()}, "WHEEL has other tags: "),
    (
        "tags",
        metadata("Version: 1.0", "Version: 1.1") | {SBOM: document(version="1.1").encode()},
        "METADATA has the version 1.1",
    ),
    ("modules", {MODULES[1]: None}, "expected one for each of cp310 cp311"),
    ("modules", {"fastbn/libfastbn.so": None}, "there is no fastbn/libfastbn.so"),
    ("metadata", metadata("torch>=2.10", "torch"), "needs torch, expected torch>=2.10 alone"),
    ("metadata", metadata("Requires-Dist: torch>=2.10\n", ""), "does not need torch>=2.10"),
    ("metadata", metadata('numpy; extra == "bench"', "numpy"), "needs numpy, expected torch>=2.10 alone"),
    ("metadata", metadata("Project-URL: Source, https://example.org\n", ""), "no Project-URL"),
    ("metadata", metadata("What it is.\n", ""), "no description"),
    ("licence", metadata("License-Expression: BSD-3-Clause\n", ""), "METADATA names no licence"),
    ("licence", {f"{INFO}/licenses/LICENSE": None}, "not in the wheel: LICENSE"),
    ("SBOM", {SBOM: None}, "expected one in dist-info/sboms"),
    ("SBOM", {SBOM: b"{}"}, "is not a CycloneDX document"),
    ("SBOM", {SBOM: document(version="0.9").encode()}, "expected a CycloneDX document of fastbn 1.0"),
    ("SBOM", {SBOM: document(cuda="13.0").encode()}, "expected pybind11, torch and a compiler"),
    ("content", {"tests/__init__.py": b""}, "not what users need: tests/__init__.py"),
    ("content", {"fastbn.libs/libtorch_cpu.so": b""}, "not what users need: fastbn.libs"),
    ("content", {"fastbn/module.cpp": b""}, "not what users need: fastbn/module.cpp"),
]


@pytest.mark.parametrize("check, changes, problem", PLANTED, ids=[f"{row[0]}-{i}" for i, row in enumerate(PLANTED)])
def test_a_planted_problem_is_found(check, changes, problem, files, tmp_path):
    changed = {name: content for name, content in (files | changes).items() if content is not None}
    if "fastbn.libs/libtorch_cpu.so" in changed:
        changed["fastbn.libs/libtorch_cpu.so"] = files["fastbn/libfastbn.so"]
    found = problems(plant(tmp_path, changed))
    assert found[check].startswith(problem) and len(found) == 1, found


def test_a_platform_without_a_c_library(files, tmp_path):
    files[f"{INFO}/WHEEL"] = WHEEL.replace("manylinux_2_28", "linux").encode()
    found = problems(plant(tmp_path, files, NAME.replace("manylinux_2_28", "linux")))
    assert found == {"tags": "linux_x86_64 says nothing of the C library that is needed"}


def test_a_wheel_that_is_too_large(files, tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "LARGEST", 1000)
    assert problems(plant(tmp_path, files)) == {"size": "expected at most 0 MB"}


@pytest.mark.parametrize(
    "record, problem",
    [
        ("", "fastbn/__init__.py is missing"),
        ("fastbn/__init__.py,sha256=AAAA,0\n", "fastbn/__init__.py has another size or hash"),
        ("gone.py,sha256=AAAA,0\n", "gone.py is not in the wheel"),
    ],
    ids=["missing", "hash", "gone"],
)
def test_a_wrong_record(record, problem, tmp_path):
    path = plant(tmp_path, {"fastbn/__init__.py": b"", f"{INFO}/METADATA": b"Version: 1.0"}, record=record)
    wheel = wheels.Wheel(path)
    wheel.files = {name: wheel.files[name] for name in ("fastbn/__init__.py", f"{INFO}/RECORD")}
    assert problem in wheels.CHECKS["RECORD"](wheel)[1]


def test_every_check_has_a_planted_problem():
    assert {row[0] for row in PLANTED} | {"size", "RECORD"} == set(wheels.CHECKS)


def test_cuda_in_the_bill_of_materials(files, tmp_path):
    (tmp_path / "a.cpp").write_text('__attribute__((section(".nv_fatbin"))) int kernels = 1;')
    subprocess.run(["g++", "-shared", "-fPIC", "a.cpp", "-o", "a.so"], cwd=tmp_path, check=True)
    files["fastbn/libfastbn.so"] = (tmp_path / "a.so").read_bytes()
    assert problems(plant(tmp_path, files)) == {"SBOM": "expected cudart_static, pybind11, torch and a compiler"}
    files[SBOM] = document(cuda="13.0.88").encode()
    assert problems(plant(tmp_path, files)) == {}


def test_the_version_of_a_cuda_toolkit(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    assert sbom.cuda_version(str(nvcc)) == "13.0.88"
    nvcc.write_text("#!/bin/sh\necho none\n")
    with pytest.raises(ValueError, match="expected a version such as V13.0.88, got 'none"):
        sbom.cuda_version(str(nvcc))


def test_the_command(library, tmp_path, capsys):
    module = library.replace(b"torch_fill", b"PyMem_Fill")
    good = plant(tmp_path, files_of(library) | dict.fromkeys(MODULES, module))
    arguments = type("Arguments", (), {"wheels": [good]})
    assert audit.run(arguments) == 0
    assert capsys.readouterr().out.endswith("35 checks, 0 missed\n")
    bad = plant(tmp_path, files_of(library) | dict.fromkeys(MODULES, library))
    arguments.wheels = [bad]
    assert audit.run(arguments) == 1
    printed = capsys.readouterr().out
    assert "MISS  symbols" in printed and printed.endswith("35 checks, 2 missed\n")


def test_what_is_no_wheel(tmp_path):
    path = tmp_path / NAME
    path.write_text("text")
    done = subprocess.run([sys.executable, "-m", "release", "audit", str(path)], capture_output=True, text=True)
    assert done.returncode == 1 and "MISS  file  cannot be read: File is not a zip file" in done.stdout
