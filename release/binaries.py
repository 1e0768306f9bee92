"""Checks of one compiled file of a wheel: what it needs of other libraries, how it is hardened, and what it gives away.

The ELF format is that of the System V ABI, and full RELRO is PT_GNU_RELRO with all symbols bound at load.
"""

from __future__ import annotations

import getpass
import io
import os
import re
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection, GNUVerSymSection

from release.report import Finding

SYSTEM = {"ld-linux-x86-64.so.2", "libc.so.6", "libdl.so.2", "libgcc_s.so.1", "libm.so.6", "libpthread.so.0"}
SYSTEM |= {"librt.so.1", "libstdc++.so.6", "ld-linux-aarch64.so.1"}
# What each kind of file may need beside the system's libraries. None of torch's is in the wheel: torch is imported
# first, and a library that is loaded is found by its name.
MAY_NEED = {
    "library": {"libtorch_cpu.so"},
    "module": set(),
    "node": {"libc10.so", "libtorch_cpu.so", "libtorch_python.so"},
}
STABLE = re.compile(r"(aoti_)?torch_\w+")  # the C functions of torch that keep their meaning from release to release
PYTHON = re.compile(r"_?Py[A-Z_]\w*")
OF_THE_LINKER = {"__cxa_finalize", "__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
SYSTEM_VERSION = re.compile(r"(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")


@dataclass(frozen=True)
class Binary:
    """One ELF file, by its name in the wheel."""

    name: str
    needed: tuple[str, ...]
    search_paths: tuple[str, ...]  # RPATH and RUNPATH
    undefined: tuple[tuple[str, str], ...]  # names of symbols with their versions, "" for none
    has_relro: bool
    binds_now: bool
    has_plain_stack: bool  # a stack that cannot be executed
    sections: frozenset[str]
    content: bytes

    @property
    def kind(self) -> str:
        stem = Path(self.name).name
        return "node" if stem.startswith("_node_") else "module" if stem.startswith("_C.") else "library"


def read(name: str, content: bytes) -> Binary:
    """Read an ELF file. Raises ValueError if it is none."""
    try:
        elf = ELFFile(io.BytesIO(content))
    except ELFError as error:
        raise ValueError(f"{name}: expected an ELF file, got one with {error}") from error
    dynamic = next((section for section in elf.iter_sections() if isinstance(section, DynamicSection)), None)
    tags = list(dynamic.iter_tags()) if dynamic else []
    stack = [segment for segment in elf.iter_segments() if segment["p_type"] == "PT_GNU_STACK"]
    flags = {tag.entry.d_tag: tag.entry.d_val for tag in tags}
    return Binary(
        name=name,
        needed=tuple(tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"),
        search_paths=tuple(
            getattr(tag, "rpath", None) or tag.runpath for tag in tags if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")
        ),
        undefined=tuple(_undefined(elf)),
        has_relro=any(segment["p_type"] == "PT_GNU_RELRO" for segment in elf.iter_segments()),
        binds_now="DT_BIND_NOW" in flags or bool(flags.get("DT_FLAGS", 0) & 8 or flags.get("DT_FLAGS_1", 0) & 1),
        has_plain_stack=bool(stack) and not stack[0]["p_flags"] & 1,
        sections=frozenset(section.name for section in elf.iter_sections()),
        content=content,
    )


def _undefined(elf: ELFFile) -> Iterator[tuple[str, str]]:
    symbols, versions, names = elf.get_section_by_name(".dynsym"), None, {}
    for section in elf.iter_sections():
        if isinstance(section, GNUVerSymSection):
            versions = section
        elif isinstance(section, GNUVerNeedSection):
            names = {item["vna_other"]: item.name for _, items in section.iter_versions() for item in items}
    for index, symbol in enumerate(symbols.iter_symbols() if symbols else ()):
        if symbol["st_shndx"] == "SHN_UNDEF" and symbol.name:
            number = versions.get_symbol(index)["ndx"] if versions else None
            yield symbol.name, names.get(number, "")


def foreign(binary: Binary) -> list[str]:
    """Return the undefined symbols that are neither the system's, nor Python's, nor of torch's stable C interface."""
    return [
        name
        for name, version in binary.undefined
        if not (SYSTEM_VERSION.fullmatch(version) if version else _is_expected(name, binary.kind))
    ]


def _is_expected(name: str, kind: str) -> bool:
    if name in OF_THE_LINKER:
        return True
    return bool(PYTHON.fullmatch(name) if kind == "module" else STABLE.fullmatch(name))


def build_paths() -> list[str]:
    """Return beginnings of paths that say where and by whom a file was built: of this machine, and usual ones."""
    here = {os.getcwd(), str(Path.home()), tempfile.gettempdir(), sysconfig.get_path("purelib")}
    return sorted(
        {path.rstrip("/") + "/" for path in here} | {"/home/", "/root/", "/tmp/", "/Users/", "/site-packages/"}
    )


def paths_in(content: bytes) -> list[str]:
    """Return the printable strings of `content` that contain one of `build_paths`, or the name of the user's home."""
    wanted = [re.escape(path.encode()) for path in build_paths()]
    if getpass.getuser() != "root":
        wanted.append(rb"/" + re.escape(getpass.getuser().encode()) + rb"/")
    pattern = re.compile(rb"[\x20-\x7e]*(?:" + rb"|".join(wanted) + rb")[\x20-\x7e]*")
    return sorted({match.decode() for match in pattern.findall(content)})


def check(binary: Binary) -> Iterator[Finding]:
    """Yield the findings of all checks of one file."""

    def finding(check: str, found: str, problem: str = "") -> Finding:
        return Finding(binary.name, check, found, problem)

    yield finding("size", f"{len(binary.content) / 1e6:.2f} MB")

    stable = sum(bool(STABLE.fullmatch(name)) for name, version in binary.undefined if not version)
    if binary.kind == "node":
        yield finding("symbols", "exempt: it serves the torch in its name, and says so where another is installed")
    else:
        unstable = foreign(binary)
        problem = f"of no stable interface, as {', '.join(unstable[:3])}" if unstable else ""
        yield finding("symbols", f"{stable} of torch's stable interface, {len(unstable)} others", problem)

    others = sorted(set(binary.needed) - SYSTEM - MAY_NEED[binary.kind])
    problem = f"may not need {', '.join(others)}" if others else ""
    yield finding("NEEDED", " ".join(binary.needed) or "none", problem)

    problem = "the installed wheel has no such folder" if binary.search_paths else ""
    yield finding("RPATH", " ".join(binary.search_paths) or "none", problem)

    missing = [name for name, has in (("PT_GNU_RELRO", binary.has_relro), ("BIND_NOW", binary.binds_now)) if not has]
    yield finding("RELRO", "partial" if missing else "full", f"has no {', '.join(missing)}" if missing else "")

    plain = binary.has_plain_stack
    yield finding("stack", "not executable" if plain else "executable", "" if plain else "link with -z noexecstack")

    guarded = any(name == "__stack_chk_fail" for name, _ in binary.undefined)
    yield finding("stack protector", "yes" if guarded else "no", "" if guarded else "nothing calls __stack_chk_fail")

    debug = sorted(name for name in binary.sections if name.startswith((".debug", ".zdebug")))
    yield finding("debug sections", " ".join(debug) or "none", "makes the wheel large" if debug else "")

    paths = paths_in(binary.content)
    yield finding("build paths", str(len(paths)) if paths else "none", f"as {paths[0]}" if paths else "")
