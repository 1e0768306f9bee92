"""Checks of a wheel as a whole: its name, its record, and what it has beside code."""

from __future__ import annotations

import base64
import csv
import email.parser
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import parse_tag
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from release import binaries
from release.report import Finding

LARGEST = 100_000_000  # bytes: what package indexes accept by default
OLDEST_TORCH = SpecifierSet(">=2.10")
TOP_LEVEL = {"fastbn", "fastbn_command.py"}
NOT_IN_A_WHEEL = re.compile(r"(^|/)(tests|bench|examples|release|csrc|__pycache__)/|\.(pyc|cpp|cu|h|o)$")


class Wheel:
    """The files of a wheel by their names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self.files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
        self.info = next((name.split("/")[0] for name in self.files if name.endswith(".dist-info/METADATA")), "")

    def text(self, name: str) -> str:
        """Return a file of dist-info, or "" if there is none."""
        return self.files.get(f"{self.info}/{name}", b"").decode()

    def message(self, name: str) -> Message:
        return email.parser.Parser().parsestr(self.text(name))

    def binaries(self) -> list[binaries.Binary]:
        return [binaries.read(name, content) for name, content in self.files.items() if name.endswith(".so")]


def check(wheel: Wheel) -> Iterator[Finding]:
    """Yield the findings of all checks of a wheel but those of its binaries."""
    for name, function in CHECKS.items():
        found, problem = function(wheel)
        yield Finding(wheel.path.name, name, found, problem)


def _size(wheel: Wheel) -> tuple[str, str]:
    packed, unpacked = wheel.path.stat().st_size, sum(map(len, wheel.files.values()))
    found = f"{packed / 1e6:.2f} MB, unpacked {unpacked / 1e6:.2f} MB in {len(wheel.files)} files"
    return found, f"expected at most {LARGEST / 1e6:.0f} MB" if packed > LARGEST else ""


def _tags(wheel: Wheel) -> tuple[str, str]:
    try:
        _, version, _, of_name = parse_wheel_filename(wheel.path.name)
    except InvalidWheelFilename as error:
        return "none", str(error)
    inside = wheel.message("WHEEL").get_all("Tag", [])
    of_content = {tag for text in inside for tag in parse_tag(text)}
    found = " ".join([*sorted({tag.interpreter for tag in of_name}), *sorted({tag.platform for tag in of_name})])
    if of_content != of_name:
        return found, f"WHEEL has other tags: {', '.join(sorted(inside)) or 'none'}"
    if str(version) != wheel.message("METADATA")["Version"]:
        return found, f"METADATA has the version {wheel.message('METADATA')['Version']}"
    plain = sorted(tag.platform for tag in of_name if tag.platform.startswith("linux_"))
    return found, f"{plain[0]} says nothing of the C library that is needed" if plain else ""


def _modules(wheel: Wheel) -> tuple[str, str]:
    tagged = {tag.interpreter for text in wheel.message("WHEEL").get_all("Tag", []) for tag in parse_tag(text)}
    modules = re.findall(r"^fastbn/_C\.cpython-(\d+)-", "\n".join(wheel.files), re.MULTILINE)
    nodes = sorted(name for name in wheel.files if name.startswith("fastbn/_node_"))
    found = f"{' '.join(sorted(modules)) or 'none'}; nodes: {' '.join(Path(name).name for name in nodes) or 'none'}"
    if "fastbn/libfastbn.so" not in wheel.files:
        return found, "there is no fastbn/libfastbn.so"
    if {f"cp{number}" for number in modules} != tagged:
        return found, f"expected one for each of {' '.join(sorted(tagged)) or 'no tags'}"
    return found, ""


def _metadata(wheel: Wheel) -> tuple[str, str]:
    metadata = wheel.message("METADATA")
    problems = [f"no {field}" for field in ("Summary", "Requires-Python", "Project-URL") if not metadata[field]]
    torch = []
    for text in metadata.get_all("Requires-Dist", []):
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            problems.append(f"Requires-Dist: {error}")
            continue
        if requirement.marker is None:
            torch.append(str(requirement))
            if requirement.name != "torch" or requirement.specifier != OLDEST_TORCH:
                problems.append(f"needs {requirement}, expected torch{OLDEST_TORCH} alone")
    if not torch:
        problems.append(f"does not need torch{OLDEST_TORCH}")
    if not str(metadata.get_payload()).strip():
        problems.append("no description")
    urls = len(metadata.get_all("Project-URL", []))
    return f"needs {', '.join(torch) or 'nothing'}, Python {metadata['Requires-Python']}; {urls} URLs", "; ".join(
        problems
    )


def _licence(wheel: Wheel) -> tuple[str, str]:
    metadata = wheel.message("METADATA")
    files = metadata.get_all("License-File", [])
    missing = [name for name in files if not wheel.text(f"licenses/{name}").strip()]
    found = f"{metadata['License-Expression'] or 'none'}: {' '.join(files) or 'no file'}"
    if not metadata["License-Expression"] or not files:
        return found, "METADATA names no licence, or no file with it"
    return found, f"not in the wheel: {', '.join(missing)}" if missing else ""


def _sbom(wheel: Wheel) -> tuple[str, str]:
    names = [name for name in wheel.files if name.startswith(f"{wheel.info}/sboms/") and name.endswith(".cdx.json")]
    if not names:
        return "none", "expected one in dist-info/sboms"
    try:
        sbom = json.loads(wheel.files[names[0]])
        subject = sbom["metadata"]["component"]
        parts = {part["name"]: part["version"] for part in sbom["components"]}
        tools = {tool["name"]: tool["version"] for tool in sbom["metadata"]["tools"]["components"]}
    except (ValueError, KeyError, TypeError) as error:
        return names[0], f"is not a CycloneDX document with components and tools: {error!r}"
    found = ", ".join(f"{name} {version}" for name, version in (parts | tools).items())
    version = wheel.message("METADATA")["Version"]
    if (sbom.get("bomFormat"), subject.get("name"), subject.get("version")) != ("CycloneDX", "fastbn", version):
        return found, f"expected a CycloneDX document of fastbn {version}"
    expected = {"pybind11", "torch"}
    if any(".nv_fatbin" in binary.sections for binary in wheel.binaries()):
        expected.add("cudart_static")
    if set(parts) != expected or not tools:
        return found, f"expected {', '.join(sorted(expected))} and a compiler"
    return found, ""


def _record(wheel: Wheel) -> tuple[str, str]:
    rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(wheel.text("RECORD"))) if row}
    record, problems = f"{wheel.info}/RECORD", []
    for name, content in wheel.files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        expected = ["", ""] if name == record else [f"sha256={digest}", str(len(content))]
        if name not in rows:
            problems.append(f"{name} is missing")
        elif rows[name] != expected:
            problems.append(f"{name} has another size or hash")
    problems += [f"{name} is not in the wheel" for name in rows if name not in wheel.files]
    return f"{len(rows)} files", "; ".join(problems[:3])


def _content(wheel: Wheel) -> tuple[str, str]:
    top = sorted({name.split("/")[0] for name in wheel.files} - {wheel.info})
    wrong = [name for name in wheel.files if NOT_IN_A_WHEEL.search(name)]
    wrong += [name for name in top if name not in TOP_LEVEL]
    return " ".join(top), f"not what users need: {', '.join(wrong[:3])}" if wrong else ""


CHECKS = {
    "size": _size,
    "tags": _tags,
    "modules": _modules,
    "metadata": _metadata,
    "licence": _licence,
    "SBOM": _sbom,
    "RECORD": _record,
    "content": _content,
}
