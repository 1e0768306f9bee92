"""Memory of the outputs of the CPU backend."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

_SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Prints the flags of the mapping that holds an output: proc(5), VmFlags in smaps. It runs in a process of its own,
# whose allocator holds no memory yet that the output could get. Above 32 MiB, the upper limit of its dynamic threshold,
# glibc always makes a new mapping.
_PROGRAM = """
import sys
import torch
import fastbn

input = torch.ones(5, 16, 512, 512, requires_grad=True)
output = fastbn.BatchNorm2d(16)(input)
if sys.argv[1] == "backward":
    (output,) = torch.autograd.grad(output, input, input.detach())
address = output.data_ptr() + output.nbytes // 2
inside = False
for line in open("/proc/self/smaps"):
    name, *values = line.split()
    if not name.endswith(":"):  # first of a mapping's lines: begin-end ...
        begin, end = (int(bound, 16) for bound in name.split("-"))
        inside = begin <= address < end
    elif inside and name == "VmFlags:":
        print(*values)
"""


# Linux sets the flag whatever the setting is, also where it is "never"; without the file there is nothing to ask for.
@pytest.mark.skipif(not _SETTING.exists(), reason="the system has no transparent huge pages")
@pytest.mark.parametrize("direction", ("forward", "backward"))
def test_an_output_without_memory_gets_large_pages(direction):
    flags = subprocess.check_output([sys.executable, "-c", _PROGRAM, direction], text=True).split()
    assert "rd" in flags  # the mapping was found
    assert "hg" in flags
