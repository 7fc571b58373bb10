"""Every kernel compiles for sm_80, sm_90 and gfx942 on a machine without a GPU, with the arguments of its launch.

The tests check the compiled code: 64-bit offsets, no atomics, no spilled registers, wide loads, enough of them in
flight, and few instructions for each value.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import asr_kernels as ak

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter compiles no kernels"
)

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
F16, BF16, F32, F64 = TYPES
# suffixes of load and store instructions by width in bits: PTX, and AMD's assembly
PTX = {128: r"\.(v4\.b32|v2\.b64)", 64: r"\.(v2\.b32|b64)", 32: r"\.b32", 16: r"\.b16"}
GCN = {128: "_dwordx4", 64: "_dwordx2", 32: "_dword", 16: "_(u|d16_|)short(_d16)?(_hi)?"}


class Variant(NamedTuple):
    """A kernel on an (N, C, L) view, and the width in bits of its memory accesses to the tensor."""

    kernel: str
    dtype: torch.dtype
    shape: tuple[int, int, int]
    width: int
    last: bool = False  # channels_last
    gap: int = 1  # distance of images, in multiples of their size

    def view(self) -> Tensor:
        """A tensor on the meta device, without memory."""
        _, c, l = self.shape
        strides = (c * l * self.gap, 1, c) if self.last else (c * l * self.gap, l, 1)
        return torch.empty_strided(self.shape, strides, dtype=self.dtype, device="meta")

    def launch(self) -> Any:
        from asr_kernels.backends.triton_affine import plan_affine
        from asr_kernels.backends.triton_moments import plan_moments

        x = self.view()
        if self.kernel == "affine":
            factor = x.new_empty(x.shape[1], dtype=F64 if x.dtype == F64 else F32)
            return plan_affine(x, factor, factor)
        running = ak.ChannelMoments.empty(x.shape[1], "meta")
        launches, _ = plan_moments(x, x) if self.kernel.startswith("paired") else plan_moments(x, running=running)
        return launches["finish" in self.kernel]

    def __str__(self) -> str:
        layout = "channels_last" if self.last else "NCHW"
        return f"{self.kernel} {TYPES[self.dtype]} {'x'.join(map(str, self.shape))} {layout}"


KERNELS = ("moments", "paired", "affine")
# whose registers and instructions are promised. Triton 3.4 and 3.6 spill registers in two kernels
THIS_COMPILER = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
VARIANTS = [
    # planes of 56 x 56: whole 16-byte vectors in every dtype
    *(Variant(kernel, dtype, (8, 64, 3136), 128) for kernel in KERNELS for dtype in TYPES),
    *(Variant(kernel, dtype, (8, 64, 3136), 128, last=True) for kernel in KERNELS for dtype in (BF16, F32)),
    # planes that 16-byte vectors do not divide, with many images: folded by affine
    *(Variant("affine", dtype, (64, 64, size), 128) for size in (196, 49) for dtype in (BF16, F32)),
]
# planes that start and end within a vector: 7x7, 14x14 and 35x35. The edges are read one by one
EDGES = [
    *(Variant(kernel, dtype, (64, 64, 49), 128) for kernel in KERNELS[:2] for dtype in (F16, BF16, F32)),
    *(Variant(kernel, BF16, (8, 64, 196), 128) for kernel in KERNELS[:2]),
    *(Variant("moments", dtype, (8, 64, 1225), 128) for dtype in (BF16, F32)),
]
FINISH = [
    Variant(kernel, F32, (64, 64, 12544), 0, last) for kernel in ("finish", "paired finish") for last in (False, True)
]
ODD = [
    # few images of short planes: 64-bit vectors divide 14 x 14, no vector divides 7 x 7
    *(Variant("affine", BF16, (8, 64, size), width) for size, width in ((196, 64), (49, 16))),
    # long planes of an odd size
    Variant("affine", F32, (8, 64, 1225), 32),
    # planes of less than four vectors, rows of an odd number of channels
    *(Variant(kernel, BF16, (8, 64, 9), 16) for kernel in KERNELS),
    *(Variant(kernel, F32, (8, 67, 49), 32, last=True) for kernel in KERNELS),
    # fewer elements than threads
    *(Variant(kernel, F32, (1, 1, 1), 32) for kernel in KERNELS),
    # arguments: strides that exceed 32 bits
    *(Variant(kernel, F16, (2, 3, 1024), 128, gap=2**31) for kernel in KERNELS),
]


def compiled(launch: Any, target: str) -> Any:
    """The compiled kernel, specialised as a launch would be: on 1, on multiples of 16 and on aligned pointers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        elif parameter.is_constexpr or value is None or (special and value == 1):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = parameter.annotation_type or ("i32" if value < 2**31 else "i64")
        if isinstance(value, Tensor):
            special, value = not parameter.do_not_specialize_on_alignment, 16
        if special and signature[name] != "constexpr" and value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    try:
        return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=launch.options(TARGETS[target][2]))
    except Exception as error:
        if "ROCm linker" in str(error):
            pytest.skip("this Triton brings no linker for AMD's GPUs, and there is no ROCm")
        raise


