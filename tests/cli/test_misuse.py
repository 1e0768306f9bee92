"""Misuse of the command line.

It ends with a nonzero status and one line that says what was expected and what was got, without a traceback, and
nothing is measured, trained or left on disk.
"""

import argparse
import gzip
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

from bench import command, results
from examples.lenet import command as example
from examples.lenet.idx import read_idx
from fastbn.cli import bench, build_parser, demo, doctor, info, main, verify
from fastbn.cli.arguments import check_file
from fastbn.cli.errors import CommandError
from tests.examples import test_lenet
from tests.examples.test_lenet import TEST_LABELS, TRAIN_IMAGES, idx_bytes

ROOT = Path(__file__).resolve().parents[2]
FULL = Path("/dev/full")

pytestmark = pytest.mark.usefixtures("one_thread")

idx_directory = test_lenet.idx_directory

NO_INTEGERS = [
    "1.5",
    "1e3",
    "nan",
    "inf",
    "abc",
    "",
    "0x10",
    "-9223372036854775809",
    "18446744073709551616",
    "9" * 5000,
]
NO_NUMBERS = ["nan", "inf", "-inf", "1e400", "1e300", "-1", "-0.5", "abc", "", "1,5", "9" * 5000]
# The values that each option must refuse before anything runs.
REFUSED = {
    ("demo", "--epochs"): [*NO_INTEGERS, "0", "-1", "2147483648"],
    ("demo", "--batch-size"): [*NO_INTEGERS, "1", "0", "-1", "2147483648"],
    ("demo", "--seed"): [*NO_INTEGERS, "-1", "4294967296"],
    ("demo", "--lr"): [*NO_NUMBERS, "0", "1e39"],
    ("demo", "--device"): ["tpu", "cuda:0", ""],
    ("demo", "--data"): ["", "a\0b"],
    ("demo", "--out"): ["", "a\0b"],
    ("doctor", "--input"): ["", "0,3", "1,,3", "1,-3", "3,", "1.5", "4 3", "99999999999", "a"],
    ("doctor", "--mode"): ["training", ""],
    ("doctor", "--device"): ["cuda", "cpu", ""],
    ("doctor", "--fail-on"): ["errors", ""],
    ("verify", "--device"): ["tpu", "cuda:0", ""],
    ("bench", "--suite"): ["all", ""],
    ("bench", "--part"): ["all", ""],
    ("bench", "--device"): ["tpu", ""],
    ("bench", "--seconds"): [*NO_NUMBERS, "0", "86401"],
    ("bench", "--time-limit"): [*NO_NUMBERS, "604801"],
    ("bench", "--json"): ["", "a\0b"],
    ("bench", "--plots"): ["", "a\0b"],
    ("bench", "--load"): ["", "a\0b"],
    ("bench", "--compare"): ["", "a\0b"],
    ("bench", "--case"): ["", ","],
    ("bench", "--op"): ["", ","],
    ("bench", "--shape"): ["", ","],
    ("bench", "--dtype"): ["", ","],
    ("bench", "--layout"): ["", ","],
    ("bench", "--implementation"): ["", ","],
}
ACCEPTED = [
    ["demo", "--seed", "0"],
    ["demo", "--seed", "4294967295"],
    ["demo", "--batch-size", "2"],
    ["demo", "--epochs", "1", "--lr", "1e-3"],
    ["bench", "--seconds", "0.01", "--time-limit", "0"],
    ["bench", "--time-limit", "1e5"],
    ["doctor", "model:make", "--input", "1"],
    ["doctor", "model:make", "--input", "32x3x224x224"],
]


@pytest.fixture
def idle(monkeypatch):
    """Make every command return 0 at once, so that only the parser can refuse anything."""
    for each in (bench, demo, doctor, info, verify):
        monkeypatch.setattr(each, "run", lambda args: 0)


def misuse(arguments, capsys):
    """Run the command, assert that it refuses as misuse requires, and return the last line that it prints."""
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert status == 2, printed
    assert "Traceback" not in printed.err
    assert lines and (len(lines) == 1 or lines[0].startswith("usage: fastbn")), printed.err
    assert all(len(line) < 1200 for line in lines), printed.err
    return lines[-1]


