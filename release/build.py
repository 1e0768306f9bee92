"""Build the source distribution and a wheel for this Python and others, name the C library that the wheel needs, add
its bill of materials, and check it. Run it with a Python that has torch 2.10 or newer, in the root of a clone."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from elftools.elf.elffile import ELFFile

from release import audit, sbom
from release.report import lines

SUMMARY = "make packages"
ARCHITECTURES = "8.0;9.0;10.0+PTX"
FROM_TORCH = ("libc10.so", "libtorch_cpu.so", "libtorch_python.so")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("dist"), help="the folder for the packages (default: dist)")
    parser.add_argument("--cuda", action="store_true", help=f"with CUDA kernels, for {ARCHITECTURES}")
    parser.add_argument(
        "--python",
        nargs="+",
        default=[],
        metavar="PATH",
        help="further interpreters: for each a module, and a node if it has torch",
    )
    parser.add_argument("--no-sdist", action="store_true", help="make the wheel alone")


def run(args: argparse.Namespace) -> int:
    """Build, and return what the audit of the wheel returns."""
    if not Path("setup.py").exists():
        sys.exit("python -m release build: expected to run in the root of a clone of fastbn, got no setup.py here")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.no_sdist:
        with tempfile.TemporaryDirectory() as name:
            print(f"made {made(args.out, '--sdist', configured(Path(name), [egg_info(name)]))}", flush=True)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = wheel(folder, args.cuda, args.python)
        listed = with_sbom(raw, folder, sbom.cuda_version(nvcc()) if args.cuda else None)
        final = named_for_its_c_library(listed, args.out)
    print(f"made {final} in {time.perf_counter() - begin:.0f} s\n", flush=True)
    findings = audit.audit(final)
    print("\n".join(lines(findings)))
    return 1 if any(finding.problem for finding in findings) else 0


def call(command: list[str], env: dict[str, str] | None = None) -> None:
    """Run a command, and exit with all that it printed if it fails."""
    done = subprocess.run(
        command, env=os.environ | (env or {}), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\npython -m release build: {' '.join(command)} ended with {done.returncode}")


def made(out: Path, kind: str, env: dict[str, str]) -> Path:
    """Let `build` make a package into the folder `out`, with this environment's torch. Returns its path."""
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    call([sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", str(out)], env)
    return next(path for path in out.iterdir() if before.get(path) != path.stat().st_mtime_ns)


def egg_info(folder: str | Path) -> str:
    """Return the setting for a fresh folder of names: setuptools would take what an older one in the clone lists."""
    return f"[egg_info]\negg_base = {folder}"


def configured(folder: Path, settings: list[str]) -> dict[str, str]:
    """Return the environment in which setuptools reads these lines beside the project's own settings."""
    (folder / "setup.cfg").write_text("\n".join(settings) + "\n")
    return {"DIST_EXTRA_CONFIG": str(folder / "setup.cfg")}


def wheel(folder: Path, cuda: bool, pythons: list[str]) -> Path:
    """Compile, and return a wheel in `folder`. Objects stay in .build, so that only what changed is compiled again.

    What the wheel is made of is gathered in a fresh folder: an older one may have files that are gone from the tree.
    A wheel with CUDA has the local version `cu` with the toolkit's number, as torch's own wheels have: both kinds can
    be published as the same version, and pip prefers this one where it is offered both.
    """
    settings = [
        "[build]",
        f"build_base = {Path('.build', 'release-cuda' if cuda else 'release-cpu')}",
        f"build_lib = {folder / 'lib'}",
        egg_info(folder),
    ]
    env = {"FASTBN_CUDA": "1" if cuda else "0", "FASTBN_PYTHONS": os.pathsep.join(pythons)}
    if cuda:
        env["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES
        settings.append(f"tag_build = +cu{''.join(sbom.cuda_version(nvcc()).split('.')[:2])}")
    (folder / "raw").mkdir()
    return made(folder / "raw", "--wheel", env | configured(folder, settings))


def nvcc() -> str:
    """Return the path of nvcc as setup.py finds it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return str(Path(home, "bin", "nvcc")) if Path(home, "bin", "nvcc").exists() else "nvcc"


def with_sbom(raw: Path, folder: Path, cuda: str | None) -> Path:
    """Return a copy of a wheel, in `folder`, that has its bill of materials."""
    import pybind11
    import torch

    call([sys.executable, "-m", "wheel", "unpack", str(raw), "--dest", str(folder / "unpacked")])
    tree = next((folder / "unpacked").iterdir())
    library = ELFFile(io.BytesIO((tree / "fastbn" / "libfastbn.so").read_bytes()))
    comments = library.get_section_by_name(".comment").data().strip(b"\0").split(b"\0")
    content = sbom.document(
        raw.name.split("-")[1], pybind11.__version__, torch.__version__, comments[-1].decode(), cuda
    )
    target = next(tree.glob("*.dist-info")) / "sboms"
    target.mkdir()
    (target / "fastbn.cdx.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "listed").mkdir()
    call([sys.executable, "-m", "wheel", "pack", str(tree), "--dest", str(folder / "listed")])
    return next((folder / "listed").iterdir())


def named_for_its_c_library(wheel: Path, out: Path) -> Path:
    """Return a wheel in `out` whose tag names the oldest C library that it runs with, which auditwheel reads from it.

    That is the C library of the machine that compiles, as far as functions are used that changed in it: in a
    container of manylinux_2_28, 2.28. Torch's libraries are left to torch, so nothing is copied and no RPATH is set;
    the audit sees to it.
    """
    with tempfile.TemporaryDirectory() as name:
        excluded = [option for library in FROM_TORCH for option in ("--exclude", library)]
        command = [sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", name, str(wheel)]
        call(command)
        repaired = next(Path(name).iterdir())
        target = out / repaired.name
        target.write_bytes(repaired.read_bytes())
        return target
