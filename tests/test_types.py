"""Types that mypy sees: the stub of fastbn._C has the names of the compiled module, and the package is marked typed."""

from __future__ import annotations

import ast
from pathlib import Path

import fastbn
from fastbn import _C

PACKAGE = Path(fastbn.__file__).parent


def _stub() -> dict[str, ast.stmt]:
    tree = ast.parse((PACKAGE / "_C.pyi").read_text())
    return {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_the_stub_has_the_names_of_the_compiled_module():
    assert set(_stub()) == {name for name in dir(_C) if not name.startswith("__")}


def test_the_stub_has_the_names_of_the_limits():
    fields = {node.name for node in _stub()["DeviceLimits"].body} - {"__init__"}
    assert fields == {name for name in dir(_C.DeviceLimits) if not name.startswith("_")}


def test_the_stub_has_the_arguments_of_a_plan():
    """pybind11 states them in the first line of the docstring."""
    for argument in _stub()["plan"].args.kwonlyargs:
        assert f"{argument.arg}: " in _C.plan.__doc__.splitlines()[0]


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()
