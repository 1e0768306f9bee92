"""The audit of a compiled file finds what is planted in one that g++ makes here."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import pytest

from release import binaries

SOURCE = """
#include <cstdio>
extern "C" __attribute__((visibility("default")))
int use() { char text[64]; std::sprintf(text, "%d", 1); return text[0]; }
"""
HARDENED = ("-O1", "-fPIC", "-shared", "-fstack-protector-strong", "-Wl,-z,relro,-z,now,-z,noexecstack")


def compiled(folder: Path, source: str, *flags: str, name: str = "libfastbn.so") -> binaries.Binary:
    (folder / "source.cpp").write_text(source)
    command = ["g++", *HARDENED, *flags, "source.cpp", "-o", name]
    subprocess.run(command, cwd=folder, check=True)
    return binaries.read(f"fastbn/{name}", (folder / name).read_bytes())


def problems(binary: binaries.Binary) -> dict[str, str]:
    return {finding.check: finding.problem for finding in binaries.check(binary) if finding.problem}


@functools.cache
def checks() -> set[str]:
    own = Path(binaries.__file__).read_text()
    return {part.split('"')[1] for part in own.split("yield finding(")[1:]}


PLANTED = {
    "symbols": (
        SOURCE + 'extern "C" int mine(); int other() { return mine(); }',
        (),
        "of no stable interface, as mine",
    ),
    "NEEDED": (SOURCE, ("-Wl,--no-as-needed", "-lresolv"), "may not need libresolv.so.2"),
    "RPATH": (SOURCE, ("-Wl,-rpath,/opt/lib",), "the installed wheel has no such folder"),
    "RELRO": (SOURCE, ("-Wl,-z,lazy",), "has no BIND_NOW"),
    "stack": (SOURCE, ("-Wl,-z,execstack",), "link with -z noexecstack"),
    "stack protector": (SOURCE, ("-fno-stack-protector",), "nothing calls __stack_chk_fail"),
    "debug sections": (SOURCE + '__attribute__((section(".debug_x"))) int x = 1;', (), "makes the wheel large"),
    "build paths": (SOURCE + 'const char* path() { return "/home/someone/a.h"; }', (), "as /home/someone/a.h"),
}


def test_a_good_file_has_no_problem(tmp_path):
    stable = 'extern "C" int torch_library_impl(), aoti_torch_get_dim();'
    calls = "int both() { return torch_library_impl() + aoti_torch_get_dim(); }"
    binary = compiled(tmp_path, SOURCE + stable + calls)
    assert problems(binary) == {}
    found = {finding.check: finding.found for finding in binaries.check(binary)}
    assert found["symbols"] == "2 of torch's stable interface, 0 others" and found["RELRO"] == "full"


@pytest.mark.parametrize("check", PLANTED)
def test_a_planted_problem_is_found(check, tmp_path):
    source, flags, problem = PLANTED[check]
    assert problems(compiled(tmp_path, source, *flags)) == {check: problem}


def test_every_check_but_the_size_has_a_planted_problem():
    assert checks() - {"size"} == set(PLANTED)


def test_a_file_without_relro(tmp_path):
    assert problems(compiled(tmp_path, SOURCE, "-Wl,-z,norelro"))["RELRO"] == "has no PT_GNU_RELRO"


def test_symbols_by_kind(tmp_path):
    python = SOURCE + 'extern "C" int PyLong_Check(); int other() { return PyLong_Check(); }'
    torch = SOURCE + "namespace at { int add(); } int other() { return at::add(); }"
    module, node = "_C.cpython-311-x86_64-linux-gnu.so", "_node_2_13_0.cpython-311-x86_64-linux-gnu.so"
    assert problems(compiled(tmp_path, python, name=module)) == {}
    assert problems(compiled(tmp_path, python)) == {"symbols": "of no stable interface, as PyLong_Check"}
    assert problems(compiled(tmp_path, torch, name=node)) == {}
    assert problems(compiled(tmp_path, torch, name=module)) == {"symbols": "of no stable interface, as _ZN2at3addEv"}


def test_this_folder_and_this_user_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(binaries.getpass, "getuser", lambda: "someone")
    text = f"\0file {tmp_path}/a.h\0/data/someone/a.h\0/data/nobody/a.h\0site-packages/torch/a.h\0"
    assert binaries.paths_in(text.encode()) == ["/data/someone/a.h", f"file {tmp_path}/a.h"]


def test_what_is_no_elf_file():
    with pytest.raises(ValueError, match=r"^fastbn/a\.so: expected an ELF file"):
        binaries.read("fastbn/a.so", b"text")
