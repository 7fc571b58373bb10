"""Partial moments in Triton: sums of deviations over one piece of each channel, of one tensor or of a pair.

A chunk is what a program loads at a time: TILES tiles, all of them on their way before the first is used. The chunks of
a channel are counted from its end, because what was written last may still be in the L2 cache. A piece is every
`splits`-th chunk, so that all programs read the same part of the tensor at a time. With d = a - shift_a and
e = b - shift_b, the partial moments of a piece are four numbers, or eight for a pair:

    n    shift_a    D = sum(d)    DD = sum(d^2)    shift_b    E = sum(e)    EE = sum(e^2)    DE = sum(d e)

A shift is the mean of the piece's first tile: moments about it do not cancel, whatever the mean (Chan, Golub and
LeVeque, "Algorithms for computing the sample variance", 1983). d^2 is float32, so |d| must be in 1e-19 .. 1e19; for
float64 data all is float64.

Planes (positions are contiguous) and rows (channels are contiguous) have a kernel each. A vector has 16 bytes where the
strides allow it. Planes that start and end within a vector, 7x7 or 35x35, are read as whole vectors too; the few values
before and behind these are read one by one, afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

# sizes that Triton does not specialise: each special value would compile a new kernel
SIZES = ["C", "splits", "width", "images", "length", "magic", "bits", "stride_an", "stride_bn"]
OF_PLANES = [*SIZES, "L", "magic_less", "bits_less", "start_a", "start_b", "stride_ac", "stride_bc"]
OF_ROWS = [*SIZES, "step_a", "step_b"]


@triton.jit
def chunks_of(i_s, splits, total, CHUNK: tl.constexpr):
    """Of piece i_s of `total` vectors or rows: its chunks, how many of them are whole, and its vectors or rows."""
    chunks = (tl.cdiv(total, CHUNK) - i_s + splits - 1) // splits
    whole = (total // CHUNK - i_s + splits - 1) // splits
    return chunks, whole, chunks * CHUNK - tl.where(whole < chunks, CHUNK - total % CHUNK, 0)


@triton.jit
def offset_of(v, length, magic, bits, step, stride_n, VEC: tl.constexpr):
    """Offset in elements [BLOCK, 1] of vector or row v: a column of vectors or rows `step` apart, `length` per image.

    Below 2^31 the image v // length is found by a multiplication, because a division takes twenty instructions.
    """
    o = v * step
    if magic is not None:
        if v.dtype == tl.int64:
            i_n = v // length
        else:
            i_n = (tl.umulhi(v.to(tl.uint32), magic.to(tl.uint32)) >> bits.to(tl.uint32)).to(tl.int32)
        o += i_n * (stride_n - length.to(v.dtype) * step)
    return o.to(tl.int64)[:, None] * VEC


@triton.jit
def masks_of(v, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Which vectors or rows of the tiles of a chunk exist: in the last chunk, some have a number below 0."""
    m = ()
    for t in tl.static_range(TILES):
        m += ((v + t * BLOCK >= 0)[:, None],)  # type: ignore[assignment]
    return m


@triton.jit
def deviations(b, m, b_shift):
    """The tiles minus the shift, in its dtype, and 0 where a mask is false."""
    found = ()
    for t in tl.static_range(len(b)):
        b_d = b[t].to(b_shift.dtype) - b_shift
        # after the shift, not before
        found += (b_d if m is None else tl.where(m[t], b_d, 0.0),)
    return found


@triton.jit
def total_of(d):
    """The sum of the tiles, lane by lane."""
    b_sum = d[0]
    for t in tl.static_range(1, len(d)):
        b_sum += d[t]
    return b_sum


@triton.jit
def add_products(b_sum, d, e):
    """b_sum plus the products of the tiles, lane by lane."""
    for t in tl.static_range(len(d)):
        b_sum = tl.fma(d[t], e[t], b_sum)
    return b_sum


@triton.jit
def no_sums(BLOCK: tl.constexpr, WIDTH: tl.constexpr, SUM: tl.constexpr, PAIRED: tl.constexpr):
    """Sums of no chunk: D and DD; of a pair also E, EE and DE."""
    b_zero = tl.zeros([BLOCK, WIDTH], dtype=SUM)
    return (b_zero, b_zero, b_zero, b_zero, b_zero) if PAIRED else (b_zero, b_zero)


