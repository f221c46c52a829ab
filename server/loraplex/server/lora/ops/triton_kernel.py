"""The two Triton kernels of the LoRA operator: shrink (x A^T into a workspace) and expand (workspace times B_t into y).

Both read their work from records in device memory, so that one captured launch serves every later step: programs of
shrink share however many units there are, and one of expand whose record is empty ends at once. Adapters are read where
they lie, by the addresses in `PackedAdapter.table`, in 64 bits throughout; no adapter is padded to another's rank.

The inner sum of shrink is divided among programs (split-K). Each writes its own part, and expand adds the parts in a
fixed order: no atomics, hence the same result to the bit in every run. How a sum is divided depends on the site and on
the segment's tile size alone, never on the rest of the batch. The grouping by segment is that of Punica's SGMV (Chen et
al., arXiv 2310.18547) and of S-LoRA's ragged ranks (Sheng et al., arXiv 2311.03285).
"""

import triton
import triton.language as tl

# A tile: tokens of one segment that are computed together. One record each, int64.
#   TABLE     address of the adapter's table on the device; SLICES  slices a site in it
#   HIDDEN    where the tile's part of the workspace begins, in float32 of one split
#   RANK_PAD  the adapter's rank, rounded up to BLOCK_R; SCALE  the segment's, as the bits of a float32
START = tl.constexpr(0)
COUNT = tl.constexpr(1)
TABLE = tl.constexpr(2)
SLICES = tl.constexpr(3)
HIDDEN = tl.constexpr(4)
RANK_PAD = tl.constexpr(5)
SCALE = tl.constexpr(6)
TILE_FIELDS = tl.constexpr(7)

# A unit of shrink: a tile's number times UNIT_RADIX plus the number of a block of BLOCK_R rows of A.
UNIT_RADIX = tl.constexpr(65536)

# Columns of PackedAdapter.table.
A = tl.constexpr(0)
B_T = tl.constexpr(1)
RANK = tl.constexpr(2)
COLUMN = tl.constexpr(3)
WIDTH = tl.constexpr(4)
FACTORS = tl.constexpr(5)
SCALED_BIAS = tl.constexpr(6)
SLICE_FIELDS = tl.constexpr(7)

# What lora.buffer.Buffer promises of every matrix, in bytes; told to the compiler, which then loads 16 at a time.
ALIGNMENT = tl.constexpr(16)


@triton.jit
def _dot(left, right, total):
    """Return total + left @ right, in float32 to the last bit that its inputs have."""
    if (left.dtype == tl.bfloat16) & (right.dtype == tl.bfloat16):
        total = tl.dot(left, right, total)
    else:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    return total


@triton.jit
def _matrix(slice_row, field: tl.constexpr, dtype: tl.constexpr):
    """Return the pointer in one field of a slice's row."""
    address = tl.multiple_of(tl.load(slice_row + field), ALIGNMENT)
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), ALIGNMENT)


