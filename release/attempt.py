"""Install a wheel in a fresh environment without a compiler, use it there, also where nothing can be written, take it
away again, and print what came of it as one row. Exits with 1 if anything went wrong. Needs nothing but Python."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

SUMMARY = "install wheels"
NOBODY = 65534

STEP = """
import torch, fastbn
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
net = fastbn.convert(net)
assert any(type(layer).__module__.startswith("fastbn.") for layer in net.modules()), net
x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
losses = []
for _ in range(5):
    loss = nn.functional.cross_entropy(net(x), y)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
"""
WHERE = "import importlib.util, os; print(os.path.dirname(os.path.dirname(importlib.util.find_spec('torch').origin)))"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("wheel", type=Path, metavar="FILE.whl")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="whose version the environment has")
    torch = parser.add_mutually_exclusive_group()
    torch.add_argument("--torch", metavar="VERSION", help="install this one (default: what pip takes)")
    torch.add_argument("--site-packages", action="store_true", help="use the torch that --python finds, where it lies")
    parser.add_argument("--json", action="store_true", help="print JSON")


@dataclass
class Row:
    """What a trial came to: "ok", or what went wrong, for each part of it."""

    wheel: str
    python: str = ""
    torch: str = ""
    node: str = ""
    install: str = ""
    info: str = ""
    verify: str = ""
    training: str = ""
    read_only: str = ""
    how: str = ""  # what made the folder read-only
    uninstall: str = ""
    seconds: float = field(default=0)

    def is_good(self) -> bool:
        parts = (self.install, self.info, self.verify, self.training, self.read_only, self.uninstall)
        return all(part == "ok" for part in parts)


class Environment:
    """A virtual environment in `folder`, with an empty folder to work in, an empty home and no compiler."""

    def __init__(self, folder: Path, python: str) -> None:
        self.root, self.work, self.home = folder / "env", folder / "work", folder / "home"
        self.work.mkdir()
        self.home.mkdir()
        subprocess.run([python, "-m", "venv", str(self.root)], check=True)
        self.python = str(self.root / "bin" / "python")
        self.site = Path(self.ask("import sysconfig; print(sysconfig.get_path('purelib'))"))
        # The system's folders hold compilers; what else torch and fastbn call of them is not needed.
        self.variables = {"PATH": str(self.root / "bin"), "HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        for compiler in ("c++", "g++", "clang++", "cc", "gcc", "nvcc"):
            assert shutil.which(compiler, path=self.variables["PATH"]) is None, compiler

    def ask(self, code: str) -> str:
        return subprocess.run(
            [self.python, "-I", "-c", code], check=True, capture_output=True, text=True
        ).stdout.strip()

    def pip(self, *arguments: str) -> str:
        """Run pip, which PYTHONPATH and this folder do not concern (-I). Returns "ok" or its last words."""
        done = subprocess.run([self.python, "-I", "-m", "pip", "--quiet", *arguments], capture_output=True, text=True)
        return _outcome(done)

    def run(self, *command: str, wrapper: tuple[str, ...] = ()) -> str:
        done = subprocess.run([*wrapper, *command], cwd=self.work, env=self.variables, capture_output=True, text=True)
        return _outcome(done)

    def files(self) -> set[str]:
        """Return the files and folders below the environment, but the compiled modules of others than fastbn."""
        names = {str(path.relative_to(self.root)) for path in self.root.rglob("*")}
        return {name for name in names if "fastbn" in name or "__pycache__" not in name}


def _outcome(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode == 0:
        return "ok"
    last = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
    return f"exit status {done.returncode}: {last}"


def read_only_wrappers(folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield ways to run a command that cannot write to `folder`, with their names, the surest first."""
    if os.geteuid() == 0:
        mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
        yield "a read-only mount", ("/usr/bin/unshare", "--mount", "/bin/sh", "-c", mount, str(folder))
        user = f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"
        yield "another user", ("/usr/bin/setpriv", *user)
    else:
        yield "permissions", ()


