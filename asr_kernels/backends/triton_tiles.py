"""How `affine_` divides a tensor: into pieces, one per program, and pieces into tiles.

A tensor is a strided (N, C, L) view. A tile is the part that a program holds in registers at a time: BLOCK_N images x
BLOCK_L positions of BLOCK_C channels. It has one channel where positions are contiguous ("planes"), many where channels
are contiguous ("rows"). Short planes, 7 x 7 or 14 x 14, fill neither a vector nor a tile: they are read as rows in
which each channel has `fold` entries, one per position.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# values per tile: 8 for each of 256 threads, 16 bytes of half precision; half as many in float64
TILE = 2048
# channels in a tile of rows: 256 contiguous bytes of half precision
TILE_CHANNELS = 128
# most tiles per program: they share one load of the factors; with more, the last programs would leave the device idle
MOST_TILES = 8
# longest plane that is read as rows, and the bytes of all images at one position that make it worthwhile
SHORT_PLANE, WORTH_FOLDING = 512, 128
# programs to aim for: several per multiprocessor of a large GPU, for any number of channels; fewer with folded planes
PROGRAMS, PROGRAMS_FOLDED = 2048, 512
# arguments that Triton does not specialise: VEC gives the divisors, and each special value would compile a new kernel
SIZES = ["N", "C", "L", "blocks", "splits_l", "tiles_n", "tiles_l"]


class Tiles(NamedTuple):
    """The division of a tensor into pieces, and the arguments that it gives the programs."""

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

    # enough pieces for the device, none of more than MOST_TILES, and rows of tiles undivided where they fit
    share = triton.cdiv(tiles_n * tiles_l * blocks, PROGRAMS if fold == 1 else PROGRAMS_FOLDED)
    share = min(share, MOST_TILES)
    share_l = min(share, tiles_l)
    share_n = min(share // share_l, tiles_n)
    splits_l = triton.cdiv(tiles_l, share_l)
    splits = triton.cdiv(tiles_n, share_n) * splits_l

    vec = math.gcd(16, c if by_rows else l, stride_n, stride_l if by_rows else stride_c)
    vec_c, vec_l = (vec, 1) if by_rows else (1, vec)
    arguments = {"N": n, "C": c // vec_c, "L": l // vec_l, "VEC_C": vec_c, "VEC_L": vec_l}
    arguments |= {"blocks": blocks, "splits_l": splits_l, "tiles_n": share_n, "tiles_l": share_l}
    arguments |= {"BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_L": block_l}
    arguments |= {"stride_n": stride_n // vec, "stride_c": stride_c // vec_l, "stride_l": stride_l // vec_c}
    return Tiles(fold, splits * blocks, arguments, block_n * block_c * block_l)


@triton.jit
def lanes_left(m_c, rest_n, rest_l, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr):
    """Mask [BLOCK_C, BLOCK_N * BLOCK_L] of a tile's lanes that hold values; rest_n images and rest_l positions remain.

    Compared in 32 bits: at full bandwidth there is time for a dozen instructions per value; comparisons in 64 bits
    take four of them instead of two.
    """
    o_t = tl.arange(0, BLOCK_N * BLOCK_L)
    m_t = o_t % BLOCK_L < tl.where(rest_l < BLOCK_L, rest_l, BLOCK_L).to(tl.int32)
    if BLOCK_N > 1:
        m_t &= o_t // BLOCK_L < tl.where(rest_n < BLOCK_N, rest_n, BLOCK_N).to(tl.int32)
    return m_c[:, None] & m_t[None, :]
