"""Where the CPU backend's outputs get their memory from."""

from __future__ import annotations

import pathlib

import pytest
import torch

import fastbn

_SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _flags_of(address: int) -> list[str]:
    """The flags of the mapping that holds an address: proc(5), VmFlags in smaps."""
    inside = False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):  # first of a mapping's lines: begin-end ...
            begin, end = (int(bound, 16) for bound in name.split("-"))
            inside = begin <= address < end
        elif inside and name == "VmFlags:":
            return values
    raise AssertionError(f"expected a mapping that holds {address:#x}, got none")


@pytest.mark.skipif(
    not _SETTING.exists() or "[never]" in _SETTING.read_text(), reason="the system has no transparent huge pages"
)
@pytest.mark.parametrize("direction", ("forward", "backward"))
def test_an_output_without_memory_gets_large_pages(direction, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # filling makes the pages
    # So large that glibc maps it anew, whatever it has learnt before: above its greatest threshold of 32 MiB.
    input = torch.ones(5, 16, 512, 512, requires_grad=True)
    output = fastbn.BatchNorm2d(16)(input)
    if direction == "backward":
        (output,) = torch.autograd.grad(output, input, input.detach())
    assert "hg" in _flags_of(output.data_ptr() + output.nbytes // 2)