def test_the_table_holds_every_option_that_takes_a_value():
    (commands,) = (each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    options = {
        (name, action.option_strings[0])
        for name, parser in commands.choices.items()
        for action in parser._actions
        if action.option_strings and action.nargs != 0
    }
    assert options == set(REFUSED)


@pytest.mark.parametrize(
    "name, option, value", [(*option, value) for option, values in REFUSED.items() for value in values]
)
def test_values_that_an_option_refuses(idle, capsys, name, option, value):
    said = misuse([name, f"{option}={value}"], capsys)
    assert said.startswith(f"fastbn {name}: error: argument {option}: ")
    assert ("expected" in said and "got" in said) or "invalid choice" in said


@pytest.mark.parametrize("arguments", ACCEPTED, ids=" ".join)
def test_values_that_an_option_takes(idle, arguments):
    assert main(arguments) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "--quick"],
        ["info", "now"],
        ["verify", "--quick=1"],
        ["demo", "--seed"],
        ["demo", "--lr", "-inf"],
        ["bench", "--seconds"],
        ["bench", "--list=1"],
        ["bench", "quick"],
    ],
    ids=" ".join,
)
def test_usage(idle, capsys, arguments):
    misuse(arguments, capsys)


# Paths at which no folder can be made; {file} is a file.
NO_FOLDERS = ["{file}", "{file}/below", "{tmp}/" + "n" * 300, "{tmp}/loop/below", "/proc/nowhere/below"]


@pytest.fixture
def place(tmp_path):
    """Return a function that fills in the paths above."""
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    yield lambda text: text.format(file=tmp_path / "file", tmp=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"


@pytest.fixture
def locked(tmp_path):
    """Return a folder that this process may not enter; root's privileges are dropped for it."""
    folder = tmp_path / "locked"
    (folder / "inner").mkdir(parents=True)
    folder.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o700)


def never(*_, **__):
    pytest.fail("this was not to be reached")


@pytest.mark.parametrize("path", [*NO_FOLDERS, "{tmp}/missing", "{tmp}/loop", "{tmp}"])
def test_demo_without_data(place, capsys, monkeypatch, path):
    monkeypatch.setattr(example, "_train", never)
    assert "expected a" in misuse(["demo", "--data", place(path), "--out", place("{tmp}/out")], capsys)


def test_demo_with_data_that_it_may_not_enter(locked, capsys, monkeypatch):
    monkeypatch.setattr(example, "_train", never)
    for path in (locked, locked / "inner"):
        assert "Permission denied" in misuse(["demo", "--data", str(path)], capsys)


def test_demo_with_files_that_it_may_not_read(idx_directory, capsys, monkeypatch):
    (idx_directory / TEST_LABELS).chmod(0)

    def refuse(path, *args, **kwargs):
        if Path(path).name == TEST_LABELS:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    opened = io.open
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(io, "open", refuse)
    said = misuse(["demo", "--data", str(idx_directory)], capsys)
    assert said == f"{idx_directory / TEST_LABELS}: cannot be read: Permission denied"


def test_demo_with_one_image(idx_directory, capsys, tmp_path):
    for path in idx_directory.glob("train*"):
        path.unlink()
    (idx_directory / TRAIN_IMAGES).write_bytes(idx_bytes(torch.zeros(1, 28, 28)))
    (idx_directory / "train-labels-idx1-ubyte").write_bytes(idx_bytes(torch.zeros(1)))
    said = misuse(["demo", "--data", str(idx_directory), "--out", str(tmp_path / "out")], capsys)
    assert "expected at least 2 training images, got 1" in said
    assert not (tmp_path / "out").exists()


def test_a_header_that_promises_too_much_is_refused_before_anything_is_read(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes.fromhex("00000803 ffffffff 0000001c 0000001c"))
    with pytest.raises(CommandError, match="expected at most 1073741824 bytes of data, got 4294967295 x 28 x 28"):
        read_idx(path, 3)


def test_a_compressed_file_is_read_no_further_than_its_header_promises(tmp_path):
    path = tmp_path / "x.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(idx_bytes(torch.zeros(2, 3, 5)))
        for _ in range(64):
            file.write(bytes(2**20))
    tracemalloc.start()
    try:
        with pytest.raises(CommandError, match=r"expected 30 bytes of data \(2 x 3 x 5\), got more"):
            read_idx(path, 3)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_sizes_are_checked_before_elements_are_read(idx_directory, capsys, tmp_path):
    # The files end after the header, so reading elements first would fail with another message.
    (idx_directory / TEST_LABELS).write_bytes(idx_bytes(torch.zeros(19))[:8])
    assert "expected 20 labels, one per image, got 19" in misuse(["demo", "--data", str(idx_directory)], capsys)
    for path in idx_directory.glob("train-images*"):
        path.unlink()
    (idx_directory / TRAIN_IMAGES).write_bytes(idx_bytes(torch.zeros(66, 28, 27))[:16])
    assert "expected images of 28 x 28 pixels, got 28 x 27" in misuse(["demo", "--data", str(idx_directory)], capsys)


