"""Read IDX files, the format of MNIST and Fashion-MNIST: two zero bytes, a type code, the number of dimensions, each
size as a big-endian uint32, then the elements. Only the type that these data sets use, unsigned bytes (0x08), is read.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch

from fastbn.cli.errors import CommandError

_UBYTE = 0x08


def read_idx(path: Path, dims: int) -> torch.Tensor:
    """The uint8 tensor of `dims` dimensions in the IDX file `path`, which is decompressed if it ends in .gz.

    Raises CommandError where the file is missing, has another magic number or another length than its header states.
    """
    data = _read(path)
    expected, header = _UBYTE << 8 | dims, 4 + 4 * dims
    if len(data) < header:
        raise CommandError(f"{path}: expected an IDX header of {header} bytes, got a file of {len(data)} bytes")
    (magic,) = struct.unpack_from(">I", data)
    if magic != expected:
        raise CommandError(
            f"{path}: expected magic number 0x{expected:08x} (unsigned bytes, {dims} dimensions), got 0x{magic:08x}"
        )
    shape = struct.unpack_from(f">{dims}I", data, 4)
    wanted = math.prod(shape)
    if len(data) - header != wanted:
        sizes = " x ".join(map(str, shape))
        raise CommandError(f"{path}: expected {wanted} bytes of data ({sizes}), got {len(data) - header}")
    if wanted == 0:
        raise CommandError(f"{path}: expected at least one element, got sizes {list(shape)}")
    return torch.frombuffer(data, dtype=torch.uint8, offset=header).view(shape)


def find_idx(directory: Path, name: str) -> Path:
    """The path of `name` or `name`.gz in `directory`. Raises CommandError where neither exists."""
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    raise CommandError(f"{directory}: expected a file {name} or {name}.gz, got neither")


def _read(path):
    try:
        content = path.read_bytes()
        # A bytearray, because torch.frombuffer warns about memory that it must not write to.
        return bytearray(gzip.decompress(content) if path.suffix == ".gz" else content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CommandError(f"{path}: expected a whole gzip file, got one that does not decompress: {error}") from None
    except OSError as error:
        raise CommandError(f"{path}: cannot be read: {error.strerror or error}") from None
