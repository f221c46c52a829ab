"""The Triton kernels of the product with 4-bit weights: decoded in registers, multiplied, the parts added up.

A tile of weights is OUTPUTS outputs by 2 x HALF inputs, 4 KiB of codes that lie together: byte b of an output's HALF
bytes holds the codes of inputs b (low half) and HALF + b (high half) of the tile, so that both halves meet unbroken
rows of x, and each has one scale. The weights are the left operand, whose 64 rows a Hopper GPU wants filled; tokens,
few of them, are the right one. The sum over the inputs is divided among programs in a way that follows from the
weights' shape alone, and the parts are added in a fixed order: no atomics.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "chunks", "chunks_each"])
def four_bit_kernel(
    x,
    x_stride,
    codes,
    scales,
    values,
    out,
    out_stride,
    part_size,
    tokens,
    in_features,
    out_features,
    padded_out,
    chunks,
    chunks_each,
    OUTPUTS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write out[split, t, n] = sum of x[t, k] * bfloat16(values[code[n, k]] * scale[n, k]) over the split's tiles.

    Grid: (blocks of OUTPUTS outputs, blocks of BLOCK_T tokens, splits). `scales` is (2 * chunks, padded_out) float32,
    `values` (16,) float32; `part_size` numbers lie between the splits of `out`.
    """
    block = tl.program_id(0)
    split = tl.program_id(2)
    n = tl.arange(0, OUTPUTS)
    b = tl.arange(0, HALF)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = t < tokens
    rows = x + t.to(tl.int64)[None, :] * x_stride
    total = tl.zeros((OUTPUTS, BLOCK_T), dtype=tl.float32)
    stride = padded_out.to(tl.int64)
    first = split * chunks_each
    # Looked up by shuffles among the threads of a warp: loads by address would be made asynchronous ones, 4 bytes each.
    table = tl.load(values + tl.arange(0, 16))[None, :] + tl.zeros((OUTPUTS, 16), dtype=tl.float32)
    for chunk in range(first, tl.minimum(first + chunks_each, chunks)):
        tile = codes + (block.to(tl.int64) * chunks + chunk) * (OUTPUTS * HALF)
        packed = tl.load(tile + n[:, None] * HALF + b[None, :]).to(tl.int32)
        scale = scales + stride * (2 * chunk) + block * OUTPUTS + n
        k = chunk * (2 * HALF) + b
        left = tl.gather(table, packed & 15, axis=1) * tl.load(scale)[:, None]
        right = tl.load(rows + k[:, None], mask=live[None, :] & (k < in_features)[:, None], other=0.0)
        total = tl.dot(left.to(tl.bfloat16), right, total)
        left = tl.gather(table, packed >> 4, axis=1) * tl.load(scale + stride)[:, None]
        k += HALF
        right = tl.load(rows + k[:, None], mask=live[None, :] & (k < in_features)[:, None], other=0.0)
        total = tl.dot(left.to(tl.bfloat16), right, total)
    column = block * OUTPUTS + n
    to = out + split.to(tl.int64) * part_size + t.to(tl.int64)[None, :] * out_stride + column[:, None]
    tl.store(to, total.to(out.dtype.element_ty), mask=live[None, :] & (column < out_features)[:, None])


@triton.jit(do_not_specialize=["size", "parts"])
def add_parts_kernel(parts_of, out, size, parts, BLOCK: tl.constexpr):
    """Set out[i] = sum over s of parts_of[s, i] for i < size, in the order of s. Grid: (blocks of BLOCK numbers,)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wanted = i < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(parts):
        total += tl.load(parts_of + part * size.to(tl.int64) + i, mask=wanted, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=wanted)