@triton.jit
def add_chunk(sums, d, e):
    """The sums with the deviations of one more chunk; each lane has its own."""
    found = (sums[0] + total_of(d), add_products(sums[1], d, d))
    if len(e) > 0:
        found += (sums[2] + total_of(e), add_products(sums[3], e, e), add_products(sums[4], d, e))
    return found


@triton.jit
def store_partials(p_out, layer, n, b_shift_a, b_shift_b, b_sums):
    """Write the partial moments, each `layer` elements after the one before."""
    tl.store(p_out, n)
    tl.store(p_out + layer, b_shift_a)
    tl.store(p_out + 2 * layer, b_sums[0])
    tl.store(p_out + 3 * layer, b_sums[1])
    if b_shift_b is not None:
        tl.store(p_out + 4 * layer, b_shift_b)
        tl.store(p_out + 5 * layer, b_sums[2])
        tl.store(p_out + 6 * layer, b_sums[3])
        tl.store(p_out + 7 * layer, b_sums[4])


@triton.jit
def sums_over(b, axis: tl.constexpr):
    """Every sum over an axis, or over both where axis is None."""
    found = ()
    for t in tl.static_range(len(b)):
        found += (tl.sum(b[t], axis=axis),)  # type: ignore[assignment]
    return found


@triton.jit
def read_planes(
    p, m, v, length, magic, bits, step, stride_n, BLOCK: tl.constexpr, VEC: tl.constexpr, TILES: tl.constexpr
):
    """The tiles [BLOCK, VEC] of the chunk that starts at vector v; none of no tensor."""
    b = ()
    if p is not None:
        for t in tl.static_range(TILES):
            p_t = p + offset_of(v + t * BLOCK, length, magic, bits, step, stride_n, VEC) + tl.arange(0, VEC)[None, :]
            b += (tl.load(p_t) if m is None else tl.load(p_t, mask=m[t], other=0.0),)  # type: ignore[assignment]
    return b


@triton.jit
def read_edges(p, m, i_n, o_l, stride_n, VEC: tl.constexpr):
    """A tile [BLOCK, VEC] of values before or behind the whole vectors of planes i_n, at positions o_l."""
    b = ()
    if p is not None:
        o_n = i_n.to(tl.int64) * stride_n * VEC
        b += (tl.load(p + (o_n[:, None] + o_l), mask=m, other=0.0),)  # type: ignore[assignment]
    return b