@pytest.mark.parametrize("path", NO_FOLDERS)
def test_demo_finds_an_unwritable_folder_before_it_trains(idx_directory, capsys, monkeypatch, place, path):
    monkeypatch.setattr(example, "_train", never)
    path = place(path)
    said = misuse(["demo", "--data", str(idx_directory), "--out", path], capsys)
    assert said.startswith("--out: expected a directory that can be written, got ")


@pytest.mark.parametrize("name", ["results.json", "curves.png"])
def test_demo_finds_an_unwritable_file_before_it_trains(idx_directory, capsys, monkeypatch, tmp_path, name):
    monkeypatch.setattr(example, "_train", never)
    (tmp_path / "out" / name).mkdir(parents=True)
    said = misuse(["demo", "--data", str(idx_directory), "--out", str(tmp_path / "out")], capsys)
    assert said.startswith("--out: ") and said.endswith(f"({tmp_path / 'out' / name}): Is a directory")


def test_demo_finds_a_forbidden_folder_before_it_trains(capsys, monkeypatch, locked):
    monkeypatch.setattr(example, "_train", never)
    assert misuse(["demo", "--out", str(locked / "out")], capsys).endswith("Permission denied")


def test_a_demo_that_fails_leaves_no_folder_behind(idx_directory, monkeypatch, tmp_path):
    monkeypatch.setattr(example, "_train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["demo", "--data", str(idx_directory), "--out", str(tmp_path / "a" / "b")]) == 130
    assert not (tmp_path / "a").exists()


def test_a_demo_that_succeeds_keeps_what_else_is_in_the_folder(idx_directory, monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("old")
    monkeypatch.setattr(example, "_train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["demo", "--data", str(idx_directory), "--out", str(tmp_path / "out")]) == 130
    assert (tmp_path / "out" / "results.json").read_text() == "old"


def test_a_demo_that_diverges_says_so(idx_directory, capsys, tmp_path):
    arguments = ["--epochs", "1", "--batch-size", "22", "--lr", "1e38", "--out", str(tmp_path / "out")]
    assert main(["demo", "--data", str(idx_directory), *arguments]) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "--lr" in line]
    assert "expected a finite loss" in said and "1e+38" in said
    assert not (tmp_path / "out").exists()


def test_demo_takes_any_name_of_a_folder(idx_directory, capsys, tmp_path):
    # The name is neither a formula for matplotlib nor valid UTF-8.
    odd = idx_directory.rename(tmp_path / os.fsdecode(b"$\\frac{$ \xff"))
    arguments = ["--epochs", "1", "--batch-size", "33", "--lr", "0.01", "--out", str(odd / "out")]
    assert main(["demo", "--data", str(odd), *arguments]) == 0
    assert (odd / "out" / "curves.png").exists()


def test_a_disk_that_is_full_in_the_end(idx_directory, capsys, monkeypatch, tmp_path):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    arguments = ["--epochs", "1", "--batch-size", "33", "--lr", "0.01", "--out", str(tmp_path / "out")]
    assert main(["demo", "--data", str(idx_directory), *arguments]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("No space left on device")


def bench_on_cpu(*arguments):
    return ["bench", "--device", "cpu", "--part", "layers", "--case", "lenet", *arguments]


@pytest.mark.parametrize("path", [*NO_FOLDERS, "{tmp}", ".", "/", ".."])
def test_bench_finds_unwritable_paths_before_it_measures(capsys, monkeypatch, place, path):
    monkeypatch.setattr(command, "_measure", never)
    path = place(path)
    if not os.path.isdir(path):
        said = misuse(bench_on_cpu("--plots", path), capsys)
        assert said.startswith("--plots: expected a directory that can be written, got ")
    if not os.path.isfile(path):
        said = misuse(bench_on_cpu("--json", path), capsys)
        assert said.startswith("--json: expected a file that can be written, got ")
    if not os.path.isdir(path):
        said = misuse(bench_on_cpu("--json", f"{path}/run.json"), capsys)
        assert said.startswith("--json: expected a file that can be written, got ")


def test_bench_finds_that_a_file_is_to_be_a_folder_too(capsys, monkeypatch, place):
    monkeypatch.setattr(command, "_measure", never)
    for plots in ("{tmp}/run", "{tmp}/run/plots"):
        said = misuse(bench_on_cpu("--json", place("{tmp}/run"), "--plots", place(plots)), capsys)
        assert said.startswith("--plots: expected a directory that is not below --json's file, got ")


def test_bench_finds_a_name_too_long_for_its_partial_file(capsys, monkeypatch, place):
    monkeypatch.setattr(command, "_measure", never)
    assert misuse(bench_on_cpu("--json", place("{tmp}/" + "n" * 250)), capsys).endswith("File name too long")


def test_bench_needs_matplotlib_before_it_measures(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "_measure", never)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "needs matplotlib" in misuse(bench_on_cpu("--plots", str(tmp_path / "plots")), capsys)


def test_a_bench_that_stops_leaves_no_folder_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "_measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    arguments = ["--json", str(tmp_path / "a" / "run.json"), "--plots", str(tmp_path / "b" / "plots")]
    assert main(bench_on_cpu(*arguments)) == 130
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_refused_and_left_alone(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "_measure", never)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        assert misuse(bench_on_cpu("--json", str(path)), capsys).endswith(f"{path}: Not a regular file")
    assert (tmp_path / "pipe").is_fifo() and Path(os.devnull).is_char_device()


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "folder").mkdir()
    link, file = tmp_path / "link", tmp_path / "folder" / "run.json"
    link.symlink_to(file)
    check_file("--json", link)
    assert link.is_symlink() and not file.exists()
    results.Results({}, {}).save(link)
    assert link.is_symlink() and list(file.parent.iterdir()) == [file]


def test_a_partial_file_that_could_not_be_finished_is_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        results.Results({}, {}).save(tmp_path / "run.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--case", "--op", "--shape", "--dtype", "--layout", "--implementation"])
def test_bench_with_a_pattern_that_nothing_fits(capsys, monkeypatch, option):
    monkeypatch.setattr(command, "_measure", never)
    said = misuse(["bench", "--device", "cpu", option, "trian"], capsys)
    assert said.startswith(f"{option}: expected ") and "got trian" in said


@pytest.mark.parametrize("suite, other", [("cpu", "cuda"), ("gpu", "cpu")])
def test_bench_with_a_suite_for_another_device(capsys, monkeypatch, suite, other):
    monkeypatch.setattr(command, "_measure", never)
    said = misuse(["bench", "--suite", suite, "--device", other], capsys)
    assert said.startswith("--device: expected ") and said.endswith(f"got {other}")


def record(**changes):
    times = {"median_us": 3.0, "p20_us": 2.0, "p80_us": 4.0, "rounds": 9}
    subject = {
        "group": "sweep N",
        "case": "c",
        "shape": [2, 3],
        "layout": "contiguous",
        "dtype": "float32",
        "op": "eval",
    }
    ran = {"implementation": "fastbn", "kernel": "k", "tensor_bytes": 24, "floor_bytes": 48, "gb_per_s": 1.0}
    return {**times, **subject, **ran, "copy_share": 0.5, "speedup_over": {"torch": 1.5}, **changes}


def content(**changes):
    lists = {name: [] for name in ("copy", "calls", "networks", "refusals")}
    run = {
        "format": results.FORMAT,
        "machine": {},
        "settings": {},
        "complete": True,
        "measurements": [record()],
        **lists,
    }
    return json.dumps({**run, **changes})


def test_records_that_can_be_loaded(capsys, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(content())
    assert main(["bench", "--load", str(path), "--compare", str(path), "--plots", str(tmp_path / "plots")]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "\x80",
        "9" * 5000,
        content(measurements=[record(median_us=0)]),
        content(measurements=[record(median_us=math.nan)]),
        content(measurements=[record(median_us="3")]),
        content(measurements=[record(tensor_bytes=10**400)]),
        content(measurements=[record(median_us=1e300)]),
        content(measurements=[record(gb_per_s=1e-300)]),
        content(measurements=[record(shape=[2])]),
        content(measurements=[record(shape=["a", "b"])]),
        content(measurements=[record(speedup_over=[1])]),
        content(measurements=[record(speedup_over={"torch": 0})]),
        content(measurements=[record(case=None)]),
        content(measurements=[record(more=1)]),
        content(measurements=[1]),
        content(measurements={}),
        content(measurements=[record(dtype="../float32")]),
        content(machine=[]),
        content(machine={"name": "\ud800"}),
        content(machine={"device": []}),
        content(machine={"gpu": {"name": "x"}}),
        content(machine={"modified": []}),
        content(machine={"datasheet_gb_per_s": "fast"}),
        content(complete="yes"),
        content(more=1),
    ],
)
@pytest.mark.parametrize("option", ["--load", "--compare"])
def test_files_that_are_no_records(capsys, monkeypatch, tmp_path, option, text):
    monkeypatch.setattr(command, "_measure", never)
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("latin-1"))
    said = misuse(bench_on_cpu(option, str(path), "--plots", str(tmp_path / "plots")), capsys)
    assert said.startswith(f"{option}: {path}: expected ")


