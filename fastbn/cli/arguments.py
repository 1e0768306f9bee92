"""What the commands ask of their arguments: argparse types that say what was expected and what was got, and whether the
files that a path stands for can be written."""

import argparse
import contextlib
import errno
import math
import os
import reprlib
from collections.abc import Callable
from pathlib import Path

from fastbn.cli.errors import CommandError, reason

# Far more than there are epochs or images, and far from what overflows 64 bits.
MAX_COUNT = 2**31 - 1


def integer(low: int, high: int = MAX_COUNT) -> Callable[[str], int]:
    """A type of argparse: an integer from `low` to `high`."""
    return _number(int, f"an integer from {low} to {high}", lambda value: low <= value <= high)


def number(high: float, *, or_zero: bool = False) -> Callable[[str], float]:
    """A type of argparse: a number above 0, or 0 itself with `or_zero`, and at most `high`."""
    low = "of at least 0" if or_zero else "above 0"
    fits = (lambda value: 0 <= value <= high) if or_zero else (lambda value: 0 < value <= high)
    return _number(float, f"a number {low} and at most {high:g}", fits)


def path(text: str) -> Path:
    """A type of argparse: a path, which need not exist."""
    if not text or "\0" in text:
        raise _refusal("a path", text)
    return Path(text)


def patterns(text: str) -> list[str]:
    """A type of argparse: shell-style patterns, separated by commas."""
    found = [pattern.strip() for pattern in text.split(",")]
    if not all(found):
        raise _refusal("patterns separated by commas", text)
    return found


def check_directory(option: str, directory: Path, *names: str) -> None:
    """Make sure that files called `names` can be written to `directory`, which need not exist; leave it as it was.

    Raises CommandError that names `option` where one cannot be written.
    """
    for name in names:
        _try_to_write(f"{option}: expected a directory that can be written", directory, directory / name)


def check_file(option: str, *files: Path) -> None:
    """Make sure that `files`, the first of which the user named, can be written; leave them as they were.

    Raises CommandError that names `option` where one cannot be written.
    """
    for file in files:
        _try_to_write(f"{option}: expected a file that can be written", files[0], file)


def _number(kind, expected, fits):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise _refusal(expected, text)
        return value

    return parse


def _refusal(expected, text):
    return argparse.ArgumentTypeError(f"expected {expected}, got {reprlib.repr(text)}")


def _try_to_write(expected, named, file):
    file = Path(os.path.realpath(file))  # what a dangling link points to is what would be made
    made = [folder for folder in file.parents if not os.path.lexists(folder)]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        is_new = not file.exists()
        # Opening a pipe would wait for a reader, and a device is not to be replaced by a file.
        if not is_new and not file.is_file() and not file.is_dir():
            raise OSError(errno.EINVAL, "Not a regular file")
        file.open("ab").close()
        if is_new:
            file.unlink()
    except OSError as error:
        where = "" if error.filename in (None, str(named)) else f" ({error.filename})"
        raise CommandError(f"{expected}, got {named}{where}: {reason(error)}") from None
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
