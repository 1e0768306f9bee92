"""Brings fastbn's docstrings, which are plain prose, into the markup that Sphinx reads.

A part `name: what it is` becomes an item of a list, "Returns" and "Raises" begin a paragraph, and characters that the
markup would read are escaped. Of classes that differ by their number of dimensions alone, one has the whole text.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import fastbn

# What the classes of a family take, by the end of their names.
SHAPES = {"1d": "(N, C) or (N, C, L)", "3d": "(N, C, D, H, W)"}
# Families whose classes differ in more than that.
APART = ("MaskedBatchNorm",)


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrite the lines of a docstring in place; a handler of Sphinx's event `autodoc-process-docstring`."""
    lines[:] = shortened(name) or marked_up(lines, names_of(obj))


def signature(app: Any, what: str, name: str, obj: Any, options: Any, given: str, returns: str) -> Any:
    """Leave the signature of a shortened class out; a handler of Sphinx's event `autodoc-process-signature`."""
    return ("", None) if shortened(name) else None


def shortened(name: str) -> list[str] | None:
    """Return the short text of a class that is another one for inputs of other dimensions, or None."""
    family, end = name[:-2], name[-2:]
    other = f"{family.removeprefix('fastbn.')}2d"
    if end not in SHAPES or not hasattr(fastbn, other) or family.removeprefix("fastbn.") in APART:
        return None
    return [f":class:`fastbn.{other}` for inputs of shape {SHAPES[end]}.", ""]


def names_of(obj: Any) -> set[str]:
    """Return the names that a docstring may describe: arguments, and the attributes of a class."""
    try:
        names = set(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        names = set()
    if inspect.isclass(obj):
        names |= {"activation", "activation_param", "save", "process_group", "mask", "lengths", "residual"}
        names |= set(getattr(obj, "__annotations__", {}))
    return names - {"self", "args", "kwargs"}


def marked_up(lines: list[str], names: set[str]) -> list[str]:
    """Return the lines of a docstring as reStructuredText."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True)) or r"(?!)"
    item = re.compile(rf"(?:^|(?<=\. ))((?:{known})(?:, (?:{known}))*): (?=\S)", re.MULTILINE)
    sentence = re.compile(r"(?:^|(?<=\. ))(?=(?:Returns|Raises|Yields) )", re.MULTILINE)
    written: list[str] = []
    for paragraph in paragraphs:
        if all(line.startswith("    ") for line in paragraph.splitlines()):
            written += [".. code-block:: python", "", *paragraph.splitlines(), ""]
            continue
        marked = sentence.sub("\0", item.sub(lambda m: f"\0\1{m[1]}\1", paragraph))
        for part in marked.split("\0"):
            text = " ".join(part.split())
            if not text:
                continue
            _, named, rest = text.split("\1") if text.startswith("\1") else ("", "", text)
            code = ", ".join(f"``{each}``" for each in named.split(", ")) if named else ""
            written += [f"- {code}: {escaped(rest.strip())}" if named else escaped(text), ""]
    return written


def escaped(text: str) -> str:
    """Escape what reStructuredText would read as markup, outside of code between backticks."""
    parts = re.split(r"(`+[^`]+`+)", text)
    return "".join(part if i % 2 else re.sub(r"([*|\\]|_(?!\w))", r"\\\1", part) for i, part in enumerate(parts))