def assert_64_bits(ttir: str, bounded: bool) -> None:
    """Offsets have 64 bits, and the program id is only subtracted or divided in 32 bits before it is extended to 64.

    `bounded`: the host has found that products fit 32 bits; offsets have 64 bits all the same, except positions in a
    vector. There is no atomic operation.
    """
    narrow: set[str] = set()
    lanes: set[str] = set()
    for line in ttir.splitlines():
        result, _, operation = line.strip().partition(" = ")
        used = set(re.findall(r"%\w+", operation))
        if operation.startswith("tt.make_range") or (used and used <= lanes):
            lanes.add(result)
        if bounded and operation.startswith("tt.addptr") and re.search(r"i32(>| loc|$)", operation.split(" : ")[1]):
            assert re.findall(r"%\w+", operation)[1] in lanes, line
        if operation.startswith(("tt.get_program_id", "tt.get_num_programs")) and not bounded:
            narrow.add(result)
        elif narrow & used:
            assert operation.startswith(("arith.subi", "arith.divsi", "arith.remsi", "arith.extsi")), line
            if not operation.startswith("arith.extsi"):
                narrow.add(result)
        assert "atomic" not in operation, line


def machine_code(kernel: Any, folder: Path) -> str:
    """The instructions of NVIDIA's GPUs (SASS)."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    return run([triton.knobs.nvidia.nvdisasm.path, "-c", binary])


def run(command: list[str | Path]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def registers_of(kernel: Any, target: str, folder: Path) -> int:
    """Registers per thread; fails if a register is spilled to memory."""
    if target == "gfx942":
        assert set(re.findall(r"\.[sv]gpr_spill_count: *(\d+)", kernel.asm["amdgcn"])) == {"0"}
        return int(re.search(r"\.vgpr_count: *(\d+)", kernel.asm["amdgcn"])[1])
    code = machine_code(kernel, folder)
    assert not (THIS_COMPILER and re.search(r"\b(LDL|STL)\b", code))
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", folder / "kernel.cubin"]
    return int(re.search(r"REG:(\d+)", run(command))[1])


def loops_of(code: str) -> list[list[str]]:
    """The instructions of each loop: those from the target of a backward branch to the branch."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"(\.L\w+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line.strip()):
            instructions.append(instruction[1].strip())
    jumps = [(i, re.search(r"BRA.*`\((\.L\w+)\)", text)) for i, text in enumerate(instructions)]
    ends = [(labels[jump[1]], i) for i, jump in jumps if jump and labels.get(jump[1], i) < i]
    return [instructions[start : end + 1] for start, end in ends]


