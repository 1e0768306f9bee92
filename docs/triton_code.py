"""Writes the code of docs/triton.md again: each block that follows a comment with the name of a function or class.

python docs/triton_code.py
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

PAGE = Path(__file__).with_name("triton.md")
PACKAGE = Path(__file__).resolve().parents[1] / "fastbn" / "backends" / "triton"
BLOCK = re.compile(r"<!-- (\w+)\.(\w+) -->\n```python\n.*?```\n", re.DOTALL)


def source_of(module: str, name: str) -> str:
    """Return the source of a function or class at the top level of a module, with its decorators."""
    text = (PACKAGE / f"{module}.py").read_text()
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            first = min(part.lineno for part in (node, *node.decorator_list))
            return "\n".join(text.splitlines()[first - 1 : node.end_lineno]) + "\n"
    raise ValueError(f"{module}.py: expected {name}, got none")


def written(page: str) -> str:
    """Return a page with the code of its blocks as it is now."""
    return BLOCK.sub(lambda m: f"<!-- {m[1]}.{m[2]} -->\n```python\n{source_of(m[1], m[2])}```\n", page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
