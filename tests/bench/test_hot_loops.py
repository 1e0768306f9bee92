"""The hot loops that the timing model finds in machine code, their cycles, and what they should not contain."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bench.model import checks, hot_loops, pipes, sass
from bench.model.compile import compile_cubin
from bench.model.issue import cycles_per_iteration
from bench.model.marks import Mark, marks_of
from bench.model.sass import Frame, Instruction


def instruction(
    opcode: str,
    operands: str = "",
    *,
    address: int = 0,
    stall: int = 1,
    write: int | None = None,
    wait: tuple[int, ...] = (),
    predicate: str = "",
) -> Instruction:
    return Instruction(address, predicate, opcode, operands, stall, False, write, None, wait)


def straight(*code: Instruction) -> list[Instruction]:
    """Return a loop body that ends in a branch back, which the simulation is told costs nothing but its issue."""
    return [dataclasses.replace(i, address=16 * index) for index, i in enumerate(code)]


# --- Machine code

# Lines of nvdisasm -hex -gi, of sm_90.
LISTING = """\
	.target	sm_90
.text.{name}:
	//## File "/x/csrc/cuda/block/a.cuh", line 18 inlined at "/x/csrc/cuda/kernels/k.cu", line 26
	//## File "/x/csrc/cuda/kernels/k.cu", line 26
        /*0010*/                   LDC.64 R14, c[0x0][0x2a8] ;        /* 0x0000aa00ff0e7b82 */
                                                                      /* 0x000e620000000a00 */
        /*0070*/                   ISETP.NE.U32.AND P0, PT, R14, RZ, PT ;   /* 0x000000ff0e00720c */
                                                                      /* 0x002fca0003f05070 */