def assert_sound(kernel: Any, launch: Any, target: str, folder: Path, shared: int = 48 * 1024 // 2) -> int:
    """Check what holds for every kernel; returns how many programs a multiprocessor runs at a time."""
    assert kernel.asm["hsaco" if target == "gfx942" else "cubin"].startswith(b"\x7fELF")
    index = launch.arguments.get("INDEX") if "magic" in launch.arguments else None
    assert_64_bits(kernel.asm["ttir"], bounded=index is not None and index.name == "int32")
    warp = TARGETS[target][2]
    threads = launch.options(warp)["num_warps"] * warp
    registers = -(-registers_of(kernel, target, folder) // 8) * 8
    # a multiprocessor (NVIDIA) has 65,536 registers and runs 2,048 threads and 32 programs; a compute unit (AMD) has
    # 131,072 registers and runs 2,048 threads. Shared memory: half of what a program gets without opting in
    assert kernel.metadata.shared <= shared
    return min((131072 if target == "gfx942" else 65536) // (registers * threads), 2048 // threads, 32)


def widths_of(kernel: Any, target: str, access: str) -> set[int]:
    """Widths in bits of all global loads or stores."""
    if target == "gfx942":
        names, forms = re.findall(rf"(?:global|buffer)_{access}(_\w+)", kernel.asm["amdgcn"]), GCN
    else:
        names, forms = re.findall(rf"{access[:1]}[dt]\.global([\w.:]+)", kernel.asm["ptx"]), PTX
    return {next(bits for bits, form in forms.items() if re.search(f"{form}$", name)) for name in names}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_kernel_compiles_with_wide_accesses(target, variant, tmp_path):
    launch = variant.launch()
    kernel = compiled(launch, target)
    programs = assert_sound(kernel, launch, target, tmp_path)
    assert variant.width in widths_of(kernel, target, "load")
    # no narrower access to the tensor; gain and shift are read in 32 or 64 bits
    narrower = {bits for bits in widths_of(kernel, target, "load") if bits < variant.width}
    assert not narrower if variant.kernel != "affine" else narrower <= {32, 64}
    if variant.kernel == "affine":
        assert widths_of(kernel, target, "store") == {variant.width}
    # bytes in flight per multiprocessor: to hide 700 ns at 4.8 TB/s, each of 132 multiprocessors needs 25 KB. A thread
    # of the kernels for moments loads 64 bytes of each tensor before it uses the first
    each = {"moments": 64, "paired": 128, "affine": 8 * variant.dtype.itemsize}[variant.kernel]
    assert programs * launch.threads * each >= (25_000 if variant.kernel == "affine" else 65_000)


# instructions of the loop for each value, or each pair of values. At 1.755 GHz, 132 multiprocessors issue 29.7e12 a
# second: 12.3 for each bf16 value at 4.8 TB/s, 24.7 for each fp32 value or pair of bf16 values
BUDGETS = {"moments": {F16: 6.0, BF16: 6.0, F32: 5.5}, "paired": {F16: 12.5, BF16: 12.5, F32: 11.0}}
COUNTED = [
    *(
        Variant(kernel, dtype, (64, 64, 12544), 128, last)
        for kernel in BUDGETS
        for dtype in (F16, BF16, F32)
        for last in (False, True)
    ),
    *(variant for variant in EDGES if variant.dtype == F32 or variant.shape[2] == 49),
]


@pytest.mark.skipif(not THIS_COMPILER, reason="Triton's versions differ in instructions by a tenth")
@pytest.mark.parametrize("variant", COUNTED, ids=str)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_loop_loads_ahead_and_has_few_instructions(target, variant, tmp_path):
    launch = variant.launch()
    loops = loops_of(machine_code(compiled(launch, target), tmp_path))
    sizes = launch.arguments
    tensors = 2 if variant.kernel == "paired" else 1
    values = sizes["BLOCK"] * sizes.get("WIDTH", sizes["VEC"]) * sizes["TILES"] // launch.threads
    # the loop over whole chunks, and the longer one with masks
    vectors = [loop for loop in loops if any("LDG.E.128" in text for text in loop)]
    inner = min(vectors, key=len)
    assert len(inner) / values <= BUDGETS[variant.kernel][variant.dtype]
    loads = [i for i, text in enumerate(inner) if "LDG" in text]
    assert 16 * len(loads) == 64 * tensors == values * tensors * variant.dtype.itemsize
    # all loads are on their way before the first arithmetic on a value
    used = next(i for i, text in enumerate(inner) if text.startswith(("FADD", "FFMA", "FMUL", "HADD")))
    assert max(loads) < used
    if sizes.get("EDGES"):
        # a tile of the edges holds the two edges of BLOCK / 2 planes
        (edges,) = [loop for loop in loops if loop not in vectors]
        lanes = sizes["BLOCK"] * sizes["VEC"] // launch.threads
        # the mean over all lanes in which a plane may start
        in_vectors = variant.shape[2] - sizes["VEC"] + 1
        plane = in_vectors * len(inner) / values + 2 * sizes["VEC"] * len(edges) / lanes
        assert plane / variant.shape[2] <= {"moments": 8.0, "paired": 17.0}[variant.kernel]


@pytest.mark.parametrize("variant", EDGES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_planes_with_edges_compile(target, variant, tmp_path):
    launch = variant.launch()
    assert launch.arguments["EDGES"]
    kernel = compiled(launch, target)
    programs = assert_sound(kernel, launch, target, tmp_path)
    assert programs * launch.threads * {"moments": 64, "paired": 128}[variant.kernel] >= 65_000
    assert widths_of(kernel, target, "load") == {128, 8 * variant.dtype.itemsize}


@pytest.mark.parametrize("variant", FINISH, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_finish_compiles(target, variant, tmp_path):
    launch = variant.launch()
    kernel = compiled(launch, target)
    assert assert_sound(kernel, launch, target, tmp_path) >= 1
    # partial moments; the running moments are float64
    assert 128 in widths_of(kernel, target, "load")
    assert 32 not in widths_of(kernel, target, "load")


@pytest.mark.parametrize("variant", ODD, ids=str)
def test_odd_shapes_compile(variant, tmp_path):
    launch = variant.launch()
    kernel = compiled(launch, "sm_90")
    assert assert_sound(kernel, launch, "sm_90", tmp_path) >= 2
    assert variant.width in widths_of(kernel, "sm_90", "load")


def factors(rule: str, prior: str | float = "median") -> Any:
    from asr_kernels.backends.triton_factors import plan_factors

    moments = ak.ChannelMoments.empty(2048, "meta")
    return plan_factors(moments, moments, rule, prior, bias=True, eps=1e-8)[0]


RULES = [("asr", "median"), ("asr", "mean"), ("asr", 0.1), ("layerwise", "median"), ("channelwise", "median")]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_factors_compile(target, rule, tmp_path):
    launch = factors(*rule)
    assert assert_sound(compiled(launch, target), launch, target, tmp_path) >= 1


def test_factors_of_an_unknown_rule_do_not_compile():
    with pytest.raises(triton.CompilationError, match="no other rule"):
        compiled(factors("new"), "sm_90")
