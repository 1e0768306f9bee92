"""Checks of the commands' arguments: argparse types that say what was expected and what was got, and tests of whether
files can be written."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastbn.cli.errors import CommandError, reason

Number = TypeVar("Number", int, float)

# Far more than there are epochs or images, and far from overflowing 64 bits.
MAX_COUNT = 2**31 - 1


def integer(low: int, high: int = MAX_COUNT) -> Callable[[str], int]:
    """Make an argparse type: an integer from `low` to `high`."""
    return _number(int, f"an integer from {low} to {high}", lambda value: low <= value <= high)


def number(high: float, *, or_zero: bool = False) -> Callable[[str], float]:
    """Make an argparse type: a number above 0, or 0 itself with `or_zero`, and at most `high`."""
    low = "of at least 0" if or_zero else "above 0"
    fits = (lambda value: 0 <= value <= high) if or_zero else (lambda value: 0 < value <= high)
    return _number(float, f"a number {low} and at most {high:g}", fits)


def path(text: str) -> Path:
    """Parse a path, which need not exist. An argparse type."""
    if not text or "\0" in text:
        raise _refusal("a path", text)
    return Path(text)


def patterns(text: str) -> list[str]:
    """Parse shell-style patterns, separated by commas. An argparse type."""
    found = [pattern.strip() for pattern in text.split(",")]
    if not all(found):
        raise _refusal("patterns separated by commas", text)
    return found


class Once(argparse.Action):
    """Store the value of an option that may be given once, where argparse would take the last."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: object = None
    ) -> None:
        before = getattr(namespace, self.dest)
        if before is not None:
            raise argparse.ArgumentError(self, f"expected it once, got {','.join(before)} and {','.join(values)}")
        setattr(namespace, self.dest, values)


def check_directory(option: str, directory: Path, *names: str) -> None:
    """Check that files called `names` can be written to `directory`, which need not exist, and leave it as it was.

    Raises CommandError, naming `option`, where one cannot be written.
    """
    for name in names:
        _try_to_write(f"{option}: expected a directory that can be written", directory, directory / name)


def check_file(option: str, *files: Path) -> None:
    """Check that `files`, the first of which the user named, can be written, and leave them as they were.

    Raises CommandError, naming `option`, where one cannot be written.
    """
    for file in files:
        _try_to_write(f"{option}: expected a file that can be written", files[0], file)


def _number(kind: type[Number], expected: str, fits: Callable[[Number], bool]) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            raise _refusal(expected, text) from None
        if not fits(value):
            raise _refusal(expected, text)
        return value

    return parse


def _refusal(expected: str, text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"expected {expected}, got {reprlib.repr(text)}")


def _try_to_write(expected: str, named: Path, file: Path) -> None:
    file = Path(os.path.realpath(file))  # opening a dangling link creates the file that it points to
    made = [folder for folder in file.parents if not os.path.lexists(folder)]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        is_new = not file.exists()
        # Opening a pipe would wait for a reader, and a device must not be replaced by a file.
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
