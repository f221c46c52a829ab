"""Attention: the reference against torch over dense rows, the CPU's kernel against the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex.server.attention.cpu import CpuAttention
from loraplex.server.attention.interface import Attention, AttentionParams, make_attention
from loraplex.server.attention.reference import ReferenceAttention
from loraplex.server.attention.triton import TritonAttention
from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import LayerKVCache

# Largest allowed difference from the reference by the dtype of activations: rounding of sums, and for bfloat16 the
# rounding of the result to the other neighbour.
# Scores of up to 40, as here, are rounded by 4e-6 in float32, and so is what their exponentials weigh.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6}
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


@dataclass(frozen=True)
class Shape:
    """Heads, KV heads, head dimension, block size."""

    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    block: int = 4


@dataclass(frozen=True)
class Problem:
    """A batch and the cache before it; `q`, `k` and `v` for its tokens."""

    batch: Batch
    cache: LayerKVCache
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def make_batch(rows: Sequence[tuple[int, int]], tables: torch.Tensor, block: int) -> Batch:
    """Lay out (new tokens, context) per row over the given block tables."""
    slots = [
        int(tables[row, position // block]) * block + position % block
        for row, (length, context) in enumerate(rows)
        for position in range(context - length, context)
    ]
    lengths, contexts = tuple(n for n, _ in rows), tuple(c for _, c in rows)
    return Batch(
        token_ids=torch.zeros(len(slots), dtype=torch.int64),
        positions=torch.cat([torch.arange(c - n, c) for n, c in rows]),
        slot_mapping=torch.tensor(slots),
        query_start=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=tables,
        logits_indices=torch.arange(len(rows)),
        num_decodes=sum(n == 1 for n in lengths),
        query_lens_cpu=lengths,
        context_lens_cpu=contexts,
        lora=None,
    )


def problem(
    rows: Sequence[tuple[int, int]],
    shape: Shape,
    activations: torch.dtype = torch.float32,
    cached: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """Random numbers; every row's blocks lie anywhere in the cache, in any order."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-context // shape.block) for _, context in rows]
    free = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    tables = torch.zeros(len(rows), max(counts), dtype=torch.int32)
    for row, count in enumerate(counts):
        tables[row, :count] = torch.tensor([free.pop() for _ in range(count)])
    size = (sum(counts) + 3, shape.kv_heads, shape.block, shape.head_dim)
    cache = LayerKVCache(*(torch.randn(size, generator=generator).to(cached) for _ in range(2)))
    tokens = sum(n for n, _ in rows)
    q, k, v = (
        torch.randn(tokens, heads, shape.head_dim, generator=generator).to(activations)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    return Problem(make_batch(rows, tables, shape.block), cache, q, k, v)


def run(attention: Attention, p: Problem, params: AttentionParams) -> tuple[torch.Tensor, LayerKVCache]:
    """Return the result, and the cache after it; the problem's own cache stays as it is."""
    cache = LayerKVCache(p.cache.k.clone(), p.cache.v.clone())
    return attention(p.q, p.k, p.v, cache, p.batch, params), cache


def assert_same_as_reference(p: Problem, params: AttentionParams) -> None:
    expected, expected_cache = run(ReferenceAttention(), p, params)
    actual, actual_cache = run(CpuAttention(), p, params)
    assert actual.dtype is p.q.dtype
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[p.q.dtype])
    assert torch.equal(actual_cache.k, expected_cache.k)
    assert torch.equal(actual_cache.v, expected_cache.v)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_the_reference_is_torchs_attention_over_dense_rows(kv_heads: int, window: int | None) -> None:
    shape = Shape(kv_heads=kv_heads)
    length = 23
    p = problem([(length, length)], shape)
    position = torch.arange(length)
    seen = position[None, :] <= position[:, None]
    if window is not None:
        seen &= position[None, :] > position[:, None] - window
    expected = torch.nn.functional.scaled_dot_product_attention(
        p.q.transpose(0, 1),
        p.k.transpose(0, 1),
        p.v.transpose(0, 1),
        attn_mask=seen,
        scale=0.3,
        enable_gqa=True,
    ).transpose(0, 1)
    actual, _ = run(ReferenceAttention(), p, AttentionParams(0.3, window=window))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_the_reference_caps_scores() -> None:
    p = problem([(1, 3)], Shape(1, 1, 4, 4))
    _, cache = run(ReferenceAttention(), p, AttentionParams(0.5))
    block = int(p.batch.block_tables[0, 0])
    scores = (cache.k[block, 0, :3] @ p.q[0, 0]) * 0.5
    weights = (2.0 * torch.tanh(scores / 2.0)).softmax(0)
    actual, _ = run(ReferenceAttention(), p, AttentionParams(0.5, softcap=2.0))
    torch.testing.assert_close(actual[0, 0], weights @ cache.v[block, 0, :3])