.L_x_1:
	//## File "/x/csrc/cuda/kernels/k.cu", line 30
        /*00c0*/              @!P0 LDG.E.64 R6, desc[UR10][R2.64] ;    /* 0x0000000a02068981 */
                                                                      /* 0x0048a2000c1e1b00 */
        /*00d0*/              @!P1 BRA P2, `(.L_x_1) ;                 /* 0x0000000a02068981 */
                                                                      /* 0x000fe2000c1e1b00 */
"""


def test_instructions_are_read_with_control_codes_and_lines():
    (function,) = sass.parse(LISTING.format(name="f"))
    load_constant, compare, load, branch = function.instructions
    assert (function.name, function.arch) == ("f", "90")
    assert (load_constant.opcode, load_constant.operands) == ("LDC.64", "R14, c[0x0][0x2a8]")
    assert (load_constant.stall, load_constant.yields, load_constant.write_scoreboard) == (1, False, 1)
    assert (load_constant.read_scoreboard, load_constant.wait) == (None, ())
    assert (compare.stall, compare.yields, compare.wait) == (5, True, (1,))
    assert (load.predicate, load.write_scoreboard, load.read_scoreboard, load.wait) == ("@!P0", 2, 4, (2,))
    k, a = "/x/csrc/cuda/kernels/k.cu", "/x/csrc/cuda/block/a.cuh"
    assert compare.frames == (Frame(a, 18), Frame(k, 26)) and load.frames == (Frame(k, 30),)
    assert branch.target == load.address == 0xC0


# --- Marks


def test_marks_enclose_lines():
    text = "a\n  // hot loop: sums\nb\n// cold path\nc\n// end of cold path\n// end of hot loop\n"
    assert marks_of(text, "f") == [Mark("f", 5, 5, None), Mark("f", 3, 6, "sums")]


@pytest.mark.parametrize(
    "text, message",
    [
        ("// hot loop: sums\n", "f:1: the mark is never closed"),
        ("// end of hot loop\n", "f:1: no hot loop is open"),
        ("// hot loop: sums\n// end of cold path\n", "f:2: no cold path is open"),
        ("// hot loop: sums\n// hot loop: write\n", "f:2: the mark of line 1 is still open"),
        ("x();  // hot loop: sums\n", "f:1: expected a mark alone on its line"),
    ],
)
def test_misplaced_marks_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        marks_of(text, "f")


# --- Issue


def test_a_chain_waits_for_its_stalls_and_warps_hide_them():
    chain = straight(*[instruction("FADD", stall=4)] * 10)
    assert cycles_per_iteration(chain, 1) == pytest.approx(40)
    assert cycles_per_iteration(chain, 4) == pytest.approx(40)  # ten of each of four warps: one per cycle
    assert cycles_per_iteration(chain, 8) == pytest.approx(80)


def test_pipes_work_side_by_side():
    fma, alu = instruction("FFMA"), instruction("LOP3.LUT")
    assert cycles_per_iteration(straight(*[alu] * 10), 4) == pytest.approx(4 * 10 * pipes.ALU)
    assert cycles_per_iteration(straight(*[fma, alu] * 5), 4) == pytest.approx(4 * 10)


def test_a_loop_of_all_schedulers_shares_the_path_to_memory():
    copies = straight(*[instruction("LDGSTS.E.BYPASS.128")] * 10)
    alone = 32 * 16 / pipes.SHARED_BYTES_PER_CYCLE + pipes.COPY_REQUEST
    assert cycles_per_iteration(copies, 1, schedulers=1) == pytest.approx(10 * alone)
    assert cycles_per_iteration(copies, 1) == pytest.approx(10 * alone * pipes.SCHEDULERS)


def test_a_result_is_awaited_by_its_scoreboard():
    load, use = instruction("LDS.128", write=3), instruction("FADD", wait=(3,))
    latency = pipes.LATENCY["LDS"]
    assert cycles_per_iteration(straight(load, use), 1) == pytest.approx(latency + 1)
    assert cycles_per_iteration(straight(load, use), 1, latency={"LDS": 100}) == pytest.approx(101)
    assert cycles_per_iteration(straight(load, instruction("FADD")), 1, latency={"LDS": 100}) < 40


def test_the_four_schedulers_share_the_path_to_memory():
    per_load = 32 * 16 / pipes.SHARED_BYTES_PER_CYCLE * pipes.SCHEDULERS
    loads = straight(*[instruction("LDS.128")] * 10)
    assert cycles_per_iteration(loads, 4) == pytest.approx(40 * per_load, rel=0.02)
    assert cycles_per_iteration(loads, 4, dead=range(0, 160, 16)) == pytest.approx(40)


# --- Hot loops

KERNEL = "_ZN6fastbn18toy_forward_kernelINS_8bfloat16EEEvPT_"
# line 10 is hot, 12 is a cold path within it, 20 is neither.
MARKS = [Mark("k.cu", 10, 12, "sums"), Mark("k.cu", 12, 12, None)]


def listing(*lines: str) -> str:
    """Return nvdisasm's output for lines of `number | label | instruction`."""
    text, address = f"	.target	sm_90\n.text.{KERNEL}:\n", 0
    for line in lines:
        number, label, code = (part.strip() for part in line.split("|"))
        text += f'	//## File "/x/k.cu", line {number}\n' + (f".L_{label}:\n" if label else "")
        text += f"        /*{address:04x}*/  {code} ;  /* 0x0000000000000000 */\n   /* 0x000fe20000000000 */\n"
        address += 16
    return text


SOURCE = (
    "20 |      | MOV R0, RZ",
    "20 | head | SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R7], R4",
    "20 |      | @!P0 BRA `(.L_retry)",
    "10 | go   | LDS.128 R8, [R0]",
    "10 |      | LDS.128 R4, [R0+0x2000]",
    "10 |      | FADD R1, R8, R4",
    "10 |      | @P1 BRA `(.L_past)",
    "12 |      | DADD R2, R2, R4",
    "12 |      | STS.64 [R9], R2",
    "10 | past | FADD R1, R1, R5",
    "20 |      | ISETP.NE.AND P2, PT, R0, RZ, PT",
    "20 |      | @P2 BRA `(.L_head)",
    "20 |      | EXIT",
    "20 | retry | SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R7], R4",
    "10 |      | @!P0 BRA `(.L_retry)",
    "20 |      | BRA `(.L_go)",
)
LOOP = listing(*SOURCE)


def find(text: str) -> list[hot_loops.HotLoop]:
    return hot_loops.hot_loops(sass.parse(text), MARKS, Path("/x"))


