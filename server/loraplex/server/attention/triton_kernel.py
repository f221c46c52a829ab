"""The Triton kernels of attention over the paged cache: write, decode in parts, put parts together, prompts.

The query heads that share a KV head are computed together, as rows of one tile, so that a key comes from memory once.
The softmax is computed on the way, as in FlashAttention (Dao et al., arXiv 2205.14135); a decode row's context is
divided among programs, as in Flash-Decoding (Dao et al., 2023). How it is divided follows from the row's own context,
never from its neighbours', and the parts are added in a fixed order. Offsets into cache and activations have 64 bits.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# The largest score of no scores: finite, so that its difference to itself is 0.
EMPTY = tl.constexpr(-1.0e30)


@triton.jit
def _dot(left, right, total):
    """Return total + left @ right: bfloat16 by tensor cores, anything else in float32; the sum in float32."""
    if (left.dtype == tl.bfloat16) & (right.dtype == tl.bfloat16):
        total = tl.dot(left, right, total)
    else:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    return total


@triton.jit
def _attend(
    q,
    own,
    low,
    high,
    table,
    k_cache,
    v_cache,
    kv_head,
    kv_heads,
    scale,
    softcap,
    window,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Return for the queries q (M, BLOCK_D), at positions `own` (M,), over the keys at positions low:high what is seen.

    Returns:
        The sums of the values (M, BLOCK_D), weighted by 2^(score - largest); the largest score (M,), in powers of two;
        the sum of the weights (M,).
    """
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((q.shape[0], BLOCK_D), dtype=tl.float32)
    largest = tl.full((q.shape[0],), EMPTY, dtype=tl.float32)
    weight = tl.zeros((q.shape[0],), dtype=tl.float32)
    for first in range(low, high, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        there = position < high
        page = tl.load(table + position // PAGE, mask=there, other=0).to(tl.int64)
        at = ((page * kv_heads + kv_head) * PAGE + position % PAGE) * HEAD_DIM
        wanted = there[:, None] & (d < HEAD_DIM)[None, :]
        keys = tl.load(k_cache + at[:, None] + d[None, :], mask=wanted, other=0.0)
        scores = _dot(q, tl.trans(keys), tl.zeros((q.shape[0], BLOCK_N), dtype=tl.float32)) * scale
        if CAPPED:
            # tanh by way of exp, which ends at 0 or infinity where it leaves its range, as it should here.
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        seen = there[None, :] & (position[None, :] <= own[:, None])
        if WINDOWED:
            seen = seen & (position[None, :] > own[:, None] - window)
        scores = tl.where(seen, scores * LOG2_E, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        shrunk = tl.exp2(largest - larger)
        p = tl.exp2(scores - larger[:, None])
        weight = weight * shrunk + tl.sum(p, axis=1)
        values = tl.load(v_cache + at[:, None] + d[None, :], mask=wanted, other=0.0)
        if q.dtype == tl.bfloat16:
            p = p.to(tl.bfloat16)
        total = _dot(p, values, total * shrunk[:, None])
        largest = larger
    return total, largest, weight


@triton.jit
def _part_length(seen, PART: tl.constexpr, MAX_PARTS: tl.constexpr):
    """Return how many of a row's `seen` tokens are one part: multiples of PART, MAX_PARTS parts at most."""
    return tl.cdiv(tl.cdiv(seen, PART), MAX_PARTS) * PART


@triton.jit
def write_kernel(
    k,
    k_stride,
    v,
    v_stride,
    slots,
    k_cache,
    v_cache,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Copy the heads of one token to its slot in the cache. Grid: (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    h = tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    wanted = (h < HEADS) & (d < HEAD_DIM)
    to = ((slot // PAGE * HEADS + h) * PAGE + slot % PAGE) * HEAD_DIM + d
    key = tl.load(k + token * k_stride + h * HEAD_DIM + d, mask=wanted)
    value = tl.load(v + token * v_stride + h * HEAD_DIM + d, mask=wanted)
    tl.store(k_cache + to, key.to(k_cache.dtype.element_ty), mask=wanted)
    tl.store(v_cache + to, value.to(v_cache.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["table_stride", "window"])
def decode_kernel(
    q,
    q_stride,
    k_cache,
    v_cache,
    tables,
    table_stride,
    contexts,
    sums,
    weights,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PART: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """Attend to one part of a decode row's context. Grid: (rows, KV heads, parts); token and row have one number.

    Writes to `sums` (rows, heads, parts, HEAD_DIM) and `weights` (rows, heads, parts, 2: largest score, weight).
    """
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    context = tl.load(contexts + row)
    oldest = 0
    if WINDOWED:
        oldest = tl.maximum(context - window, 0)
    length = _part_length(context - oldest, PART, MAX_PARTS)
    low = oldest + tl.program_id(2) * length
    if low >= context:
        return
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + m
    wanted = (m < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    query = tl.load(q + row * q_stride + head[:, None] * HEAD_DIM + d[None, :], mask=wanted, other=0.0)
    total, largest, weight = _attend(
        query,
        tl.zeros((BLOCK_M,), dtype=tl.int32) + (context - 1),
        low,
        tl.minimum(low + length, context),
        tables + row * table_stride,
        k_cache,
        v_cache,
        kv_head,
        tl.num_programs(1),
        scale,
        softcap,
        window,
        BLOCK_N,
        HEAD_DIM,
        BLOCK_D,
        PAGE,
        CAPPED,
        WINDOWED,
    )
    part = (row * tl.num_programs(1) * GROUP + head) * tl.num_programs(2) + tl.program_id(2)
    tl.store(sums + part[:, None] * HEAD_DIM + d[None, :], total, mask=wanted)
    tl.store(weights + part * 2, largest, mask=m < GROUP)
    tl.store(weights + part * 2 + 1, weight, mask=m < GROUP)


@triton.jit(do_not_specialize=["window", "parts"])
def reduce_kernel(
    out,
    contexts,
    sums,
    weights,
    parts,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr,
    PART: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """Put the parts of a decode row's head together; there is memory for `parts` of each. Grid: (rows, heads)."""
    row = tl.program_id(0).to(tl.int64)
    at = row * tl.num_programs(1) + tl.program_id(1)
    seen = tl.load(contexts + row)
    if WINDOWED:
        seen = tl.minimum(seen, window)
    length = _part_length(seen, PART, MAX_PARTS)
    part = tl.arange(0, MAX_PARTS)
    d = tl.arange(0, BLOCK_D)
    # An empty row (length 0) has no parts; a live one has at most `parts`.
    live = part * length < seen
    largest = tl.load(weights + (at * parts + part) * 2, mask=live, other=EMPTY)
    weight = tl.load(weights + (at * parts + part) * 2 + 1, mask=live, other=0.0)
    share = tl.exp2(largest - tl.max(largest, axis=0))
    total = tl.load(
        sums + (at * parts + part)[:, None] * HEAD_DIM + d[None, :],
        mask=live[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    result = tl.sum(total * share[:, None], axis=0) / tl.sum(weight * share, axis=0)
    tl.store(out + at * HEAD_DIM + d, result.to(out.dtype.element_ty), mask=d < HEAD_DIM)


@triton.jit(do_not_specialize=["table_stride", "window", "first_row"])
def prompt_kernel(
    q,
    q_stride,
    k_cache,
    v_cache,
    tables,
    table_stride,
    contexts,
    starts,
    out,
    first_row,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Attend for BLOCK_M // GROUP tokens of one row. Grid: (such tiles of the longest row, KV heads, rows).

    Rows are counted from `first_row` on; a row's tokens are starts[row]:starts[row + 1] and the last of its context.
    """
    row = (first_row + tl.program_id(2)).to(tl.int64)
    kv_head = tl.program_id(1)
    start = tl.load(starts + row)
    length = tl.load(starts + row + 1) - start
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    first = tl.program_id(0) * TOKENS
    if first >= length:
        return
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    token = first + m // GROUP
    live = (m < TOKENS * GROUP) & (token < length)
    before = tl.load(contexts + row) - length
    own = tl.where(live, before + token, -1)
    last = before + tl.minimum(first + TOKENS, length) - 1
    oldest = 0
    if WINDOWED:
        oldest = tl.maximum(before + first - window + 1, 0)
    index = (start + token).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    wanted = live[:, None] & (d < HEAD_DIM)[None, :]
    query = tl.load(q + (index * q_stride + head * HEAD_DIM)[:, None] + d[None, :], mask=wanted, other=0.0)
    total, _, weight = _attend(
        query,
        own,
        oldest,
        last + 1,
        tables + row * table_stride,
        k_cache,
        v_cache,
        kv_head,
        tl.num_programs(1),
        scale,
        softcap,
        window,
        BLOCK_N,
        HEAD_DIM,
        BLOCK_D,
        PAGE,
        CAPPED,
        WINDOWED,
    )
    at = (index * (tl.num_programs(1) * GROUP) + head) * HEAD_DIM
    result = total / tl.where(live, weight, 1.0)[:, None]
    tl.store(out + at[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=wanted)
