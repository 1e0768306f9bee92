"""What is missing for `import fastbn` is one sentence: from the command, from `python -m fastbn`, and at import."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastbn._version import __version__
from fastbn.backends import native

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "import sys, fastbn_command; sys.argv = ['fastbn', 'info']; sys.exit(fastbn_command.main())"


@pytest.fixture
def copied(tmp_path):
    """A folder with fastbn's files as links, which a test may replace."""
    package = tmp_path / "fastbn"
    package.mkdir()
    for path in (ROOT / "fastbn").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    (tmp_path / "fastbn_command.py").symlink_to(ROOT / "fastbn_command.py")
    return tmp_path


def plant_torch(folder: Path, code: str) -> None:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(code)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)


def assert_one_sentence(folder: Path, sentence: str, *options: str) -> None:
    """Assert that the command, in a Python with these options, says `sentence` on one line and nothing else."""
    result = run(folder, *options, "-c", COMMAND)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(sentence) and result.stderr.count("\n") == 1, result.stderr


def test_an_old_torch(copied):
    plant_torch(copied, "__version__ = '2.9.1+cpu'\n")
    sentence = "fastbn needs PyTorch 2.10 or newer, got 2.9.1+cpu: pip install --upgrade torch\n"
    assert_one_sentence(copied, sentence)
    module = run(copied, "-m", "fastbn", "info")
    assert module.returncode == 1 and module.stderr.count("\n") == 1
    assert sentence.strip() in module.stderr and "Traceback" not in module.stderr
    imported = run(copied, "-c", "import fastbn")
    assert imported.stderr.endswith(f"ImportError: {sentence}")


def test_no_torch(copied):
    result = run(copied, "-c", f"import sys; sys.modules['torch'] = None; {COMMAND}")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("fastbn needs PyTorch 2.10 or newer, got none: pip install torch")


@pytest.mark.parametrize(
    "code, reason",
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13: cannot open"),
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
    ],
    ids=["library", "package"],
)
def test_a_torch_that_cannot_be_imported(copied, code, reason):
    plant_torch(copied, code)
    start = "fastbn needs PyTorch 2.10 or newer, and the installed one cannot be imported: "
    assert_one_sentence(copied, start + reason)


def test_another_import_that_fails(copied):
    (copied / "fastbn" / "__init__.py").unlink()
    (copied / "fastbn" / "__init__.py").write_text("import nothing_of_this_name")
    assert_one_sentence(copied, "fastbn: No module named 'nothing_of_this_name'")


def test_no_module_for_this_python(copied):
    plant_torch(copied, "__version__ = '2.10.0'\n")
    for path in (copied / "fastbn").glob("_C.*.so"):
        path.unlink()
    other = copied / "fastbn" / "_C.cpython-39-x86_64-linux-gnu.so"
    other.touch()
    this = f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}"
    sentence = f"fastbn._C was not built for this Python ({this}; there is {other.name}): install a wheel"
    assert_one_sentence(copied, sentence, "-S")  # an editable installation finds the module of its own clone


def test_a_library_that_is_missing_or_of_another_version(copied):
    library = copied / "fastbn" / "libfastbn.so"
    content = library.read_bytes()
    version = f"{__version__}\0".encode()  # a linker may store it as the end of a longer string
    assert content.count(version) >= 1, "expected the version in the library"
    library.unlink()
    assert_one_sentence(copied, f"fastbn._C could not be loaded: {library}: cannot open shared object file")
    library.write_bytes(content.replace(version, version.replace(__version__[-1:].encode(), b"~")))
    expected = f"libfastbn.so: expected that of fastbn {__version__}, got another one; install again"
    assert_one_sentence(copied, f"fastbn._C could not be loaded: {expected}\n")


@pytest.fixture
def old_gpu(monkeypatch):
    monkeypatch.setattr(native, "CUDA_ARCHITECTURES", "8.0;9.0+PTX")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native._C, "build_info", lambda: {"finds_cuda_stream": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    return monkeypatch


REASON = "fastbn was built for 8.0;9.0+PTX, and this GPU is 7.5"


def test_a_gpu_that_was_not_built_for(old_gpu):
    assert native.CudaBackend().availability() == f"no: {REASON}"
    with pytest.warns(UserWarning) as warned:
        native.warn_of_gpus_without_kernels()
    end = "other backends run there, as `fastbn info` says"
    assert [str(warning.message) for warning in warned] == [f"{REASON} (cuda:{i}): {end}" for i in range(2)]


def test_a_gpu_that_was_built_for(old_gpu):
    old_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 0 else (9, 0))
    assert native.CudaBackend().availability() == "yes"
    with pytest.warns(UserWarning) as warned:
        native.warn_of_gpus_without_kernels()
    assert len(warned) == 1 and str(warned[0].message).startswith(f"{REASON} (cuda:0)")


def test_a_build_without_cuda_warns_of_no_gpu(old_gpu):
    old_gpu.setattr(native, "CUDA_ARCHITECTURES", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native.warn_of_gpus_without_kernels()
