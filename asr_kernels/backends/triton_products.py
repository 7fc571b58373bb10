"""The kernel that multiplies convolution patches: read from the tensors in their own layout, on tensor cores.

A program computes one tile of the products, BLOCK_K x BLOCK_K, over one piece of the patches: a range of images x a
range of output rows. The pieces are added in float64, in a fixed order. Of a symmetric product, only tiles on and above
the diagonal are computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import Launch

# values of a patch in a tile, at most, and patches read at a time: tl.dot takes no fewer than 16
TILE_K, TILE_M = 64, 16
# programs to aim for: several per multiprocessor of a large GPU
PROGRAMS = 512
# patches per piece: a program adds at most MOST_PATCHES / TILE_M float32 values to a sum before the sum in float64, a
# typical error of 3e-7; it reads at least 8 times as many bytes as it writes
FEWEST_PATCHES, MOST_PATCHES = 256, 8192
# three products of TF32 parts on NVIDIA; AMD's matrix units multiply float32
PRECISION = "ieee" if torch.version.hip else "tf32x3"
# arguments that Triton does not specialise: each special value would compile a new kernel
SIZES = ["top_a", "top_b", "left_a", "left_b", "images", "rows", "columns", "groups", "tiles"]
SIZES += ["tiles_b", "pieces_h", "piece_n", "piece_h", "height_a", "height_b", "width_a", "width_b"]


@triton.jit
def along(o, FIRST: tl.constexpr):
    """A vector along the first or the last axis of a tile."""
    return o[:, None] if FIRST else o[None, :]


@triton.jit
def tile_of(i, tiles):
    """Row and column of tile i of an upper triangle; its first and its last row have tiles | 1 tiles together."""
    r, c = (i // (tiles | 1)).to(tl.int64), (i % (tiles | 1)).to(tl.int64)
    rest = c - (tiles - r)
    i_a = tl.where(rest < 0, r, tiles - 1 + tiles % 2 - r)
    return i_a, tl.where(rest < 0, r + c, i_a + rest)


@triton.jit
def lanes_of(
    shift_ptr,
    i_g,
    i_k,
    channels,
    stride_c,
    left,
    TAPS: tl.constexpr,
    SPREAD: tl.constexpr,
    WHOLE: tl.constexpr,
    LAST: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """For tile i_k of group i_g: offsets of the channels, mask, shifts, and the input columns of the taps."""
    o_k = (i_k * BLOCK_K).to(tl.int32) + tl.arange(0, BLOCK_K)
    m_k = o_k < channels * TAPS
    # one tap where WHOLE, a number; else a vector
    i_tap = ((i_k * BLOCK_K).to(tl.int32) if WHOLE else o_k) // channels
    o_c = o_k - i_tap * channels
    o_tap = i_tap * SPREAD + left
    if not WHOLE:
        o_tap = along(o_tap, not LAST)
    b_shift = tl.load(shift_ptr + i_g * channels + o_c, mask=m_k, other=0.0)
    return along(o_c.to(INDEX) * stride_c, not LAST), along(m_k, not LAST), along(b_shift, not LAST), o_tap


@triton.jit
def deviations(
    ptr,
    o_c,
    m_k,
    b_shift,
    o_tap,
    o_n,
    o_h,
    o_w,
    m_m,
    stride_n,
    stride_h,
    stride_w,
    height,
    width,
    top,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    LAST: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Values minus shifts, float32 [BLOCK_K, BLOCK_M]; 0 - shift in the padding, 0 beyond the last patch."""
    i_h = o_h * STEP_H + top
    i_w = along(o_w * STEP_W, LAST) + o_tap
    m = along(m_m & (i_h >= 0) & (i_h < height), LAST) & (i_w >= 0) & (i_w < width) & m_k
    o_m = o_n.to(INDEX) * stride_n + i_h.to(INDEX) * stride_h
    o = o_c + (along(o_m, LAST) + i_w.to(INDEX) * stride_w)
    b = tl.load(ptr + o, mask=m, other=0.0).to(tl.float32) - b_shift
    b = tl.where(along(m_m, LAST), b, 0.0)
    return tl.trans(b) if LAST else b


