"""Machine code as nvdisasm prints it: instructions with their control codes and the source lines that they come from.

The control codes are the top bits of each 128-bit instruction since Volta: how long the warp waits before it issues the
next instruction (stall), whether another warp should go first (yield), the scoreboards that the instruction sets when
its result is written and when its operands were read, and those that it waits for. NVIDIA documents none of this; the
positions are those of "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking" (arXiv 1804.06826).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

SCOREBOARDS = 6
INSTRUCTION_BYTES = 16


@dataclass(frozen=True)
class Frame:
    """A source line."""

    file: str
    line: int


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@P0", "@!P3", "@!PT", or empty
    opcode: str  # with its modifiers: LDS.128
    operands: str
    stall: int  # cycles before the warp may issue its next instruction
    yields: bool
    write_scoreboard: int | None
    read_scoreboard: int | None
    wait: tuple[int, ...]  # scoreboards that must be clear
    frames: tuple[Frame, ...] = ()  # its own line first, then the lines that it was inlined into
    target: int | None = None  # of a branch to a label of its function

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]


@dataclass
class Function:
    name: str  # mangled
    arch: str  # "90"
    instructions: list[Instruction] = field(default_factory=list)


_FUNCTION = re.compile(r"^\.text\.(?P<name>\S+):$")
_TARGET = re.compile(r"^\s*\.target\s+sm_(?P<arch>\d+)")
_LABEL = re.compile(r"^(?P<label>\.L_\w+):$")
_INSTRUCTION = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,6})\*/\s+(?:(?P<predicate>@!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)\s*"
    r"(?P<operands>[^;]*?)\s*;\s*/\*\s*0x(?P<low>[0-9a-f]{16})\s*\*/"
)
_HIGH = re.compile(r"^\s+/\*\s*0x(?P<high>[0-9a-f]{16})\s*\*/\s*$")
_FRAME = re.compile(r'^\s*//## File "(?P<file>[^"]+)", line (?P<line>\d+)(?P<inlined> inlined at)?')
_BRANCH_TARGET = re.compile(r"`\((?P<label>\.L_\w+)\)")


def _scoreboard(bits: int) -> int | None:
    return bits if bits < SCOREBOARDS else None


def control_of(high: int) -> dict[str, object]:
    """Return the control code in the upper 64 bits of an instruction, as fields of Instruction."""
    wait = high >> 52 & 63
    return {
        "stall": high >> 41 & 15,
        "yields": not high >> 45 & 1,
        "write_scoreboard": _scoreboard(high >> 46 & 7),
        "read_scoreboard": _scoreboard(high >> 49 & 7),
        "wait": tuple(index for index in range(SCOREBOARDS) if wait >> index & 1),
    }


def parse(text: str) -> list[Function]:
    """Return the functions in the output of `nvdisasm -c -hex -gi`."""
    functions: list[Function] = []
    arch, frames, chain, pending = "", (), [], None
    labels: dict[str, int] = {}
    waiting_labels: list[str] = []
    branches: list[tuple[Function, int, str]] = []

    for line in text.splitlines():
        if match := _FRAME.match(line):
            chain.append(Frame(match["file"], int(match["line"])))
            if match["inlined"] is None:  # the outermost line ends the chain
                frames, chain = tuple(chain), []
        elif match := _INSTRUCTION.match(line):
            pending = match
        elif (match := _HIGH.match(line)) and pending is not None and functions:
            address = int(pending["address"], 16)
            instruction = Instruction(
                address,
                pending["predicate"] or "",
                pending["opcode"],
                pending["operands"],
                frames=frames,
                **control_of(int(match["high"], 16)),
            )
            labels |= dict.fromkeys(waiting_labels, address)
            waiting_labels = []
            if target := _BRANCH_TARGET.search(pending["operands"]):
                branches.append((functions[-1], len(functions[-1].instructions), target["label"]))
            functions[-1].instructions.append(instruction)
            pending = None
        elif match := _LABEL.match(line):
            waiting_labels.append(match["label"])
        elif match := _FUNCTION.match(line):
            functions.append(Function(match["name"], arch))
            frames, waiting_labels = (), []
        elif match := _TARGET.match(line):
            arch = match["arch"]

    for function, index, label in branches:
        old = function.instructions[index]
        if label in labels and old.name == "BRA":
            function.instructions[index] = Instruction(**{**old.__dict__, "target": labels[label]})
    return functions


def find_tool(name: str) -> str | None:
    """Return the path of nvdisasm or cuobjdump: on PATH, where a toolkit puts it, or in its own package."""
    on_path = shutil.which(name)
    if on_path is not None:
        return on_path
    try:
        files = metadata.files(f"nvidia-cuda-{name}") or []
    except metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == name), None)


def disassemble(cubin: Path) -> list[Function]:
    """Return the functions of a cubin. One that was compiled without -lineinfo has no frames."""
    tool = find_tool("nvdisasm")
    if tool is None:
        raise FileNotFoundError("nvdisasm: expected on PATH, or in the package nvidia-cuda-nvdisasm")
    # -ndf: the data-flow analysis only annotates indirect branches, and warns that it cannot follow them.
    command = [tool, "-c", "-hex", "-gi", "-ndf", str(cubin)]
    return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
