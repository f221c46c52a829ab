"""The Triton LoRA kernels against the reference: in Triton's interpreter where there is no GPU.

The short form runs by default; the whole product of sizes is marked long.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex.server.lora.changes import SiteChanges
from loraplex.server.lora.ops import triton_kernel
from loraplex.server.lora.ops.interface import StaticLoraOps
from loraplex.server.lora.ops.reference import ReferenceLoraOps
from loraplex.server.lora.ops.triton import TritonLoraOps
from loraplex.server.lora.ops.triton_plan import LONG, MIN_LONG_TOKENS, SHORT, TILE_SHAPES, Reserved
from loraplex.server.lora.segments import Segment
from loraplex.server.lora.weights import LinearSite, PackedAdapter
from tests.triton_interpreter import DEVICE, INTERPRETED
from tests.unit.lora_cases import FLOATS, SITES, Case, adapter, call, cases, rows_by_popularity, site, slots_of

# Largest allowed difference from the reference, relative to the largest output, by the dtypes of y and of the weights.
# With weights in bfloat16 x A^T keeps 16 bits; a result in bfloat16 may be rounded to the other neighbour.
TOLERANCE = {
    (torch.float32, torch.float32): 2e-6,
    (torch.float32, torch.bfloat16): 2e-5,
    (torch.bfloat16, torch.float32): 2**-7,
    (torch.bfloat16, torch.bfloat16): 2**-7,
}
RANKS = [(1,), (8, 16, 32, 64), (256, 3), (17, 128)]
WIDE = (site("qkv", 640, 64, 32, 32), site("down", 1100, 48))


def inputs(case: Case, s: LinearSite, activations: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(case.tokens, s.in_features, generator=generator)
    y = torch.randn(case.tokens, s.out_features, generator=generator)
    return x.to(DEVICE, activations), y.to(DEVICE, activations)


def assert_same_as_reference(case: Case, activations: torch.dtype) -> None:
    # An adapter that leaves out every module has no dtype of its own, and counts as float32.
    dtypes = {packed.dtype for packed in case.slots.values()}
    weights = torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32
    for index, s in enumerate(case.sites):
        x, y = inputs(case, s, activations)
        expected = call(ReferenceLoraOps(), case, index, x, y).float()
        actual = call(TritonLoraOps(DEVICE), case, index, x, y).float()
        allowed = TOLERANCE[activations, weights] * max(1.0, expected.abs().max().item())
        assert (actual - expected).abs().max().item() <= allowed, s.name


def decode_case(ranks: tuple[int, ...], rows: int, popularity: str, weights: torch.dtype) -> Case:
    slots = slots_of([ranks[i % len(ranks)] for i in range(rows)], weights, SITES[:3:2], DEVICE)
    chosen = rows_by_popularity(popularity, rows)
    return Case(SITES[:3:2], slots, tuple(Segment(row, row + 1, slot) for row, slot in enumerate(chosen)), rows)


@pytest.mark.parametrize(
    ("weights", "ranks", "rows", "popularity"),
    [
        (torch.bfloat16, (1,), 1, "distinct"),
        (torch.bfloat16, (8, 16, 32, 64), 5, "skewed"),
        (torch.bfloat16, (256, 3), 3, "uniform"),
        (torch.float32, (17, 128), 4, "identical"),
    ],
)
@pytest.mark.parametrize("activations", FLOATS)
def test_decode_rows(
    activations: torch.dtype, weights: torch.dtype, ranks: tuple[int, ...], rows: int, popularity: str
) -> None:
    assert_same_as_reference(decode_case(ranks, rows, popularity, weights), activations)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("popularity", ["distinct", "identical", "uniform", "skewed"])
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("weights", FLOATS)
def test_decode_rows_of_every_kind(weights: torch.dtype, ranks: tuple[int, ...], rows: int, popularity: str) -> None:
    for activations in FLOATS:
        assert_same_as_reference(decode_case(ranks, rows, popularity, weights), activations)


@pytest.mark.parametrize("length", [2, 16, 17, MIN_LONG_TOKENS - 1, MIN_LONG_TOKENS, 3 * LONG.tokens + 1])
def test_prompts_between_decode_rows(length: int) -> None:
    segments = (Segment(0, 1, 0), Segment(2, 2 + length, 1, 0.25), Segment(2 + length, 3 + length, 0, -1.5))
    sites = SITES[:1]
    case = Case(sites, slots_of([8, 40], torch.bfloat16, sites, DEVICE), segments, length + 4)
    assert_same_as_reference(case, torch.bfloat16)


def test_sums_are_divided_where_there_are_many_inputs() -> None:
    assert SHORT.splits(640)[0] > 1
    assert LONG.splits(1100)[0] > 1
    for weights in FLOATS:
        segments = (Segment(0, 2, 1), Segment(3, 3 + MIN_LONG_TOKENS, 0))
        case = Case(WIDE, slots_of([20, 8], weights, WIDE, DEVICE), segments, 3 + MIN_LONG_TOKENS)
        assert_same_as_reference(case, torch.float32)


@given(in_features=st.integers(1, 100_000))
def test_every_input_belongs_to_one_split(in_features: int) -> None:
    for shape in TILE_SHAPES:
        splits, each = shape.splits(in_features)
        assert each % shape.inner == 0
        assert (splits - 1) * each < in_features <= splits * each
        assert splits <= shape.max_splits


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(DEVICE), activations=st.sampled_from(FLOATS))
def test_any_layout(case: Case, activations: torch.dtype) -> None:
    if case.tokens:
        assert_same_as_reference(case, activations)


@pytest.mark.parametrize("weights", FLOATS)
def test_a_row_is_the_same_to_the_bit_alone_in_company_and_again(weights: torch.dtype) -> None:
    rows = 4
    slots = slots_of([8, 33, 1, 16], weights, WIDE, DEVICE)
    case = Case(WIDE, slots, tuple(Segment(row, row + 1, row) for row in range(rows)), rows)
    for index, s in enumerate(WIDE):
        x, y = inputs(case, s, torch.float32)
        together = call(TritonLoraOps(DEVICE), case, index, x, y)
        assert torch.equal(call(TritonLoraOps(DEVICE), case, index, x, y), together)
        for row in range(rows):
            alone = Case(WIDE, slots, (Segment(0, 1, row),), 1)
            solo = call(TritonLoraOps(DEVICE), alone, index, x[row : row + 1], y[row : row + 1])
            assert torch.equal(solo[0], together[row]), (s.name, row)


def test_tokens_without_adapter_and_untouched_sites_stay_as_they_are() -> None:
    skip = frozenset({"qkv.0", "qkv.1", "qkv.2", "gate_up.1"})
    packed = adapter(SITES, 4, 0, torch.float32, skip, DEVICE)
    case = Case(SITES, {0: packed}, (Segment(1, 2, 0),), 3)
    for index, s in enumerate(SITES):
        x, y = inputs(case, s, torch.float32)
        result = call(TritonLoraOps(DEVICE), case, index, x, y)
        assert torch.equal(result[[0, 2]], y[[0, 2]])
        assert torch.equal(result[1], y[1]) == (s.name == "qkv")
        if s.name == "gate_up":
            assert torch.equal(result[1, 100:], y[1, 100:])


def test_a_site_that_no_adapter_touches_costs_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    packed = adapter(SITES, 4, 0, torch.float32, frozenset({"o.0"}), DEVICE)
    ops = TritonLoraOps(DEVICE)
    plan = ops.prepare((Segment(0, 1, 0),), {0: packed})
    counts = []
    for index, s in enumerate(SITES):
        before = len(launches.made)
        ops.add(
            torch.zeros(1, s.out_features, device=DEVICE), torch.zeros(1, s.in_features, device=DEVICE), index, plan
        )
        counts.append(len(launches.made) - before)
    assert counts == [2, 0, 2, 2]


def test_no_segments_and_empty_segments_change_nothing() -> None:
    slots = slots_of([4], torch.float32, device=DEVICE)
    x, y = torch.randn(3, 48, device=DEVICE), torch.randn(3, 80, device=DEVICE)
    for segments in ((), (Segment(1, 1, 0),)):
        assert torch.equal(call(TritonLoraOps(DEVICE), Case(SITES, slots, segments, 3), 0, x, y), y)


def test_nan_in_the_input_stays_in_its_row() -> None:
    slots = slots_of([4, 4], torch.float32, device=DEVICE)
    x = torch.randn(3, 48, device=DEVICE)
    x[0, 3] = float("nan")
    case = Case(SITES, slots, (Segment(0, 2, 0), Segment(2, 3, 1)), 3)
    result = call(TritonLoraOps(DEVICE), case, 0, x, torch.zeros(3, 80, device=DEVICE))
    assert result[0].isnan().all()
    assert result[1:].isfinite().all()


def test_rows_may_lie_more_than_2_to_the_31_numbers_apart() -> None:
    """Most of this memory is never touched, hence never there."""
    s = SITES[1]
    stride = 2**30 + 64
    x = torch.empty_strided((3, s.in_features), (stride, 1), dtype=torch.bfloat16, device=DEVICE)
    y = torch.empty_strided((3, s.out_features), (stride, 1), dtype=torch.bfloat16, device=DEVICE)
    generator = torch.Generator().manual_seed(3)
    for tensor in (x, y):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    case = Case(SITES, slots_of([4], torch.bfloat16, device=DEVICE), (Segment(0, 3, 0),), 3)
    expected = call(ReferenceLoraOps(), case, 1, x.contiguous(), y.contiguous())
    ops = TritonLoraOps(DEVICE)
    ops.add(y, x, 1, ops.prepare(case.segments, case.slots))
    torch.testing.assert_close(y.contiguous().float(), expected.float(), rtol=2**-7, atol=2**-7)


class Launches:
    """Records every launch of the two kernels, as a graph would: grid and arguments; `replay` launches them again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]]] = []
        for name in ("shrink_kernel", "expand_kernel"):
            monkeypatch.setattr(triton_kernel, name, _Recorded(getattr(triton_kernel, name), self))

    def replay(self) -> None:
        for launch, arguments, options in list(self.made):
            launch(*arguments, **options)