@triton.jit(do_not_specialize=SIZES)
def products_kernel(
    a_ptr,  # (N, groups * channels_a, height_a, width_a), any strides; b likewise
    b_ptr,
    shift_a_ptr,  # float32, one for each channel
    shift_b_ptr,
    partials_ptr,  # float32 [pieces, groups, TAPS_A * channels_a, TAPS_B * channels_b]
    stride_an,
    stride_ac,
    stride_ah,
    stride_aw,
    stride_bn,
    stride_bc,
    stride_bh,
    stride_bw,
    channels_a,  # of a group
    channels_b,
    height_a,
    height_b,
    width_a,
    width_b,
    top_a,  # row and column of the input at the first row and column of the output: negative in the padding
    top_b,
    left_a,
    left_b,
    images,
    rows,  # of the output
    columns,
    groups,
    tiles,  # of the product
    tiles_b,  # in one row of tiles
    pieces_h,  # ranges of rows
    piece_n,  # images and rows of a piece
    piece_h,
    SYMMETRIC: tl.constexpr,  # a and b are the same
    TAPS_A: tl.constexpr,  # along a row
    TAPS_B: tl.constexpr,
    SPREAD_A: tl.constexpr,  # distance of the taps
    SPREAD_B: tl.constexpr,
    STEP_AH: tl.constexpr,  # distance of the patches
    STEP_AW: tl.constexpr,
    STEP_BH: tl.constexpr,
    STEP_BW: tl.constexpr,
    WHOLE_A: tl.constexpr,  # each tile lies in one tap
    WHOLE_B: tl.constexpr,
    LAST_A: tl.constexpr,  # channels are contiguous
    LAST_B: tl.constexpr,
    INDEX: tl.constexpr,  # type of offsets within a piece
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One tile of sum((a - shift_a) (b - shift_b)^T) over the patches of one piece, in float32.

    `tl.dot` adds the products of BLOCK_M patches to 0, and their sum to the others by a float32 addition: the rounding
    of the tensor cores, towards 0, does not grow with the number of patches.
    """
    # int64 before any product: offsets exceed 2^31. Divide before: a 64-bit division would be a function call
    i_p = tl.program_id(0)
    i_t, i_p = i_p % tiles, i_p // tiles
    i_g, i_s = (i_p % groups).to(tl.int64), i_p // groups
    n_start, h_start = (i_s // pieces_h).to(tl.int64) * piece_n, (i_s % pieces_h).to(tl.int64) * piece_h
    if SYMMETRIC:
        i_a, i_b = tile_of(i_t, tiles_b)
    else:
        i_a, i_b = (i_t // tiles_b).to(tl.int64), (i_t % tiles_b).to(tl.int64)
    plane = tl.minimum(rows - h_start, piece_h).to(tl.int32) * columns
    count = tl.minimum(images - n_start, piece_n).to(tl.int32) * plane

    o_ac, m_a, b_shift_a, o_tap_a = lanes_of(
        shift_a_ptr, i_g, i_a, channels_a, stride_ac, left_a, TAPS_A, SPREAD_A, WHOLE_A, LAST_A, INDEX, BLOCK_K
    )
    o_bc, m_b, b_shift_b, o_tap_b = lanes_of(
        shift_b_ptr, i_g, i_b, channels_b, stride_bc, left_b, TAPS_B, SPREAD_B, WHOLE_B, LAST_B, INDEX, BLOCK_K
    )
    p_a = a_ptr + n_start * stride_an + i_g * channels_a * stride_ac
    p_b = b_ptr + n_start * stride_bn + i_g * channels_b * stride_bc
    b_sum = tl.zeros([BLOCK_K, BLOCK_K], dtype=tl.float32)
    for i in range(0, count, BLOCK_M):
        # [BLOCK_M] patches of the piece: image, row and column
        o_m = i + tl.arange(0, BLOCK_M)
        m_m = o_m < count
        o_n = o_m // plane
        o_m -= o_n * plane
        o_h = o_m // columns
        o_w = o_m - o_h * columns
        o_h += h_start.to(tl.int32)
        # [BLOCK_K, BLOCK_M]
        b_a = deviations(
            *(p_a, o_ac, m_a, b_shift_a, o_tap_a, o_n, o_h, o_w, m_m, stride_an, stride_ah, stride_aw),
            *(height_a, width_a, top_a, STEP_AH, STEP_AW, LAST_A, INDEX),
        )
        b_b = deviations(
            *(p_b, o_bc, m_b, b_shift_b, o_tap_b, o_n, o_h, o_w, m_m, stride_bn, stride_bh, stride_bw),
            *(height_b, width_b, top_b, STEP_BH, STEP_BW, LAST_B, INDEX),
        )
        b_sum = tl.dot(b_a, tl.trans(b_b), b_sum, input_precision=PRECISION)

    K_a, K_b = channels_a * TAPS_A, channels_b * TAPS_B
    o_a, o_b = i_a * BLOCK_K + tl.arange(0, BLOCK_K), i_b * BLOCK_K + tl.arange(0, BLOCK_K)
    p_out = partials_ptr + ((i_s.to(tl.int64) * groups + i_g) * K_a + o_a[:, None]) * K_b + o_b[None, :]
    tl.store(p_out, b_sum, mask=(o_a < K_a)[:, None] & (o_b < K_b)[None, :])


class Read(NamedTuple):
    """What the taps of one row of a window read: for output row h and column w, row top + h * step, and so on."""

    x: Tensor  # (N, C, H, W)
    shift: Tensor  # float32 (C,)
    top: int
    left: int = 0
    step: tuple[int, ...] = (1, 1)
    taps: int = 1
    spread: int = 1

    def arguments(self, name: str, groups: int, block: int) -> dict[str, Any]:
        """The arguments of the kernel that describe this operand, `name`."""
        channels, big = self.x.shape[1] // groups, name.upper()
        found = {f"{name}_ptr": self.x, f"shift_{name}_ptr": self.shift, f"channels_{name}": channels}
        found |= {f"stride_{name}{axis}": stride for axis, stride in zip("nchw", self.x.stride(), strict=True)}
        found |= {f"height_{name}": self.x.shape[2], f"width_{name}": self.x.shape[3]}
        found |= {f"top_{name}": self.top, f"left_{name}": self.left, f"TAPS_{big}": self.taps}
        found |= {f"SPREAD_{big}": self.spread, f"STEP_{big}H": self.step[0], f"STEP_{big}W": self.step[1]}
        whole, last = self.taps == 1 or channels % block == 0, self.x.stride(1) == 1 and channels > 1
        return found | {f"WHOLE_{big}": whole, f"LAST_{big}": last}

    def reach(self, images: int, groups: int) -> int:
        """A bound of the offsets, in elements, within one group of so many images."""
        sizes = (images, self.x.shape[1] // groups, *self.x.shape[2:])
        return sum(size * stride for size, stride in zip(sizes, self.x.stride(), strict=True))


def plan_products(a: Read, b: Read, rows: int, columns: int, groups: int) -> tuple[Launch, Tensor]:
    """The launch that multiplies what a and b read for an output of rows x columns; and its partial sums.

    Partial sums: float32 [pieces, G, K of a, K of b]. Values of a patch are in the order (tap, channel). Where a is b,
    those below the diagonal are not written.
    """
    images = len(a.x)
    K_a, K_b = (each.x.shape[1] // groups * each.taps for each in (a, b))
    block = min(max(triton.next_power_of_2(max(K_a, K_b)), 16), TILE_K)
    tiles_a, tiles_b = triton.cdiv(K_a, block), triton.cdiv(K_b, block)
    tiles = tiles_b * (tiles_b + 1) // 2 if a is b else tiles_a * tiles_b
    patches = images * rows * columns
    pieces = min(triton.cdiv(PROGRAMS, tiles * groups), triton.cdiv(patches, FEWEST_PATCHES))
    pieces = max(pieces, triton.cdiv(patches, MOST_PATCHES))
    piece_n = triton.cdiv(images, min(pieces, images))
    pieces_n = triton.cdiv(images, piece_n)
    piece_h = triton.cdiv(rows, min(triton.cdiv(pieces, pieces_n), rows))
    pieces_h = triton.cdiv(rows, piece_h)
    wide = max(each.reach(piece_n, groups) for each in (a, b)) >= 2**31

    partials = torch.empty((pieces_n * pieces_h, groups, K_a, K_b), dtype=torch.float32, device=a.x.device)
    arguments = a.arguments("a", groups, block) | b.arguments("b", groups, block) | {"partials_ptr": partials}
    arguments |= {"images": images, "rows": rows, "columns": columns, "groups": groups, "tiles": tiles}
    arguments |= {"tiles_b": tiles_b, "pieces_h": pieces_h, "piece_n": piece_n, "piece_h": piece_h}
    arguments |= {"SYMMETRIC": a is b, "INDEX": tl.int64 if wide else tl.int32, "PRECISION": PRECISION}
    arguments |= {"BLOCK_K": block, "BLOCK_M": TILE_M}
    return Launch(products_kernel, (tiles * groups * len(partials),), arguments, block * TILE_M // 8), partials
