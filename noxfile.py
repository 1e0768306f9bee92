"""Tasks of this project: `nox -l` lists them, `nox -s lint` runs one. `.ci/run` and GitHub Actions run the same ones.

They run in the environment that calls nox, for building torch's extensions into one for each would take longer than
the tasks: `pip install -e '.[dev]' -r requirements-lint.txt` makes it.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "test_fast"]

CLANG_FORMATTED = ("*.h", "*.cpp", "*.cu", "*.cuh", "*.inl")
PYTEST = ("python", "-m", "pytest")
# The tests of the benchmark time what they run, and so run alone.
TIMED = "tests/bench"
CMAKE_BUILD = ".build/cmake"
SITE, PICTURES = ".build/site", ".build/screenshots"
TSAN_BUILD = ".build/tsan"


@nox.session
def lint(session: nox.Session) -> None:
    """Check the style of Python, C++ and CUDA."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    listed = session.run("git", "ls-files", *CLANG_FORMATTED, silent=True, external=True)
    assert isinstance(listed, str)
    session.run("clang-format", "--dry-run", "--Werror", *listed.split())


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of fastbn/ as pyproject.toml configures it."""
    session.run("mypy", *session.posargs)


@nox.session
def test_fast(session: nox.Session) -> None:
    """Run the tests of four minutes, before each commit."""
    session.run(*PYTEST, "-q", "-n", "auto", "-m", "not slow", *session.posargs)


@nox.session
def test(session: nox.Session) -> None:
    """Run all tests, or what `-- -m slow` selects of them."""
    session.run(*PYTEST, "-q", "-n", "auto", f"--ignore={TIMED}", *session.posargs)
    session.run(*PYTEST, "-q", TIMED, *session.posargs)


@nox.session
def interpreted(session: nox.Session) -> None:
    """Run the contract's tests on Triton's kernels in its interpreter (half an hour on two cores)."""
    session.run(*PYTEST, "-q", "-n", "auto", "-m", "interpreted", *session.posargs)


@nox.session
def tools(session: nox.Session) -> None:
    """Install what docs/tools.md lists and run the tests that need it: of what fits, a missing package is an error."""
    with tempfile.TemporaryDirectory() as folder:
        constraint = Path(folder, "torch.txt")  # torchvision is to fit the torch that fastbn was built for
        constraint.write_text(f"torch=={importlib.metadata.version('torch')}\n")
        packages = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["tools"]
        session.run("python", "-m", "pip", "install", "--quiet", "-c", str(constraint), *packages)
    session.run(*PYTEST, "-q", "-n", "auto", "-m", "needs", *session.posargs, env={"FASTBN_REQUIRE_TOOLS": "1"})


@nox.session
def cpp(session: nox.Session) -> None:
    """Build the layers without torch under AddressSanitizer and UBSan, and run their C++ tests."""
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    session.run("cmake", "-S", ".", "-B", CMAKE_BUILD, *generator, "-DFASTBN_SANITIZE=ON", external=True)
    jobs = str(os.cpu_count() or 1)
    session.run("cmake", "--build", CMAKE_BUILD, "--parallel", jobs, external=True)
    session.run("ctest", "--test-dir", CMAKE_BUILD, "--output-on-failure", "--parallel", jobs, external=True)


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run the tests of all cases through the emulated CUDA kernels under AddressSanitizer and UBSan (ten minutes)."""
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    # Python leaks on purpose.
    env = {"FASTBN_SANITIZE": "1", "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    folders = [f"tests/{name}" for name in ("functional", "numerics", "autograd", "ops")]
    selected = ("-k", "stream or emulator", "-m", "not slow")
    session.run(*PYTEST, "-q", *selected, *folders, *session.posargs, env=env)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Compare 10,000 drawn calls with torch and with extended precision, on all cores; options follow --."""
    session.run("python", "-m", "tests.fuzz", "--cases", "10000", *session.posargs)


@nox.session
def threads(session: nox.Session) -> None:
    """Run the CPU kernels on several threads under ThreadSanitizer."""
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    session.run("cmake", "-S", ".", "-B", TSAN_BUILD, *generator, "-DFASTBN_TSAN=ON", external=True)
    jobs = str(os.cpu_count() or 1)
    session.run("cmake", "--build", TSAN_BUILD, "--target", "test_threads", "--parallel", jobs, external=True)
    session.run("ctest", "--test-dir", TSAN_BUILD, "-R", "^test_threads_", "--output-on-failure", external=True)


@nox.session
def bindings(session: nox.Session) -> None:
    """Build the extension with AddressSanitizer in a copy of the tree, and run the tests of its ops there."""
    session.run("python", "-m", "tests.nightly.bindings", *session.posargs)


@nox.session
def large(session: nox.Session) -> None:
    """Run the tests of more than 2^31 elements on the CPU, which take 14 GiB of memory."""
    session.run(*PYTEST, "-q", "-m", "large and not gpu", "tests/ops/test_large.py", *session.posargs)


@nox.session
def nightly(session: nox.Session) -> None:
    """Run the four above, or those named after --, and write their outcomes to CONTRIBUTING.md."""
    session.run("python", "-m", "tests.nightly", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Run the quick suite of the benchmark (a minute); options follow --."""
    session.run("python", "-m", "bench", "--suite", "quick", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Write docs/plans.md, the code in docs/triton.md and the tables of docs/numerics.md again, and fail where they
    were out of date."""
    target = Path("docs", "plans.md")
    before = target.read_text()
    plans = session.run("python", "docs/plans.py", silent=True)
    assert isinstance(plans, str)
    target.write_text(plans)
    if plans != before:
        session.error(f"{target} was out of date and has been written again")
    for target, command in (("triton", ("docs/triton_code.py",)), ("numerics", ("-m", "docs.numerics"))):
        page = Path("docs", f"{target}.md")
        before = page.read_text()
        session.run("python", *command)
        if page.read_text() != before:
            session.error(f"{page} was out of date and has been written again")


def sphinx(session: nox.Session, builder: str, folder: str) -> None:
    """Install the extra `docs` and run Sphinx; every warning, and every reference that leads nowhere, is an error."""
    packages = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["docs"]
    session.run("python", "-m", "pip", "install", "--quiet", *packages)
    options = ("--fresh-env", "--nitpicky", "--fail-on-warning", "--keep-going", "--quiet")
    session.run("python", "-m", "sphinx", "--builder", builder, *options, *session.posargs, "docs", folder)


@nox.session
def site(session: nox.Session) -> None:
    """Build the documentation site into .build/site."""
    sphinx(session, "html", SITE)


@nox.session
def links(session: nox.Session) -> None:
    """Ask every link from the documentation to other sites whether it is there. It needs the network."""
    sphinx(session, "linkcheck", ".build/links")


@nox.session
def screenshots(session: nox.Session) -> None:
    """Build the site and look at it in a browser, desktop and phone, light and dark: pictures, and faults as errors."""
    sphinx(session, "html", SITE)
    session.run("python", "-m", "pip", "install", "--quiet", "playwright")
    session.run("python", "docs/screenshots.py", SITE, PICTURES)
