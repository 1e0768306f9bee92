"""The tests of this folder run twice, through the C++ node and the Python Function that defines what it does."""

from __future__ import annotations

import pytest

from fastbn import functional
from fastbn.backends import node


@pytest.fixture(params=["node", "Function"], autouse=True)
def node_or_function(request, monkeypatch):
    if request.param == "Function":
        monkeypatch.setattr(functional, "NODE", None)
    elif node.NODE is None:  # test_node.py fails then, so this skip hides nothing
        pytest.skip(f"the node: {node.DESCRIPTION}")