def test_the_steady_state_skips_cold_paths_and_retries():
    (loop,) = find(LOOP)
    assert (loop.kernel.kind, loop.kernel.dtype, loop.name) == ("toy_forward", "bfloat16", "sums")
    names = [instruction.name for instruction in loop.instructions]
    assert names == ["SYNCS", "BRA", "LDS", "LDS", "FADD", "BRA", "FADD", "ISETP", "BRA"]
    assert loop.vectors == 2 and loop.instructions_per_vector == 4.5


def test_without_the_mark_of_the_cold_path_it_is_not_skipped():
    (loop,) = hot_loops.hot_loops(sass.parse(LOOP), MARKS[:1], Path("/x"))
    assert "DADD" in [instruction.name for instruction in loop.instructions]


def test_a_loop_that_is_mostly_not_hot_is_none():
    assert find(LOOP.replace("line 10\n", "line 20\n")) == []
    assert find(LOOP.replace("toy_forward_kernel", "toy_forward_nothin")) == []


def test_a_switched_off_instruction_of_a_cold_path_is_dead():
    (loop,) = find(LOOP.replace("line 20\n        /*00a0*/  ISETP", "line 12\n        /*00a0*/  @P3 LDG.E.128"))
    (dead,) = loop.dead
    assert dead == 0xA0 and loop.vectors == 2


def test_of_loops_that_are_unrolled_alike_the_shorter_one_counts():
    longer = [
        "20 | head2 | MOV R0, RZ",
        "10 |      | LDS.128 R8, [R0]",
        "10 |      | LDS.128 R4, [R0+0x2000]",
        *["10 |      | FADD R1, R8, R4"] * 9,
        "20 |      | @P2 BRA `(.L_head2)",
    ]
    loops = [line.strip() for line in SOURCE]
    assert len(find(listing(*loops[:-4], *longer, *loops[-4:]))[0].instructions) == 9
    assert len(find(listing(*longer, *loops))[0].instructions) == 9


@pytest.mark.parametrize(
    "kind, code, vectors",
    [
        ("toy_forward", [("LDS.128", ""), ("LDS.128", ""), ("LDS.64", "")], 2),
        ("toy_backward", [("LDS.128", ""), ("LDS.128", "")], 1),
        ("toy_backward", [("LDS.128", ""), ("LDS.128", ""), ("STG.E.128", "")], 1),
        ("toy_backward", [("LDGSTS.E.BYPASS.128", "")] * 4, 2),
        ("toy_backward", [("LDGSTS.E.BYPASS.128", ""), ("LDGSTS.E.BYPASS.128", "@P1")] * 4, 4),
        ("toy_forward", [("STG.E", "")] * 4 + [("STG.E.128", "@P0")], 1),
    ],
)
def test_vectors_are_counted_by_the_accesses_to_the_tensors(kind, code, vectors):
    path = [instruction(opcode, predicate=predicate) for opcode, predicate in code]
    assert hot_loops.vectors_of(path, hot_loops.Kernel(kind, "bfloat16", "")) == vectors
    assert hot_loops.vectors_of(path, hot_loops.Kernel(kind, "float32", "")) == vectors / 2


# --- What a hot loop should not contain


def loop_of(*code: Instruction, dtype: str = "bfloat16") -> hot_loops.HotLoop:
    kernel = hot_loops.Kernel("toy_forward", dtype, "")
    return hot_loops.HotLoop(kernel, "f", "90", "sums", tuple(straight(*code)), frozenset(), 1)


@pytest.mark.parametrize(
    "opcode", ["LDC.64", "ULDC", "MEMBAR.ALL.GPU", "CCTL.IVALL", "LDL", "LEA.HI.X", "IADD3.X", "IMAD.HI.U32", "IMAD.X"]
)
def test_forbidden_opcodes_are_found(opcode):
    loop = loop_of(instruction(opcode), instruction("IMAD.WIDE"), instruction("LEA"), instruction("IADD3"))
    assert checks.forbidden(loop) == [opcode]
    assert checks.problems([loop], 4) == [f"sums: {opcode}"]
    assert checks.problems([loop], 3)[0] == "expected at most 3 instructions per vector, got 4.0"