@triton.jit
def _shrink_unit(
    x,
    x_stride,
    tile,
    block,
    hidden,
    hidden_size,
    site,
    in_features,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """Do one block of BLOCK_R rows of A for one tile; nothing if the tile's adapter has no such slice or rows."""
    slices = tl.load(tile + SLICES)
    position = tl.program_id(1)
    first = block * BLOCK_R
    slice_row = tl.load(tile + TABLE).to(tl.pointer_type(tl.int64)) + (site * slices + position) * SLICE_FIELDS
    rank = tl.load(slice_row + RANK, mask=position < slices, other=0)
    if first < rank:
        a = _matrix(slice_row, A, WEIGHTS)
        t = tl.arange(0, BLOCK_T)
        r = first + tl.arange(0, BLOCK_R)
        inside = t < tl.load(tile + COUNT)
        rows = x + (tl.load(tile + START) + t) * x_stride
        split = tl.program_id(2)
        total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        for k in range(0, CHUNK, BLOCK_K):
            column = split * CHUNK + k + tl.arange(0, BLOCK_K)
            known = column < in_features
            left = tl.load(rows[:, None] + column[None, :], mask=inside[:, None] & known[None, :], other=0.0)
            right = tl.load(
                a + r[None, :] * in_features + column[:, None], mask=(r < rank)[None, :] & known[:, None], other=0.0
            )
            total = _dot(left, right, total)
        pad = tl.load(tile + RANK_PAD)
        to = hidden + split.to(tl.int64) * hidden_size + tl.load(tile + HIDDEN) + position * BLOCK_T * pad
        tl.store(to + t[:, None] * pad + r[None, :], total)


# `tiles` and `units` lie in the records wherever a step's numbers put them.
@triton.jit(do_not_specialize=["site", "hidden_size"], do_not_specialize_on_alignment=["tiles", "units"])
def shrink_kernel(
    x,
    x_stride,
    tiles,
    units,
    hidden,
    hidden_size,
    site,
    in_features,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """Write hidden[split, tile, slice, t, r] = sum of x[t, k] * a[r, k] over the split's CHUNK of k.

    Grid: (any number of programs that share the units, slices, splits). `units` begins with their number; `hidden_size`
    is the float32 of one split. Columns of `hidden` from the slice's rank to the end of its last block are set to 0.
    """
    for index in range(tl.program_id(0), tl.load(units), tl.num_programs(0)):
        unit = tl.load(units + 1 + index)
        _shrink_unit(
            x,
            x_stride,
            tiles + unit // UNIT_RADIX * TILE_FIELDS,
            unit % UNIT_RADIX,
            hidden,
            hidden_size,
            site,
            in_features,
            CHUNK,
            BLOCK_T,
            BLOCK_R,
            BLOCK_K,
            WEIGHTS,
        )


@triton.jit(do_not_specialize=["site", "hidden_size"], do_not_specialize_on_alignment=["tiles"])
def expand_kernel(
    y,
    y_stride,
    tiles,
    hidden,
    hidden_size,
    site,
    out_features,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Set y[t, n] = y[t, n] * factors[n] + scale * (hidden[t] @ b_t[:, n] + scaled_bias[n]) in the slices' columns.

    Grid: (tiles, blocks of BLOCK_N columns of y). Factors are 1 and biases 0 where an adapter has none. `ALIGNED`
    promises that slices begin and end at multiples of 16 columns.
    """
    tile = tiles + tl.program_id(0) * TILE_FIELDS
    count = tl.load(tile + COUNT)
    if count == 0:
        return
    slices = tl.load(tile + SLICES)
    pad = tl.multiple_of(tl.load(tile + RANK_PAD), 16)
    scale = tl.load(tile + SCALE).to(tl.int32).to(tl.float32, bitcast=True)
    table = tl.load(tile + TABLE).to(tl.pointer_type(tl.int64)) + site * slices * SLICE_FIELDS
    size = tl.multiple_of(hidden_size.to(tl.int64), 16)
    first = tl.program_id(1) * BLOCK_N
    t = tl.arange(0, BLOCK_T)
    n = first + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    factors = tl.full((BLOCK_N,), 1.0, dtype=tl.float32)
    hits = 0
    for position in range(slices):
        slice_row = table + position * SLICE_FIELDS
        rank = tl.load(slice_row + RANK)
        start = tl.load(slice_row + COLUMN)
        width = tl.load(slice_row + WIDTH)
        if ALIGNED:
            start = tl.multiple_of(start, 16)
            width = tl.multiple_of(width, 16)
        if (rank > 0) & (start < first + BLOCK_N) & (start + width > first):
            hits += 1
            b_t = _matrix(slice_row, B_T, WEIGHTS)
            column = n - start
            known = (column >= 0) & (column < width)
            parts = hidden + tl.multiple_of(tl.load(tile + HIDDEN), 16) + position * BLOCK_T * pad
            for low in range(0, rank, BLOCK_R):
                r = low + tl.arange(0, BLOCK_R)
                at = parts + t[:, None] * pad + r[None, :]
                # shrink has written whole blocks of rows, zeros from the rank on.
                wanted = (t < count)[:, None]
                h = tl.load(at, mask=wanted, other=0.0)
                for split in tl.static_range(1, SPLITS):
                    h += tl.load(at + split * size, mask=wanted, other=0.0)
                right = tl.load(
                    b_t + r[:, None] * width + column[None, :], mask=(r < rank)[:, None] & known[None, :], other=0.0
                )
                if tl.bfloat16 == WEIGHTS:
                    # Two products in bfloat16 carry 16 bits of h: it is not rounded to the weights' 8.
                    high = h.to(tl.bfloat16)
                    total = _dot(high, right, total)
                    total = _dot((h - high.to(tl.float32)).to(tl.bfloat16), right, total)
                else:
                    total = _dot(h, right, total)
            bias = tl.load(slice_row + SCALED_BIAS)
            if bias != 0:
                total += tl.load(bias.to(tl.pointer_type(tl.float32)) + column, mask=known, other=0.0)[None, :]
            factor = tl.load(slice_row + FACTORS)
            if factor != 0:
                factors *= tl.load(factor.to(tl.pointer_type(tl.float32)) + column, mask=known, other=1.0)
    if hits == 0:
        return
    to = y + (tl.load(tile + START) + t)[:, None] * y_stride + n[None, :]
    wanted = (t < count)[:, None] & (n < out_features)[None, :]
    base = tl.load(to, mask=wanted, other=0.0).to(tl.float32)
    tl.store(to, (base * factors[None, :] + scale * total).to(y.dtype.element_ty), mask=wanted)
