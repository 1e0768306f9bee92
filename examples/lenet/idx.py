"""Reads IDX files, the format of MNIST and Fashion-MNIST.

A file is two zero bytes, a type code, the number of dimensions, each size as a big-endian uint32, then the elements.
Only the type of these data sets is read, unsigned bytes (0x08).
"""

import gzip
import math
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from fastbn.cli.errors import CommandError, reason

_UBYTE = 0x08
# The largest data that is read: twenty times Fashion-MNIST.
_MAX_BYTES = 2**30


def read_idx(path: Path, dims: int, check: Callable[[tuple[int, ...]], None] = lambda sizes: None) -> torch.Tensor:
    """Read the uint8 tensor of `dims` dimensions in the IDX file `path`, which is decompressed if it ends in .gz.

    `check` is called with the sizes before any element is read; it raises where they are not those that the caller
    expects. No more is read than the header promises. Raises CommandError where the file cannot be read, has another
    magic number or another length than its header states, or is too large.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            sizes = _read_sizes(path, file, dims)
            check(sizes)
            return _read_elements(path, file, sizes)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CommandError(f"{path}: expected a whole gzip file, got one that does not decompress: {error}") from None
    except OSError as error:
        raise CommandError(f"{path}: cannot be read: {reason(error)}") from None


def find_idx(directory: Path, name: str) -> Path:
    """Return the path of `name` or `name`.gz in `directory`. Raises CommandError where neither is a file."""
    for path in (directory / name, directory / f"{name}.gz"):
        try:
            if stat.S_ISREG(path.stat().st_mode):
                return path
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CommandError(f"{path}: cannot be read: {reason(error)}") from None
    raise CommandError(f"{directory}: expected a file {name} or {name}.gz, got neither")


def _read_sizes(path, file, dims):
    expected, length = _UBYTE << 8 | dims, 4 + 4 * dims
    header = file.read(length)
    if len(header) < length:
        raise CommandError(f"{path}: expected an IDX header of {length} bytes, got a file of {len(header)} bytes")
    magic, *sizes = struct.unpack(f">{1 + dims}I", header)
    if magic != expected:
        raise CommandError(
            f"{path}: expected magic number 0x{expected:08x} (unsigned bytes, {dims} dimensions), got 0x{magic:08x}"
        )
    if 0 in sizes:
        raise CommandError(f"{path}: expected at least one element, got sizes {sizes}")
    if math.prod(sizes) > _MAX_BYTES:
        raise CommandError(f"{path}: expected at most {_MAX_BYTES} bytes of data, got {_by(sizes)}")
    return tuple(sizes)


def _read_elements(path, file, sizes):
    wanted = math.prod(sizes)
    # One more byte shows whether the file is too long; at the end of the file gzip checks its contents.
    data = file.read(wanted + 1)
    if len(data) != wanted:
        got = "more" if len(data) > wanted else len(data)
        raise CommandError(f"{path}: expected {wanted} bytes of data ({_by(sizes)}), got {got}")
    # torch.frombuffer warns about memory that is not writable, so copy into a bytearray.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(sizes)


def _by(sizes):
    return " x ".join(map(str, sizes))