@triton.jit(do_not_specialize=OF_PLANES)
def planes_kernel(
    a_ptr,  # (N, C, L), any strides; aligned, `start` elements before the first value
    b_ptr,  # likewise, or None; its planes start in the same lanes of a vector
    partials_ptr,  # float32, or float64 for float64, [4 or 8, splits, width]
    C,
    splits,  # pieces of a channel
    width,  # of a row of partials, at least C
    images,
    L,
    length,  # whole vectors of a plane; where the first does not start at `start`, the most that a plane has
    magic,  # v // length is v * magic >> 32 + bits; None for a single plane
    bits,
    magic_less,  # the same for length - 1
    bits_less,
    start_a,
    stride_an,  # in vectors
    stride_ac,
    step_a,  # from a vector to the next, in vectors
    start_b,
    stride_bn,
    stride_bc,
    step_b,
    EDGES: tl.constexpr,  # planes may start and end within a vector
    INDEX: tl.constexpr,  # type of an offset from the channel's first value, in vectors
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    TILES: tl.constexpr,
):
    """Partial moments of one piece of one channel: of the whole vectors of its planes, then of the other values."""
    SUM: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    CHUNK: tl.constexpr = BLOCK * TILES
    # int64 before any product with a channel: offsets exceed 2^31
    i_p = tl.program_id(0)
    i_c, i_s = (i_p % C).to(tl.int64), (i_p // C).to(INDEX)
    first = start_a + i_c * stride_ac
    p_a = a_ptr + tl.cdiv(first, VEC) * VEC
    p_b = None if b_ptr is None else b_ptr + tl.cdiv(start_b + i_c * stride_bc, VEC) * VEC
    if EDGES:
        # values before the whole vectors, and behind them
        lead = (tl.cdiv(first, VEC) * VEC - first).to(tl.int32)
        less = (L - lead) // VEC < length
        length -= less.to(tl.int32)
        trail = L - lead - length * VEC
        if magic is not None:
            magic, bits = tl.where(less, magic_less, magic), tl.where(less, bits_less, bits)
    total = images.to(INDEX) * length
    chunks, whole, count = chunks_of(i_s, splits, total, CHUNK)

    # [BLOCK]
    v = total - (i_s + 1) * CHUNK + tl.arange(0, BLOCK)
    m = masks_of(v, BLOCK, TILES)
    a = read_planes(p_a, m, v, length, magic, bits, step_a, stride_an, BLOCK, VEC, TILES)
    b = read_planes(p_b, m, v, length, magic, bits, step_b, stride_bn, BLOCK, VEC, TILES)
    # the last tile is the fullest
    n_first = (tl.minimum(count, BLOCK) * VEC).to(SUM)
    shift_a = tl.sum(a[TILES - 1].to(SUM)) / n_first
    shift_b = None if b_ptr is None else tl.sum(b[TILES - 1].to(SUM)) / n_first
    sums = no_sums(BLOCK, VEC, SUM, b_ptr is not None)
    sums = add_chunk(sums, deviations(a, m, shift_a), deviations(b, m, shift_b))
    for _ in range(1, whole):
        v -= splits * CHUNK
        a_i = read_planes(p_a, None, v, length, magic, bits, step_a, stride_an, BLOCK, VEC, TILES)
        b_i = read_planes(p_b, None, v, length, magic, bits, step_b, stride_bn, BLOCK, VEC, TILES)
        sums = add_chunk(sums, deviations(a_i, None, shift_a), deviations(b_i, None, shift_b))
    for _ in range(tl.maximum(whole, 1), chunks):
        v -= splits * CHUNK
        m_i = masks_of(v, BLOCK, TILES)
        a_i = read_planes(p_a, m_i, v, length, magic, bits, step_a, stride_an, BLOCK, VEC, TILES)
        b_i = read_planes(p_b, m_i, v, length, magic, bits, step_b, stride_bn, BLOCK, VEC, TILES)
        sums = add_chunk(sums, deviations(a_i, m_i, shift_a), deviations(b_i, m_i, shift_b))
    count = count * VEC
    if EDGES:
        # [BLOCK]: the two edges of BLOCK / 2 planes
        o_e = tl.arange(0, BLOCK)
        o_n, o_v = o_e // 2, tl.arange(0, VEC)[None, :]
        o_l = tl.where((o_e % 2 == 0)[:, None], o_v - lead, length * VEC + o_v)
        m_l = o_v < tl.where(o_e % 2 == 0, lead, trail)[:, None]
        for n in range(i_s * (BLOCK // 2), images, splits * (BLOCK // 2)):
            i_n = n + o_n
            m_n = m_l & (i_n < images)[:, None]
            a_n = read_edges(p_a, m_n, i_n, o_l, stride_an, VEC)
            b_n = read_edges(p_b, m_n, i_n, o_l, stride_bn, VEC)
            sums = add_chunk(sums, deviations(a_n, (m_n,), shift_a), deviations(b_n, (m_n,), shift_b))
            count += tl.minimum(images - n, BLOCK // 2) * (lead + trail)

    p_out = partials_ptr + i_s.to(tl.int64) * width + i_c
    layer = splits.to(tl.int64) * width
    store_partials(p_out, layer, count.to(SUM), shift_a, shift_b, sums_over(sums, None))


@triton.jit
def read_rows(
    p, m_c, m, v, length, magic, bits, step, stride_n, BLOCK: tl.constexpr, VEC: tl.constexpr, TILES: tl.constexpr
):
    """The tiles [BLOCK, WIDTH] of the chunk that starts at row v. Lanes of channels that do not exist are undefined."""
    b = ()
    if p is not None:
        for t in tl.static_range(TILES):
            p_t = p + offset_of(v + t * BLOCK, length, magic, bits, step, stride_n, VEC)
            b += (tl.load(p_t, mask=m_c) if m is None else tl.load(p_t, mask=m_c & m[t], other=0.0),)  # type: ignore[assignment]
    return b


@triton.jit(do_not_specialize=OF_ROWS)
def rows_kernel(
    a_ptr,  # (N, C, L), any strides
    b_ptr,  # (N, C, L), any strides, or None
    partials_ptr,  # float32, or float64 for float64, [4 or 8, splits, width]
    C,  # in vectors of VEC
    splits,  # pieces of a channel
    width,  # of a row of partials, a multiple of WIDTH
    images,
    length,  # rows of an image
    magic,  # v // length is v * magic >> 32 + bits; None for a single image
    bits,
    stride_an,  # in vectors
    stride_ac,
    step_a,  # from a row to the next, in vectors
    stride_bn,
    stride_bc,
    step_b,
    INDEX: tl.constexpr,  # type of a row's offset, in vectors
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    TILES: tl.constexpr,
):
    """Partial moments of one piece of WIDTH channels; a tile is [BLOCK, WIDTH], BLOCK positions of any images."""
    SUM: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    CHUNK: tl.constexpr = BLOCK * TILES
    # int64 before any product with a channel: offsets exceed 2^31
    i_p, blocks = tl.program_id(0), width // WIDTH
    i_c, i_s = (i_p % blocks).to(tl.int64), (i_p // blocks).to(INDEX)
    total = images.to(INDEX) * length
    chunks, whole, count = chunks_of(i_s, splits, total, CHUNK)
    # [WIDTH]
    o_c = i_c * WIDTH + tl.arange(0, WIDTH)
    m_c = (o_c < C.to(tl.int64) * VEC)[None, :]
    p_a = a_ptr + (o_c * stride_ac)[None, :]
    p_b = None if b_ptr is None else b_ptr + (o_c * stride_bc)[None, :]

    # [BLOCK]
    v = total - (i_s + 1) * CHUNK + tl.arange(0, BLOCK)
    m = masks_of(v, BLOCK, TILES)
    a = read_rows(p_a, m_c, m, v, length, magic, bits, step_a, stride_an, BLOCK, VEC, TILES)
    b = read_rows(p_b, m_c, m, v, length, magic, bits, step_b, stride_bn, BLOCK, VEC, TILES)
    n_first = tl.minimum(count, BLOCK).to(SUM)
    b_shift_a = tl.sum(a[TILES - 1].to(SUM), axis=0, keep_dims=True) / n_first
    b_shift_b = None if b_ptr is None else tl.sum(b[TILES - 1].to(SUM), axis=0, keep_dims=True) / n_first
    sums = add_chunk(
        no_sums(BLOCK, WIDTH, SUM, b_ptr is not None), deviations(a, m, b_shift_a), deviations(b, m, b_shift_b)
    )
    for _ in range(1, whole):
        v -= splits * CHUNK
        a_i = read_rows(p_a, m_c, None, v, length, magic, bits, step_a, stride_an, BLOCK, VEC, TILES)
        b_i = read_rows(p_b, m_c, None, v, length, magic, bits, step_b, stride_bn, BLOCK, VEC, TILES)
        sums = add_chunk(sums, deviations(a_i, None, b_shift_a), deviations(b_i, None, b_shift_b))
    for _ in range(tl.maximum(whole, 1), chunks):
        v -= splits * CHUNK
        m_i = masks_of(v, BLOCK, TILES)
        a_i = read_rows(p_a, m_c, m_i, v, length, magic, bits, step_a, stride_an, BLOCK, VEC, TILES)
        b_i = read_rows(p_b, m_c, m_i, v, length, magic, bits, step_b, stride_bn, BLOCK, VEC, TILES)
        sums = add_chunk(sums, deviations(a_i, m_i, b_shift_a), deviations(b_i, m_i, b_shift_b))

    p_out = partials_ptr + i_s.to(tl.int64) * width + o_c
    layer = splits.to(tl.int64) * width
    b_n = tl.zeros([WIDTH], dtype=SUM) + (count * 1.0).to(SUM)
    b_shift_a = tl.reshape(b_shift_a, [WIDTH])
    b_shift_b = None if b_ptr is None else tl.reshape(b_shift_b, [WIDTH])
    store_partials(p_out, layer, b_n, b_shift_a, b_shift_b, sums_over(sums, 0))
