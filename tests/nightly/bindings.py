"""Builds the extension with AddressSanitizer in a copy of the tree, and runs tests through the bindings there.

`python -m tests.nightly.bindings [argument of pytest ...]`. First a planted overrun must be reported: a tensor
over memory that is smaller than its sizes say. The compiler is a script that adds flags, so that setup.py is as users
run it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / ".build" / "asan"
COMPILER = COPY / ".build" / "c++"
BUILT = (".build", "build")  # folders of the copy
# As in CMakeLists.txt, which has the reasons: these flags take minutes off the compilation.
FLAGS = (
    "-fsanitize=address -fno-omit-frame-pointer -g1 -O1 -fno-sanitize-address-use-after-scope "
    "--param=asan-instrumentation-with-call-threshold=0"
)
TESTS = ("-q", "-m", "not slow", "-k", "not emulator and not stream and not triton", "tests/ops", "tests/functional")
OVERRUN = """
import ctypes, numpy, torch, fastbn
print("instruction set", fastbn._C.build_info()["cpu_instruction_set"], flush=True)
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
memory = ctypes.cast(malloc(4096), ctypes.POINTER(ctypes.c_float))
# 128 bytes too many: further on there may be freed memory, which AddressSanitizer calls by another name.
x = torch.from_numpy(numpy.ctypeslib.as_array(memory, (4, 8, 33)))
fastbn.functional.batch_norm(x, None, None, training=True, backend="cpu")
"""


def update_copy() -> None:
    """Copy the files that git knows or would take, and keep what was built of them, unless the flags are others."""
    script = f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" {FLAGS}\n'
    if not COMPILER.exists() or COMPILER.read_text() != script:
        shutil.rmtree(COPY, ignore_errors=True)
        COMPILER.parent.mkdir(parents=True)
        COMPILER.write_text(script)
        COMPILER.chmod(0o755)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    wanted = {COPY / name: ROOT / name for name in names if name and (ROOT / name).is_file()}
    for old in COPY.rglob("*"):
        if old.is_file() and old not in wanted and old.suffix != ".so" and old.relative_to(COPY).parts[0] not in BUILT:
            old.unlink()
    for new, source in wanted.items():
        if not new.exists() or new.stat().st_mtime != source.stat().st_mtime:
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, new)


def build() -> None:
    env = {**os.environ, "CXX": str(COMPILER), "FASTBN_CUDA": "0"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=COPY, check=True, env=env)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the copy with AddressSanitizer loaded before it, and what AddressSanitizer finds `throw` in."""
    compiler = os.environ.get("CXX", "c++").split()
    libraries = [
        subprocess.check_output([*compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    env = {
        **os.environ,
        "PYTHONPATH": str(COPY),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaks on purpose
        "FASTBN_CPU": "avx2" if has_avx2() else "portable",  # it does not see the masked loads and stores of AVX-512
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=COPY, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def has_avx2() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and all(f" {flag}" in cpuinfo.read_text() for flag in ("avx2", "fma", "f16c"))


def main() -> int:
    update_copy()
    build()
    planted = run("-c", OVERRUN)
    if not re.search(r"heap-buffer-overflow[\s\S]*fastbn::cpu::", planted.stdout):
        print(f"expected AddressSanitizer to report a heap-buffer-overflow in fastbn::cpu, got\n{planted.stdout}")
        return 1
    print(planted.stdout.splitlines()[0])
    print("the planted overrun was reported")
    tests = run("-m", "pytest", *(sys.argv[1:] or TESTS))
    print(tests.stdout)
    return tests.returncode


if __name__ == "__main__":
    sys.exit(main())