@pytest.mark.parametrize("path", [*NO_FOLDERS[1:], "{tmp}", "{tmp}/missing", "/dev/zero"])
@pytest.mark.parametrize("option", ["--load", "--compare"])
def test_records_that_cannot_be_read(capsys, monkeypatch, place, option, path):
    monkeypatch.setattr(command, "_measure", never)
    monkeypatch.setattr(results, "MAX_BYTES", 2**20)
    assert misuse(bench_on_cpu(option, place(path)), capsys).startswith(f"{option}: ")


def test_committed_records_can_be_loaded():
    paths = list((ROOT / "bench" / "results").glob("*.json"))
    assert paths
    for path in paths:
        results.load(path)


@pytest.mark.parametrize("name", ["info", "verify", "bench", "demo"])
def test_ctrl_c(capsys, monkeypatch, name):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr({"info": info, "verify": verify, "bench": bench, "demo": demo}[name], "run", interrupt)
    assert main([name]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


class Broken(io.TextIOWrapper):
    """A stream with no file descriptor, as in a notebook, whose every write fails."""

    def __init__(self, error):
        super().__init__(io.BytesIO())
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("error, status", [(OSError(28, "No space left on device"), 1), (BrokenPipeError(32, ""), 141)])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_streams_that_cannot_be_written(capsys, monkeypatch, idx_directory, tmp_path, name, error, status):
    monkeypatch.setattr(sys, name, Broken(error))
    arguments = ["--epochs", "1", "--batch-size", "33", "--lr", "0.01", "--out", str(tmp_path / "out")]
    assert main(["demo", "--data", str(idx_directory), *arguments]) == status
    if name == "stdout":
        said = [line for line in capsys.readouterr().err.splitlines() if "%" not in line]
        assert said == (["fastbn: No space left on device"] if status == 1 else [])


def test_streams_that_are_closed(monkeypatch, idx_directory, tmp_path):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    arguments = ["--epochs", "1", "--batch-size", "33", "--lr", "0.01", "--out", str(tmp_path / "out")]
    assert main(["demo", "--data", str(idx_directory), *arguments]) == 0


def test_characters_that_stdout_does_not_have(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(info, "info", lambda: {"mean": "1 ± 2"})
    assert main(["info"]) == 0
    assert written.getvalue() == b"mean  1 \\xb1 2\n"


def process(*arguments, **streams):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **streams)


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_stdout():
    with FULL.open("w") as full:
        ran = process("bench", "--help", stdout=full)
        _, said = ran.communicate(timeout=60)
    assert (ran.returncode, said) == (1, "fastbn: No space left on device\n")


def test_a_pipe_that_nobody_reads():
    reader, writer = os.pipe()
    os.close(reader)
    ran = process("fastbn", "info", stdout=writer)
    os.close(writer)
    _, said = ran.communicate(timeout=60)
    assert (ran.returncode, said) == (141, "")


@pytest.mark.slow
def test_ctrl_c_while_it_trains(idx_directory, tmp_path):
    out = tmp_path / "out"
    arguments = ["--epochs", "1000000", "--batch-size", "33", "--data", str(idx_directory), "--out", str(out)]
    # SIGINT is ignored where a shell started pytest with &.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ran = process("fastbn", "demo", *arguments, stdout=subprocess.PIPE)
        for line in ran.stdout:
            if line.startswith("    1  "):
                break
        ran.send_signal(signal.SIGINT)
        _, said = ran.communicate(timeout=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ran.returncode == 130
    # If the signal comes while tqdm makes a bar, Python reports that the bar's __del__ then fails.
    said = re.sub(
        r"Exception ignored in: <function tqdm\.__del__ .*?\nAttributeError: [^\n]*\n", "", said, flags=re.DOTALL
    )
    assert said.replace("\r", "\n").splitlines()[-1].strip() == "Interrupted."
    assert not out.exists()