PARAMS = [
    AttentionParams(0.25),
    AttentionParams(0.25, window=7),
    AttentionParams(0.25, softcap=1.5),
    AttentionParams(0.25, softcap=30.0, window=300),
]
SHAPES = [
    Shape(),
    Shape(4, 4, 8, 16),
    Shape(9, 3, 64, 16),
    Shape(5, 1, 80, 16),
    Shape(8, 1, 128, 32),
    Shape(2, 2, 3, 5),
]
# Decode rows first, contexts of one block, of one part, of several; chunks small and large, first and later.
MIXED = [
    (1, 1),
    (1, 4),
    (1, 5),
    (1, 256),
    (1, 257),
    (1, 1030),
    (2, 2),
    (7, 40),
    (20, 20),
    (80, 80),
    (100, 612),
    (5, 700),
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("activations", "cached"), DTYPES)
def test_decode_rows_and_chunks_in_one_batch(
    activations: torch.dtype, cached: torch.dtype, shape: Shape, params: AttentionParams
) -> None:
    assert_same_as_reference(problem(MIXED, shape, activations, cached), params)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_batch(data: st.DataObject) -> None:
    draw = data.draw
    kv_heads = draw(st.integers(1, 3))
    shape = Shape(kv_heads * draw(st.integers(1, 5)), kv_heads, draw(st.integers(1, 70)), draw(st.integers(1, 20)))
    contexts = draw(st.lists(st.integers(1, 600), min_size=1, max_size=6))
    rows = sorted((draw(st.one_of(st.just(1), st.integers(1, context))), context) for context in contexts)
    window = draw(st.one_of(st.none(), st.integers(1, 700)))
    softcap = draw(st.one_of(st.none(), st.floats(0.5, 50)))
    p = problem(rows, shape, *draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 1000)))
    assert_same_as_reference(p, AttentionParams(draw(st.floats(0.05, 1.0)), softcap, window))


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_chunks_give_what_one_pass_gives(params: AttentionParams) -> None:
    shape, length = Shape(), 300
    whole = problem([(length, length)], shape)
    expected, _ = run(CpuAttention(), whole, params)
    attention, cache, done, parts = CpuAttention(), whole.cache, 0, []
    for size in (1, 30, 100, 2, 150, 17):
        batch = make_batch([(size, done + size)], whole.batch.block_tables, shape.block)
        tokens = slice(done, done + size)
        parts.append(attention(whole.q[tokens], whole.k[tokens], whole.v[tokens], cache, batch, params))
        done += size
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize(("activations", "cached"), DTYPES)
def test_a_chunk_is_the_same_to_the_bit_alone_in_company_and_in_pieces(
    activations: torch.dtype, cached: torch.dtype, params: AttentionParams
) -> None:
    shape, rows = Shape(9, 3, 64, 16), [(1, 160), (40, 200), (64, 64), (170, 530)]
    p = problem(rows, shape, activations, cached)
    together, cache = run(CpuAttention(), p, params)
    start = 0
    for row, (length, context) in enumerate(rows):
        tables, first = p.batch.block_tables[row : row + 1], start
        for size in [] if length == 1 else [length] if length < 100 else [17, 64, 6, length - 87]:
            before = context - length + first - start
            piece, tokens = make_batch([(size, before + size)], tables, shape.block), slice(first, first + size)
            alone = Problem(piece, cache, p.q[tokens], p.k[tokens], p.v[tokens])
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(run(CpuAttention(), alone, params)[0], together[tokens])
            first += size
        start += length


@pytest.mark.parametrize(("activations", "cached"), DTYPES)
def test_a_decode_row_is_the_same_to_the_bit_alone_and_in_company(
    activations: torch.dtype, cached: torch.dtype
) -> None:
    shape, rows = Shape(9, 3, 64, 16), [(1, 3), (1, 160), (1, 300), (1, 2000), (40, 200)]
    p = problem(rows, shape, activations, cached)
    together, _ = run(CpuAttention(), p, AttentionParams(0.125))
    for row in range(4):
        batch = make_batch(rows[row : row + 1], p.batch.block_tables[row : row + 1], shape.block)
        alone = replace(p, batch=batch, q=p.q[row : row + 1], k=p.k[row : row + 1], v=p.v[row : row + 1])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(CpuAttention(), alone, AttentionParams(0.125))[0][0], together[row])


