"""Aligned plain text, for the commands that must run with torch alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def table(rows: Sequence[Sequence[str]], left: Iterable[int] = (0,)) -> list[str]:
    """Return the lines of `rows` (equal lengths) with every column padded to its widest cell.

    Columns in `left` are aligned to the left, the others, which hold numbers, to the right.
    """
    to_the_left = set(left)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index in to_the_left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def outline(content: Mapping[str, Any]) -> list[str]:
    """Return the lines of a mapping as `key  value`, a nested mapping as an indented section under its key."""
    width = max((len(str(key)) + depth for key, depth in _leaf_keys(content, 0)), default=0)
    return list(_outline(content, 0, width))


def _leaf_keys(content: Mapping[str, Any], depth: int) -> Iterator[tuple[str, int]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _leaf_keys(value, depth + 2)
        else:
            yield key, depth


def _outline(content: Mapping[str, Any], depth: int, width: int) -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield f"{'':{depth}}{key}"
            yield from _outline(value, depth + 2, width)
        else:
            yield f"{'':{depth}}{str(key):{width - depth}}  {_value(value)}"


def _value(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple, set, frozenset, Mapping)):
        return ", ".join(map(_value, value)) or "none"
    return str(value)