class _Recorded:
    def __init__(self, kernel: Any, launches: Launches) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self._launches.made.append((self._kernel[grid], arguments, options))
            self._kernel[grid](*arguments, **options)

        return launch


ALIGNED = (site("qkv", 48, 64, 16, 16),)


@pytest.fixture(scope="module")
def pool() -> dict[int, PackedAdapter]:
    return slots_of([4, 40, 16, 8, 1], torch.bfloat16, ALIGNED, DEVICE)


def steps() -> Iterator[tuple[Segment, ...]]:
    yield tuple(Segment(row, row + 1, row % 5) for row in range(20))
    yield (Segment(0, 20, 1, 0.5),)
    yield ()
    yield (Segment(3, 4, 4), Segment(4, 18, 0, 2.0), Segment(19, 20, 2))


def test_launches_captured_once_serve_every_later_step(
    monkeypatch: pytest.MonkeyPatch, pool: dict[int, PackedAdapter]
) -> None:
    launches = Launches(monkeypatch)
    ops = TritonLoraOps(DEVICE, Reserved(max_rank=48))
    assert isinstance(ops, StaticLoraOps)
    x = torch.randn(20, 48, device=DEVICE).bfloat16()
    y = torch.zeros(20, 96, device=DEVICE).bfloat16()
    plan = ops.reserve(20, 20)
    ops.add(y, x, 0, plan)
    assert torch.equal(y, torch.zeros_like(y))
    assert len(launches.made) == 2
    for segments in steps():
        base = torch.randn(20, 96, device=DEVICE).bfloat16()
        y.copy_(base)
        assert ops.refill(plan, segments, pool)
        launches.replay()
        # In company or not, replayed or not: the same to the bit.
        assert torch.equal(y, call(TritonLoraOps(DEVICE), Case(ALIGNED, pool, segments, 20), 0, x, base))


