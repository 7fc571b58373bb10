"""How tensors are divided among the programs of `triton_sums`: the kernel, its grid and the sizes that it is given.

The division depends on shape, strides, alignment and dtype only, so a rerun is bit-identical.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import Launch
from .triton_sums import planes_kernel, rows_kernel

# bytes of a vector, and of all vectors of one tensor that a thread asks for before it uses the first
VECTOR, IN_FLIGHT = 16, 64
# threads of a program, and of a program for a channel so short that most of them would have nothing to load
THREADS, FEW_THREADS = 256, 64
# registers of a thread for each tensor: four programs for one tensor, or two for a pair, fit a multiprocessor of
# NVIDIA's; both have 64 KB under way
REGISTERS = 64
# programs to aim for: two for each multiprocessor of an H100, though four fit: more have shorter pieces, whose ends
# cost more than they win (measured, docs/kernels.md)
PROGRAMS = 264
# channels of a tile of rows: 128 contiguous bytes of half precision; rows of partial moments are multiples of ROW
WIDTH, ROW = 64, 8
# chunks of four values that a lane adds before the merge in float64: float32 sums are off by less than 256 * 2^-24
MOST_CHUNKS = 64
# bytes of the tensors for each byte of their partial moments, at least
WORTH = 20


class Pieces(NamedTuple):
    """The division of a tensor, or of a pair of one shape: `splits` pieces of each channel, one program for each."""

    kernel: Any
    programs: int
    splits: int
    width: int  # channels in a row of partial moments
    threads: int
    arguments: dict[str, Any]

    def launch(self, tensors: list[Tensor], partials: Tensor) -> Launch:
        """The launch that fills `partials`, (4 or 8, splits, width), from tensors that `aligned` returned."""
        # loads of single values and 64-bit offsets take more
        usual = self.arguments["VEC"] > 1 and self.arguments["INDEX"] == tl.int32
        registers = REGISTERS * len(tensors) if usual else None
        pointers = {"a_ptr": tensors[0], "b_ptr": tensors[1] if len(tensors) > 1 else None, "partials_ptr": partials}
        return Launch(self.kernel, (self.programs,), pointers | self.arguments, self.threads, registers)


def aligned(x: Tensor) -> tuple[Tensor, int]:
    """A tensor at the address of x rounded down to whole vectors, and the elements from there to the first of x.

    If the storage starts behind that address: x itself, and -1.
    """
    start = x.data_ptr() % VECTOR // x.itemsize
    if not start:
        return x, 0
    if start > x.storage_offset():
        return x, -1
    return x.as_strided((1,), (1,), x.storage_offset() - start), start


def pieces_of(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], starts: tuple[int, ...], itemsize: int
) -> Pieces:
    """Divide (N, C, L) views of one shape that begin `starts` elements behind an aligned address."""
    n, c, l = shape
    by_rows = c > 1 and (l == 1 or strides[0][1] < strides[0][2])
    vec, tiles = VECTOR // itemsize, IN_FLIGHT // VECTOR
    sizes = _rows(shape, strides, vec) if by_rows else _planes(shape, strides, starts, vec)
    total = sizes["images"] * (sizes["length"] - sizes.get("EDGES", False))

    width = min(max(triton.next_power_of_2(c), ROW), WIDTH) if by_rows else 1
    few = not by_rows and total * sizes["VEC"] * itemsize <= THREADS * IN_FLIGHT
    threads = FEW_THREADS if few else THREADS
    block = threads * vec // (width if by_rows else sizes["VEC"])
    blocks, chunks = triton.cdiv(c, width), triton.cdiv(total, block * tiles)
    # partial moments are four numbers in float32 for each tensor, or in float64
    most = n * l * itemsize // (WORTH * 4 * max(itemsize, 4))
    splits = max(min(PROGRAMS // blocks, most), 1)
    splits = triton.cdiv(chunks, min(triton.cdiv(chunks, splits), MOST_CHUNKS))

    row = max(width, ROW)
    arguments = sizes | {"splits": splits, "width": triton.cdiv(c, row) * row, "BLOCK": block, "TILES": tiles}
    # the largest vector or row and its offset, in 32 bits where they fit
    ends = [
        (sizes["images"] - 1) * sizes[f"stride_{x}n"] + sizes["length"] * sizes[f"step_{x}"]
        for x in "ab"[: len(strides)]
    ]
    wide = max(*ends, total + 2 * block * tiles) >= 2**31
    arguments |= {"INDEX": tl.int64 if wide else tl.int32} | ({"WIDTH": width} if by_rows else {})
    return Pieces(
        (rows_kernel if by_rows else planes_kernel), splits * blocks, splits, arguments["width"], threads, arguments
    )


def _planes(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], starts: tuple[int, ...], vec: int
) -> dict[str, Any]:
    """Arguments of `planes_kernel`: whole vectors, whole vectors and edges, or one position at a time."""
    n, c, l = shape
    firsts = [(start, s_c if c > 1 else 0) for start, (_, s_c, _) in zip(starts, strides, strict=True)]
    # planes start in the same lane for all images, and for both tensors of a pair
    alike = min(starts) >= 0 and all(s_l == 1 or l == 1 for *_, s_l in strides)
    alike &= all(n == 1 or s_n % vec == 0 for s_n, *_ in strides)
    alike &= all((a - b) % vec == 0 for a, b in zip(firsts[0], firsts[-1], strict=True))
    edges = alike and any(size % vec for size in (l, *firsts[0]))
    if not alike or (edges and l < 4 * vec):
        starts, vec, edges = (0,) * len(starts), 1, False
    sizes = _walk(n, l // vec, [1 if vec > 1 else s_l for *_, s_l in strides], [s_n // vec for s_n, *_ in strides])
    sizes |= {"C": c, "L": l, "VEC": vec, "EDGES": edges, "magic_less": None, "bits_less": None}
    if edges and n > 1:
        sizes["magic_less"], sizes["bits_less"] = _reciprocal(l // vec - 1)
    for x, start, (_, s_c, _) in zip("ab", starts, strides, strict=False):
        sizes |= {f"start_{x}": start, f"stride_{x}c": s_c}
    return {"start_b": None, "stride_bc": None} | sizes


def _rows(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], most: int) -> dict[str, Any]:
    """Arguments of `rows_kernel`: vectors of at most `most` values, a power of two that divides all sizes."""
    n, c, l = shape
    vec = math.gcd(most, c, *(s for s_n, _, s_l in strides for s in (s_n if n > 1 else 0, s_l if l > 1 else 0)))
    vec = vec if all(s_c == 1 for _, s_c, _ in strides) else 1
    sizes = _walk(n, l, [s_l // vec for *_, s_l in strides], [s_n // vec for s_n, *_ in strides])
    sizes |= {f"stride_{x}c": s_c for x, (_, s_c, _) in zip("ab", strides, strict=False)}
    return {"stride_bc": None} | sizes | {"C": c // vec, "VEC": vec}


def _walk(images: int, length: int, steps: list[int], strides_n: list[int]) -> dict[str, Any]:
    """Arguments of `offset_of` for `length` vectors or rows in each image, `steps` apart, images `strides_n` apart."""
    if length == 1:
        images, length, steps = 1, images, strides_n
    elif all(s_n == length * step for s_n, step in zip(strides_n, steps, strict=True)):
        images, length = 1, images * length
    magic, bits = _reciprocal(length) if images > 1 else (None, 0)
    sizes = {"images": images, "length": length, "magic": magic, "bits": bits, "step_b": None, "stride_bn": None}
    for x, step, s_n in zip("ab", steps, strides_n, strict=False):
        sizes |= {f"step_{x}": step, f"stride_{x}n": s_n}
    return sizes


def _reciprocal(length: int) -> tuple[int, int]:
    """(magic, bits) with v // length = v * magic >> 32 + bits for 0 <= v < 2^31; magic has 32 bits; length > 1.

    Granlund and Montgomery, "Division by invariant integers using multiplication" (1994).
    """
    bits = (length - 1).bit_length() - 1
    return (1 << 32 + bits) // length + 1, bits
