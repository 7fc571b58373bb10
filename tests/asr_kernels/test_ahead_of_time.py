"""Every kernel compiles for sm_80, sm_90 and gfx942 on a machine without a GPU, from the very arguments of its launch.

What the compiled code shows is promised here: 64-bit offsets, no atomics, no spills, and loads of 16 bytes.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="in the interpreter's process kernels are not compiled"
)

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


def view(dtype: torch.dtype, shape: tuple[int, int, int], last: bool = False, gap: int = 1) -> Tensor:
    """An (N, C, L) view without memory, contiguous or channels_last; images `gap` times as far apart as they need."""
    _, c, l = shape
    strides = (c * l * gap, 1, c) if last else (c * l * gap, l, 1)
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def moments(x: Tensor, part: int = 0) -> Any:
    from asr_kernels.triton_moments import plan_moments

    return plan_moments(x)[0][part]


def paired(x: Tensor, part: int = 0) -> Any:
    from asr_kernels.triton_moments import plan_moments

    return plan_moments(x, x)[0][part]


def affine(x: Tensor) -> Any:
    from asr_kernels.triton_affine import plan_affine

    factor = x.new_empty(x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return plan_affine(x, factor, factor)


# planes of 56 x 56: whole 16-byte vectors in every dtype; rows of 64 channels, the same
VARIANTS: dict[str, Callable[[], Any]] = {
    f"{kernel.__name__} {TYPES[dtype]} {'rows' if last else 'planes'}": lambda k=kernel, d=dtype, r=last: k(
        view(d, (8, 64, 3136), r)
    )
    for kernel in (moments, paired, affine)
    for dtype in TYPES
    for last in (False, True)
}
FINISH: dict[str, Callable[[], Any]] = {
    "finish": lambda: moments(view(torch.float32, (8, 64, 3136)), part=1),
    "finish paired": lambda: paired(view(torch.float32, (8, 64, 3136)), part=1),
}
ODD: dict[str, Callable[[], Any]] = {
    f"{kernel.__name__} {name}": lambda k=kernel, x=x: k(view(*x))
    for kernel in (moments, paired, affine)
    for name, x in {
        # no two elements of a plane share a vector
        "7x7": (torch.bfloat16, (8, 64, 49)),
        # fewer elements than threads
        "one value": (torch.float32, (1, 1, 1)),
        # strides that do not fit 32 bits as arguments
        "vast": (torch.float16, (2, 3, 16), False, 2**31),
    }.items()
}


def compiled(launch: Any, target: str) -> Any:
    """The kernel of a launch, specialised as the launch would be: on 1, on multiples of 16 and on aligned pointers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from asr_kernels.triton_moments import OPTIONS

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        elif parameter.is_constexpr or value is None or (special and value == 1):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or (special and signature[name] != "constexpr" and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(OPTIONS))


def assert_sound(kernel: Any, target: str, tmp_path: Path) -> None:
    assert kernel.asm["hsaco" if target == "gfx942" else "cubin"].startswith(b"\x7fELF")

    lines = kernel.asm["ttir"].splitlines()
    ids = [m[1] for line in lines if (m := re.search(r"(%\w+) = tt\.get_program_id", line))]
    assert ids
    for line in lines:
        # a program's number is made 64 bits wide and used in no other way; every product, every offset has 64 bits
        if any(re.search(rf"{i}\b", line.partition("=")[2]) for i in ids):
            assert re.search(r"arith\.extsi .* i32 to i64", line), line
        if "arith.muli" in line:
            assert re.search(r": (tensor<[0-9x]+xi64>|i64)", line), line
        if "tt.addptr" in line:
            assert re.search(r", (tensor<[0-9x]+xi64>|i64) loc", line), line
        assert "atomic" not in line, line

    if target == "gfx942":
        assert set(re.findall(r"\.[sv]gpr_spill_count: *(\d+)", kernel.asm["amdgcn"])) == {"0"}
    else:
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # spilled registers would go to the stack
        assert re.search(r"STACK:0 ", usage), usage


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", TARGETS)
def test_kernel_compiles_with_wide_loads(target, variant, tmp_path):
    kernel = compiled(VARIANTS[variant](), target)
    assert_sound(kernel, target, tmp_path)
    if target != "gfx942":
        assert re.search(r"ld\.global[\w.:]*\.(v4\.b32|v2\.b64)", kernel.asm["ptx"])
        if variant.startswith("affine"):
            assert re.search(r"st\.global[\w.:]*\.(v4\.b32|v2\.b64)", kernel.asm["ptx"])
    elif not variant.startswith("paired"):
        # a pair's tiles are half as large: at 64 lanes a warp that leaves 8 bytes of half precision to each
        assert "load_dwordx4" in kernel.asm["amdgcn"]


@pytest.mark.parametrize("variant", FINISH)
@pytest.mark.parametrize("target", TARGETS)
def test_finish_compiles(target, variant, tmp_path):
    assert_sound(compiled(FINISH[variant](), target), target, tmp_path)


@pytest.mark.parametrize("variant", ODD)
def test_odd_shapes_compile(variant, tmp_path):
    assert_sound(compiled(ODD[variant](), "sm_90"), "sm_90", tmp_path)


def test_planes_of_14x14_are_read_in_vectors(tmp_path):
    # 196 elements: Triton alone, which looks for multiples of 16, would read one at a time
    for dtype, width in ((torch.bfloat16, r"v2\.b32"), (torch.float32, r"v4\.b32")):
        kernel = compiled(moments(view(dtype, (8, 64, 196))), "sm_90")
        assert_sound(kernel, "sm_90", tmp_path)
        assert re.search(rf"ld\.global[\w.:]*\.{width}", kernel.asm["ptx"])