def test_a_reserved_plan_refuses_what_it_was_not_made_for(pool: dict[int, PackedAdapter]) -> None:
    ops = TritonLoraOps(DEVICE, Reserved(max_rank=32, slices=3))
    plan = ops.reserve(4, 2)
    held = (Segment(0, 2, 0), Segment(2, 4, 2))
    assert ops.refill(plan, held, pool)
    before = plan.records.clone()
    wide = adapter((site("qkv", 48, 24, 24, 24, 24),), 4, 9, torch.bfloat16, device=DEVICE)
    changed = PackedAdapter("d", pool[0].sites, 0, 4, changes={0: SiteChanges(48, 96, bias=torch.zeros(96))})
    others = {**pool, 5: slots_of([4], torch.float32, ALIGNED, DEVICE)[0], 6: wide, 7: changed}
    for slot in (1, 5, 6, 7):
        assert not ops.refill(plan, (Segment(0, 1, slot), Segment(1, 2, slot)), others), slot
    assert not ops.refill(plan, (Segment(0, 1, 0), Segment(1, 2, 2), Segment(2, 3, 3)), pool)
    assert torch.equal(plan.records, before)
    with pytest.raises(KeyError):
        ops.refill(plan, (Segment(0, 1, 99),), pool)
    with pytest.raises(ValueError, match="fit"):
        ops.refill(plan, (Segment(3, 5, 0),), pool)