@pytest.mark.parametrize("attention", [CpuAttention(), ReferenceAttention()])
def test_a_row_reads_what_another_writes_in_the_same_pass(attention: Attention) -> None:
    """Two requests with one prefix: the second shares the block that the first fills in this pass."""
    shape = Shape()
    tables = torch.tensor([[2, 0], [2, 1]], dtype=torch.int32)
    shared = problem([(1, 5), (4, 4)], shape)
    batch = make_batch([(1, 5), (4, 4)], torch.tensor([[2, 1], [2, 0]], dtype=torch.int32), shape.block)
    together, _ = run(attention, replace(shared, batch=batch), AttentionParams(0.25))
    apart = make_batch([(5, 5)], tables[:1], shape.block)
    order = torch.tensor([1, 2, 3, 4, 0])
    one_row = replace(shared, batch=apart, q=shared.q[order], k=shared.k[order], v=shared.v[order])
    expected, _ = run(attention, one_row, AttentionParams(0.25))
    torch.testing.assert_close(together[order], expected, rtol=0, atol=1e-5)


def test_slices_of_a_packed_projection_are_read_in_place() -> None:
    shape = Shape()
    p = problem([(1, 9), (1, 30), (3, 8)], shape)
    packed = torch.cat([x.flatten(1) for x in (p.q, p.k, p.v)], dim=1)
    q, k, v = packed.split([shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2], dim=1)
    apart = replace(p, **{n: x.unflatten(1, (-1, shape.head_dim)) for n, x in (("q", q), ("k", k), ("v", v))})
    assert not apart.q.is_contiguous()
    params = AttentionParams(0.25)
    assert torch.equal(run(CpuAttention(), apart, params)[0], run(CpuAttention(), p, params)[0])
    strided = replace(p, q=p.q.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(run(CpuAttention(), strided, params)[0], run(CpuAttention(), p, params)[0])


def test_one_object_serves_many_layers_and_steps() -> None:
    attention, shape = CpuAttention(), Shape()
    for seed in range(3):
        step = problem([(1, 9 + seed), (2, 30)], shape, seed=seed)
        for layer in range(2):
            other = problem([(1, 9 + seed), (2, 30)], shape, seed=10 * layer + seed)
            p = replace(other, batch=step.batch)
            actual, expected = (run(a, p, AttentionParams(0.25))[0] for a in (attention, ReferenceAttention()))
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    p = problem([(1, 300), (90, 90)], Shape())
    big = replace(p, q=p.q * 300)
    assert_same_as_reference(big, AttentionParams(1.0))


def test_nan_stays_in_its_row() -> None:
    p = problem([(1, 9), (1, 9)], Shape())
    p.q[0] = float("nan")
    result, _ = run(CpuAttention(), p, AttentionParams(0.25))
    assert result[0].isnan().all()
    assert result[1].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    params, p = AttentionParams(0.25), problem([(1, 9), (2, 6)], Shape())
    batch = p.batch
    attention = CpuAttention()
    for wrong in (
        replace(p, q=p.q[:2]),
        replace(p, k=p.k[:, :1]),
        replace(p, v=p.v[..., :8]),
        replace(p, q=p.q[:, :5]),
        replace(p, k=p.k.bfloat16()),
        replace(p, cache=LayerKVCache(p.cache.k, p.cache.v.bfloat16())),
        replace(p, cache=LayerKVCache(p.cache.k.half(), p.cache.v.half())),
        replace(p, cache=LayerKVCache(p.cache.k.transpose(2, 3).contiguous().transpose(2, 3), p.cache.v)),
        replace(p, batch=replace(batch, slot_mapping=batch.slot_mapping + 1000)),
        replace(p, batch=replace(batch, slot_mapping=-1 - batch.slot_mapping)),
        replace(p, batch=replace(batch, block_tables=batch.block_tables + 100)),
        replace(p, batch=replace(batch, block_tables=batch.block_tables[:, :1])),
        replace(p, batch=replace(batch, context_lens_cpu=(9, 1))),
        replace(p, batch=replace(batch, query_lens_cpu=(1, 1))),
    ):
        before = p.cache.k.clone()
        with pytest.raises(ValueError, match=r"fit|differ|no CPU attention|within|too small"):
            attention(wrong.q, wrong.k, wrong.v, wrong.cache, wrong.batch, params)
        assert torch.equal(p.cache.k, before)


def test_the_factory_knows_devices() -> None:
    assert isinstance(make_attention(torch.device("cpu")), CpuAttention)
    assert isinstance(make_attention(torch.device("cuda")), TritonAttention)