def test_narrow_accesses_are_found():
    store = instruction("STG.E", "desc[UR6][R8.64+0x4], R39")
    assert checks.narrow_accesses(loop_of(store, instruction("STG.E.128", "desc[UR6][R8.64], R36"))) == [
        "STG.E desc[UR6][R8.64+0x4], R39"
    ]


def test_lanes_that_are_32_bytes_apart_are_found():
    """Float32 as vectors of 8: a lane moves two neighbouring vectors of 16 bytes."""
    first, second = "R4, desc[UR6][R16.64]", "R8, desc[UR6][R16.64+0x10]"
    wrong = loop_of(instruction("LDG.E.128", first), instruction("LDG.E.128", second))
    assert checks.lane_strides(wrong) == [f"LDG.E.128 {first} and LDG.E.128 {second}"]
    moved = [
        instruction("LDG.E.128", first),
        instruction("IADD3", "R16, R16, 0x4, RZ"),
        instruction("LDG.E.128", second),
    ]
    assert checks.lane_strides(loop_of(*moved)) == []
    right = loop_of(instruction("LDS.128", "R4, [R60]"), instruction("LDS.128", "R8, [R60+0x2000]"))
    assert checks.lane_strides(right) == []


# --- A compiled kernel


def need_compiler() -> None:
    """Skip without nvcc and nvdisasm, or fail where FASTBN_REQUIRE_NVCC=1 says that they are there."""
    missing = [name for name in ("nvcc", "nvdisasm") if (shutil.which(name) or sass.find_tool(name)) is None]
    if missing and os.environ.get("FASTBN_REQUIRE_NVCC") == "1":
        pytest.fail(f"FASTBN_REQUIRE_NVCC=1, but {' and '.join(missing)} was not found", pytrace=False)
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")


TOY = """
namespace fastbn {
struct bfloat16 { unsigned short bits; };
template <class T>
__global__ void toy_forward_kernel(const uint4* from, uint4* to, int n, float scale) {
  for (int i = threadIdx.x; i < n; i += blockDim.x * 4) {
    // hot loop: write
    uint4 x[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) x[u] = from[i + u * 512];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      x[u].x = __float_as_uint(__uint_as_float(x[u].x) * scale);
      to[i + u * 512] = x[u];
    }
    // end of hot loop
  }
}
template __global__ void toy_forward_kernel<bfloat16>(const uint4*, uint4*, int, float);
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_the_hot_loop_of_a_compiled_kernel(tmp_path, arch):
    need_compiler()
    source, cubin = tmp_path / "toy.cu", tmp_path / "toy.cubin"
    source.write_text(TOY)
    (resources,) = compile_cubin(source, tmp_path, cubin, arch).values()
    assert resources.spill_bytes == resources.stack_bytes == 0 and 8 <= resources.registers <= 64
    (loop,) = hot_loops.hot_loops(sass.disassemble(cubin), marks_of_file(source), tmp_path)
    assert (loop.name, loop.arch, loop.kernel.dtype) == ("write", arch, "bfloat16")
    assert loop.vectors % 4 == 0 and loop.instructions_per_vector < 12
    names = [i.name for i in loop.instructions]
    assert names.count("LDG") == names.count("STG") == names.count("FMUL") == loop.vectors
    assert checks.narrow_accesses(loop) == checks.lane_strides(loop) == []
    lone, many = (cycles_per_iteration(loop.instructions, warps, loop.dead) / loop.vectors / warps for warps in (1, 8))
    assert lone > pipes.LATENCY["LDG"] / loop.vectors > many > loop.instructions_per_vector


def marks_of_file(source: Path) -> list[Mark]:
    return marks_of(source.read_text(), source.name)


@pytest.mark.slow
def test_a_source_that_does_not_compile_says_so(tmp_path):
    need_compiler()
    source = tmp_path / "wrong.cu"
    source.write_text("nonsense")
    with pytest.raises(subprocess.CalledProcessError) as raised:
        compile_cubin(source, tmp_path, tmp_path / "wrong.cubin")
    assert "wrong.cu" in raised.value.stderr
