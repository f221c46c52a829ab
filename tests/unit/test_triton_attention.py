"""The Triton attention kernels against the reference: in Triton's interpreter where there is no GPU.

The short form runs by default; the whole product of shapes is marked long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex.server.attention import triton_kernel
from loraplex.server.attention.interface import Attention, AttentionParams
from loraplex.server.attention.reference import ReferenceAttention
from loraplex.server.attention.triton import MAX_PARTS, PART, TritonAttention
from loraplex.server.engine.kv_cache import LayerKVCache
from tests.triton_interpreter import DEVICE
from tests.unit.test_attention import DTYPES, MIXED, PARAMS, SHAPES, Problem, Shape, make_batch, run
from tests.unit.test_attention import problem as host_problem

# Largest allowed difference from the reference by the dtype of activations; in bfloat16 the softmax weights are rounded
# too, and the result may be to the other neighbour.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2**-5}
KERNELS = ("write_kernel", "decode_kernel", "reduce_kernel", "prompt_kernel")


def moved(p: Problem) -> Problem:
    """Return the problem on the device that kernels run on."""
    cache = LayerKVCache(p.cache.k.to(DEVICE), p.cache.v.to(DEVICE))
    return Problem(p.batch.to(DEVICE), cache, p.q.to(DEVICE), p.k.to(DEVICE), p.v.to(DEVICE))


def problem(*arguments: Any, **options: Any) -> Problem:
    return moved(host_problem(*arguments, **options))


def assert_same_as_reference(p: Problem, params: AttentionParams) -> None:
    expected, expected_cache = run(ReferenceAttention(), p, params)
    actual, actual_cache = run(TritonAttention(), p, params)
    assert actual.dtype is p.q.dtype
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[p.q.dtype])
    assert torch.equal(actual_cache.k, expected_cache.k)
    assert torch.equal(actual_cache.v, expected_cache.v)


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize(("activations", "cached"), DTYPES)
def test_decode_rows_and_chunks_in_one_batch(
    activations: torch.dtype, cached: torch.dtype, params: AttentionParams
) -> None:
    rows = [(1, 1), (1, 4), (1, 130), (2, 2), (7, 40), (70, 90)]
    assert_same_as_reference(problem(rows, Shape(9, 3, 64, 16), activations, cached), params)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layout_of_heads(shape: Shape) -> None:
    assert_same_as_reference(problem([(1, 300), (5, 33)], shape), AttentionParams(0.25, softcap=9.0, window=31))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("activations", "cached"), DTYPES)
def test_every_layout_in_one_batch(
    activations: torch.dtype, cached: torch.dtype, shape: Shape, params: AttentionParams
) -> None:
    assert_same_as_reference(problem(MIXED, shape, activations, cached), params)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_batch(data: st.DataObject) -> None:
    draw = data.draw
    kv_heads = draw(st.integers(1, 2))
    shape = Shape(kv_heads * draw(st.integers(1, 5)), kv_heads, draw(st.integers(1, 70)), draw(st.integers(1, 20)))
    contexts = draw(st.lists(st.integers(1, 300), min_size=1, max_size=3))
    rows = sorted((draw(st.one_of(st.just(1), st.integers(1, context))), context) for context in contexts)
    window = draw(st.one_of(st.none(), st.integers(1, 400)))
    softcap = draw(st.one_of(st.none(), st.floats(0.5, 50)))
    p = problem(rows, shape, *draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 1000)))
    assert_same_as_reference(p, AttentionParams(draw(st.floats(0.05, 1.0)), softcap, window))


@pytest.mark.parametrize("window", [None, PART + 5])
def test_contexts_longer_than_the_parts_are_many(window: int | None) -> None:
    longest = PART * MAX_PARTS + 1
    p = problem([(1, longest), (1, PART + 1)], Shape(2, 1, 16, 16))
    assert_same_as_reference(p, AttentionParams(0.25, window=window))


def test_chunks_give_what_one_pass_gives() -> None:
    shape, length, params = Shape(), 90, AttentionParams(0.25, window=50)
    whole = problem([(length, length)], shape)
    expected, _ = run(TritonAttention(), whole, params)
    attention, cache, done, parts = TritonAttention(), whole.cache, 0, []
    for size in (1, 30, 2, 57):
        batch = make_batch([(size, done + size)], whole.batch.block_tables.cpu(), shape.block).to(DEVICE)
        tokens = slice(done, done + size)
        parts.append(attention(whole.q[tokens], whole.k[tokens], whole.v[tokens], cache, batch, params))
        done += size
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("activations", "cached"), DTYPES)
def test_a_row_is_the_same_to_the_bit_alone_in_company_and_again(activations: torch.dtype, cached: torch.dtype) -> None:
    shape, rows = Shape(6, 3, 32, 16), [(1, 3), (1, 160), (1, 600), (40, 70)]
    p = problem(rows, shape, activations, cached)
    params = AttentionParams(0.125)
    together, _ = run(TritonAttention(), p, params)
    assert torch.equal(run(TritonAttention(), p, params)[0], together)
    starts = p.batch.query_start.tolist()
    for row in range(len(rows)):
        batch = make_batch(rows[row : row + 1], p.batch.block_tables[row : row + 1].cpu(), shape.block).to(DEVICE)
        tokens = slice(starts[row], starts[row + 1])
        alone = replace(p, batch=batch, q=p.q[tokens], k=p.k[tokens], v=p.v[tokens])
        assert torch.equal(run(TritonAttention(), alone, params)[0], together[tokens])


def test_a_row_reads_what_another_writes_in_the_same_pass() -> None:
    shape = Shape()
    shared = problem([(1, 5), (4, 4)], shape)
    batch = make_batch([(1, 5), (4, 4)], torch.tensor([[2, 1], [2, 0]], dtype=torch.int32), shape.block).to(DEVICE)
    together, _ = run(TritonAttention(), replace(shared, batch=batch), AttentionParams(0.25))
    expected, _ = run(ReferenceAttention(), replace(shared, batch=batch), AttentionParams(0.25))
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-5)


def test_slices_of_a_packed_projection_are_read_in_place() -> None:
    shape = Shape()
    p = problem([(1, 9), (1, 30), (3, 8)], shape)
    packed = torch.cat([x.flatten(1) for x in (p.q, p.k, p.v)], dim=1)
    q, k, v = packed.split([shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2], dim=1)
    apart = replace(p, **{n: x.unflatten(1, (-1, shape.head_dim)) for n, x in (("q", q), ("k", k), ("v", v))})
    assert not apart.q.is_contiguous()
    params = AttentionParams(0.25)
    assert torch.equal(run(TritonAttention(), apart, params)[0], run(TritonAttention(), p, params)[0])
    strided = replace(p, q=p.q.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(run(TritonAttention(), strided, params)[0], run(TritonAttention(), p, params)[0])


@pytest.mark.filterwarnings("ignore:overflow")
def test_large_scores_neither_overflow_nor_vanish() -> None:
    p = problem([(1, 300), (20, 20)], Shape())
    big = replace(p, q=p.q * 300)
    assert_same_as_reference(big, AttentionParams(1.0))
    assert_same_as_reference(big, AttentionParams(1.0, softcap=20.0))


def test_nan_stays_in_its_row() -> None:
    p = problem([(1, 9), (1, 9), (3, 9), (3, 9)], Shape())
    p.q[0] = float("nan")
    p.q[3] = float("nan")
    result, _ = run(TritonAttention(), p, AttentionParams(0.25))
    assert result.isnan().flatten(1).all(1).tolist() == [True, False, False, True, *[False] * 4]
    assert result[[1, 2, 4, 5, 6, 7]].isfinite().all()


def test_what_lies_in_unused_blocks_is_not_seen() -> None:
    p = problem([(1, 9), (3, 6)], Shape(), activations=torch.float32)
    used = {
        block for row, context in enumerate((9, 6)) for block in p.batch.block_tables[row, : -(-context // 4)].tolist()
    }
    expected, _ = run(TritonAttention(), p, AttentionParams(0.25))
    for block in set(range(p.cache.k.shape[0])) - used:
        p.cache.k[block] = float("nan")
        p.cache.v[block] = float("nan")
    assert torch.equal(run(TritonAttention(), p, AttentionParams(0.25))[0], expected)


def test_a_cache_of_more_than_2_to_the_31_numbers() -> None:
    """Most of this memory is never touched, hence never there."""
    shape = Shape(2, 1, 64, 16)
    block_numbers = 64 * 16
    last = 2**31 // block_numbers + 3
    size = (last + 1, 1, 16, 64)
    cache = LayerKVCache(*(torch.empty(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)))
    tables = torch.tensor([[last, last - 1], [last - 2, 0]], dtype=torch.int32)
    rows = [(1, 20), (5, 5)]
    small = host_problem(rows, shape, torch.bfloat16, torch.bfloat16)
    batch = make_batch(rows, tables, shape.block)
    for block in (last, last - 1):
        for part, values in ((cache.k, small.cache.k), (cache.v, small.cache.v)):
            part[block] = values[block % len(values)].to(DEVICE)
    p = moved(replace(small, batch=batch, cache=LayerKVCache(small.cache.k, small.cache.v)))
    expected = ReferenceAttention()(p.q, p.k, p.v, cache, p.batch, AttentionParams(0.25))
    actual = TritonAttention()(p.q, p.k, p.v, cache, p.batch, AttentionParams(0.25))
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[torch.bfloat16])


class _Recorded:
    """Keeps every launch of a kernel, as a graph would: grid and arguments."""

    def __init__(self, kernel: Any, made: list[Callable[[], object]]) -> None:
        self._kernel, self._made = kernel, made

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self._made.append(lambda: self._kernel[grid](*arguments, **options))
            self._made[-1]()

        return launch


def test_launches_captured_once_serve_every_later_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in captured steps: tensors change in place, and `context_lens_cpu` says the longest that may come."""
    shape, params = Shape(4, 2, 16, 4), AttentionParams(0.25)
    longest = 2 * PART + 44
    first = problem([(1, longest), (1, longest), (1, longest)], shape)
    captured = replace(first.batch, context_lens_cpu=(longest,) * 3)
    cache = LayerKVCache(first.cache.k.clone(), first.cache.v.clone())
    made: list[Callable[[], object]] = []
    with monkeypatch.context() as patch:
        for name in KERNELS:
            patch.setattr(triton_kernel, name, _Recorded(getattr(triton_kernel, name), made))
        out = TritonAttention()(first.q, first.k, first.v, cache, captured, params)
    assert len(made) == 3
    for contexts in ((1, 7, longest), (PART, PART + 1, 2)):
        step = problem([(1, context) for context in contexts], shape, seed=sum(contexts))
        for name in ("context_lens", "slot_mapping"):
            getattr(captured, name).copy_(getattr(step.batch, name))
        captured.block_tables.zero_()
        captured.block_tables[:, : step.batch.block_tables.shape[1]] = step.batch.block_tables
        for name in ("q", "k", "v"):
            getattr(first, name).copy_(getattr(step, name))
        for part, values in ((cache.k, step.cache.k), (cache.v, step.cache.v)):
            part[: len(values)] = values
        expected, _ = run(TritonAttention(), step, params)
        for launch in list(made):
            launch()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("attention", [TritonAttention()])
def test_what_does_not_fit_is_refused(attention: Attention) -> None:
    params, p = AttentionParams(0.25), problem([(1, 9), (2, 6)], Shape())
    batch = p.batch
    for wrong in (
        replace(p, q=p.q[:2]),
        replace(p, k=p.k[:, :1]),
        replace(p, q=p.q[:, :5]),
        replace(p, k=p.k.bfloat16()),
        replace(p, q=p.q.half(), k=p.k.half(), v=p.v.half()),
        replace(p, cache=LayerKVCache(p.cache.k.half(), p.cache.v.half())),
        replace(p, cache=LayerKVCache(p.cache.k.transpose(2, 3).contiguous().transpose(2, 3), p.cache.v)),
        replace(p, batch=replace(batch, block_tables=batch.block_tables[:, :1])),
        replace(p, batch=replace(batch, context_lens_cpu=(9, 1))),
        replace(p, batch=replace(batch, query_lens_cpu=(1, 1))),
    ):
        before = p.cache.k.clone()
        with pytest.raises(ValueError, match=r"fit|differ|too small"):
            attention(wrong.q, wrong.k, wrong.v, wrong.cache, wrong.batch, params)
        assert torch.equal(p.cache.k, before)