def try_read_only(env: Environment) -> tuple[str, str]:
    """Use fastbn where site-packages cannot be written to. Returns what came of it, and how it was made so."""
    for cache in (*env.site.glob("fastbn*/**/__pycache__"), *env.site.glob("__pycache__")):
        shutil.rmtree(cache)  # so that Python tries to write it again
    writable = [path for path in (env.site, *env.site.rglob("*")) if path.is_dir() and not path.is_symlink()]
    modes = {path: path.stat().st_mode for path in writable}
    try:
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
        for name, wrapper in read_only_wrappers(env.site):
            system = {"PATH": f"{env.variables['PATH']}:/usr/bin:/bin:/usr/sbin:/sbin"} if wrapper else {}
            write = f"open({str(env.site / 'written')!r}, 'w')"
            probe = f"import torch\ntry: {write}\nexcept OSError: pass\nelse: raise SystemExit('was written to')"
            before = env.variables
            env.variables = before | system
            try:
                if env.run(env.python, "-c", probe, wrapper=wrapper) == "ok":
                    outcome = env.run(env.python, "-c", STEP, wrapper=wrapper)
                    if outcome == "ok":
                        outcome = env.run(
                            env.python, str(env.root / "bin" / "fastbn"), "verify", "--quick", wrapper=wrapper
                        )
                    caches = [*env.site.glob("fastbn/**/__pycache__")]
                    return (f"{len(caches)} folders were written" if caches else outcome), name
            finally:
                env.variables = before
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
        (env.site / "written").unlink(missing_ok=True)
    return "not tried: every way to make site-packages read-only left it writable here", "none"


def attempt(wheel: Path, python: str, torch: str | None, site_packages: bool) -> Row:
    """Try a wheel, as the module's docstring says."""
    row, begin = Row(wheel.name), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)  # for another user
        env = Environment(Path(name), python)
        row.python = env.ask("import platform; print(platform.python_version())")
        if site_packages:
            where = subprocess.run([python, "-I", "-c", WHERE], check=True, capture_output=True, text=True).stdout
            (env.site / "torch_of_another_environment.pth").write_text(where)
        elif torch:
            row.install = env.pip("install", f"torch=={torch}")
        before = env.files()
        if row.install in ("", "ok"):
            row.install = env.pip("install", *(["--no-deps"] if site_packages else []), str(wheel.resolve()))
        if row.install == "ok":
            use(env, row)
            row.read_only, row.how = try_read_only(env)
            row.uninstall = env.pip("uninstall", "--yes", "fastbn")
            left = env.files() - before if torch or site_packages else {n for n in env.files() if "fastbn" in n}
            left |= {str(path) for folder in (env.work, env.home) for path in folder.rglob("*")}
            if row.uninstall == "ok" and left:
                row.uninstall = f"left {', '.join(sorted(left)[:3])}"
    row.seconds = round(time.perf_counter() - begin, 1)
    return row


def use(env: Environment, row: Row) -> None:
    """Run the commands and a few steps of training, and fill in their parts of the row."""
    command = str(env.root / "bin" / "fastbn")
    row.info = env.run(command, "info")
    row.verify = env.run(command, "verify", "--quick")
    row.training = env.run(env.python, "-c", STEP)
    done = subprocess.run([command, "info", "--json"], cwd=env.work, env=env.variables, capture_output=True, text=True)
    if done.returncode == 0:
        about = json.loads(done.stdout)
        row.torch, row.node = about["torch"], about["runs here"]["C++ autograd node"].partition(":")[0]


def run(args: argparse.Namespace) -> int:
    """Print the row. Returns 1 if a part of it is not good."""
    row = attempt(args.wheel, args.python, args.torch, args.site_packages)
    if args.json:
        print(json.dumps(asdict(row), indent=2))
    else:
        print("\n".join(f"{key.replace('_', ' ').ljust(9)}  {value}" for key, value in asdict(row).items()))
    return 0 if row.is_good() else 1