def test_a_reserved_plan_keeps_no_adapter_beyond_its_slot() -> None:
    """It lives as long as the server: what was evicted long ago would stay in memory."""
    ops = TritonLoraOps(DEVICE)
    plan = ops.reserve(4, 2)
    slots = slots_of([4], torch.bfloat16, ALIGNED, DEVICE)
    assert ops.refill(plan, (Segment(0, 2, 0),), slots)
    alive = weakref.ref(slots[0])
    del slots
    gc.collect()
    assert alive() is None


@given(data=st.data(), tokens=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_what_is_reserved_holds_every_such_step(data: st.DataObject, tokens: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, tokens), min_size=1, max_size=12))
    segments, start = [], 0
    for index, length in enumerate(lengths):
        if start + length <= tokens:
            segments.append(Segment(start, start + length, index % 2))
            start += length
    ops = TritonLoraOps(torch.device("cpu"), Reserved(max_rank=40))
    slots = slots_of([40, 7], torch.bfloat16, ALIGNED)
    assert ops.refill(ops.reserve(tokens, len(segments)), segments, slots)


def test_tables_leave_with_their_adapters() -> None:
    ops = TritonLoraOps(DEVICE)
    slots = slots_of([4, 4], torch.float32, device=DEVICE)
    ops.prepare((Segment(0, 1, 0), Segment(1, 2, 1)), slots)
    assert len(ops._residents) == 2
    del slots[0]
    assert len(ops._residents) == 1


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(2, 47), torch.zeros(2, 80)),
        (torch.zeros(2, 48), torch.zeros(2, 79)),
        (torch.zeros(2, 48), torch.zeros(3, 80)),
        (torch.zeros(1, 48), torch.zeros(1, 80)),
        (torch.zeros(48, 2).T, torch.zeros(2, 80)),
        (torch.zeros(2, 48), torch.zeros(80, 2).T),
        (torch.zeros(2, 48), torch.zeros(2, 80, dtype=torch.float64)),
        (torch.zeros(2, 48, dtype=torch.float16), torch.zeros(2, 80)),
    ],
)
def test_what_does_not_fit_is_refused(x: torch.Tensor, y: torch.Tensor) -> None:
    x, y = x.to(DEVICE), y.to(DEVICE)
    ops = TritonLoraOps(DEVICE)
    prepared = ops.prepare((Segment(0, 2, 0),), slots_of([4], torch.float32, device=DEVICE))
    with pytest.raises(ValueError, match=r"fit|contiguous|float32"):
        ops.add(y, x, 0, prepared)
    assert torch.equal(y, torch.zeros_like(y))


def test_unknown_slots_and_dtypes_are_refused() -> None:
    ops, slots = TritonLoraOps(DEVICE), slots_of([4], torch.float32, device=DEVICE)
    with pytest.raises(KeyError):
        ops.prepare((Segment(0, 1, 5),), slots)
    other = slots_of([4], torch.bfloat16, device=DEVICE)[0]
    with pytest.raises(ValueError, match="one dtype"):
        ops.prepare((Segment(0, 1, 0), Segment(1, 2, 1)), {**slots, 1: other})
    half = slots_of([4], torch.float16, device=DEVICE)
    with pytest.raises(ValueError, match="float16"):
        ops.prepare((Segment(0, 1, 0),), half)
    with pytest.raises(ValueError, match="float16"):
        TritonLoraOps(DEVICE, Reserved(dtype=torch.float16))


def test_without_a_gpu_it_is_the_interpreter_that_runs() -> None:
    assert ("Interpreted" in type(triton_kernel.shrink_kernel).__name__) == INTERPRETED
