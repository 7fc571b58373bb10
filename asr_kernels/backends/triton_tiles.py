"""How `affine_` divides a tensor into tiles, one for each program.

A tensor is a strided (N, C, L) view. A tile has BLOCK_N images x BLOCK_L positions of BLOCK_C channels. It has one
channel where positions are contiguous ("planes"), many where channels are contiguous ("rows"). Short planes, 7 x 7 or
28 x 28, fill neither a vector nor a tile: they are read as rows in which each channel has `fold` entries, one per
position.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
from torch import Tensor

# values per tile: 8 for each of 128 threads, 16 bytes of half precision; half as many in float64
TILE = 1024
# channels in a tile of rows: 256 contiguous bytes of half precision
TILE_CHANNELS = 128
# longest plane that is read as rows, and the bytes of all images at one position that make it worthwhile
SHORT_PLANE, WORTH_FOLDING = 1024, 128
# arguments that Triton does not specialise: VEC gives the divisors, and each special value would compile a new kernel
SIZES = ["N", "C", "L", "blocks", "tiles_l"]


class Tiles(NamedTuple):
    """The division of a tensor into tiles, and the arguments that it gives the programs."""

    fold: int  # entries of a row for each channel
    programs: int
    arguments: dict[str, int]
    values: int  # per tile


def tiles_of(x: Tensor) -> Tiles:
    """Divide an (N, C, L) view.

    Triton detects arguments that are multiples of 16, and no other divisors. So sizes and strides are divided by VEC, a
    power of two that divides them all, and multiplied by VEC again in the kernel.
    """
    n, c, l = x.shape
    stride_n, stride_c, stride_l = x.stride()
    fold = 1
    worth_it = 1 < l <= SHORT_PLANE and n * x.itemsize >= WORTH_FOLDING and (stride_c, stride_l) == (l, 1)
    if l == 1 or worth_it:
        # the axis N becomes L; positions become entries of C
        fold = l
        stride_n, stride_c, stride_l = 0, stride_c if l == 1 else 1, stride_n
        n, c, l = 1, c * l, n
    by_rows = c > 1 and (l == 1 or stride_c < stride_l)
    tile = TILE // 2 if x.itemsize == 8 else TILE
    block_c = min(triton.next_power_of_2(c), TILE_CHANNELS) if by_rows else 1
    block_l = min(triton.next_power_of_2(l), tile // block_c)
    block_n = min(triton.next_power_of_2(n), tile // (block_c * block_l))
    tiles_n, tiles_l, blocks = triton.cdiv(n, block_n), triton.cdiv(l, block_l), triton.cdiv(c, block_c)

    vec = math.gcd(16, c if by_rows else l, stride_n, stride_l if by_rows else stride_c)
    vec_c, vec_l = (vec, 1) if by_rows else (1, vec)
    arguments = {"N": n, "C": c // vec_c, "L": l // vec_l, "VEC_C": vec_c, "VEC_L": vec_l}
    arguments |= {"blocks": blocks, "tiles_l": tiles_l, "BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_L": block_l}
    arguments |= {"stride_n": stride_n // vec, "stride_c": stride_c // vec_l, "stride_l": stride_l // vec_c}
    return Tiles(fold, tiles_n * tiles_l * blocks, arguments, block_n * block_c * block_l)
