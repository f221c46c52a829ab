"""The LoRA operators against the definition: the reference by hand, the CPU's kernel against the reference."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex.server.lora.ops.cpu import MAX_KERNEL_WORK, CpuLoraOps
from loraplex.server.lora.ops.interface import make_lora_ops
from loraplex.server.lora.ops.reference import ReferenceLoraOps
from loraplex.server.lora.ops.triton import TritonLoraOps
from loraplex.server.lora.segments import Segment
from tests.unit.lora_cases import CPU, FLOATS, SITES, Case, adapter, call, cases, rows_by_popularity, site, slots_of

# Largest allowed difference from the reference, relative to the largest output; by the dtype of y. The sums are in
# float32 either way; a bfloat16 result may be rounded to the other neighbour.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def assert_same_as_reference(case: Case, activations: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    for index, s in enumerate(case.sites):
        x = torch.randn(case.tokens, s.in_features, generator=generator).to(activations)
        y = torch.randn(case.tokens, s.out_features, generator=generator).to(activations)
        expected = call(ReferenceLoraOps(), case, index, x, y).float()
        actual = call(CpuLoraOps(), case, index, x, y).float()
        allowed = TOLERANCE[activations] * max(1.0, expected.abs().max().item())
        assert (actual - expected).abs().max().item() <= allowed, s.name


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_reference_is_the_definition() -> None:
    slots = slots_of([3, 5], torch.float32)
    segments = (Segment(1, 3, 1, 0.5), Segment(3, 4, 0, 2.0))
    x, y = torch.randn(5, 48), torch.randn(5, 80)
    result = call(ReferenceLoraOps(), Case(SITES, slots, segments, 5), 0, x, y)
    for token in range(5):
        expected = y[token].clone()
        segment = next((s for s in segments if s.start <= token < s.end), None)
        if segment is not None:
            for part in slots[segment.slot].sites[0]:
                expected[part.start : part.end] += segment.scale * (part.b_t.T @ (part.a @ x[token]))
        torch.testing.assert_close(result[token], expected)


@pytest.mark.parametrize("popularity", ["distinct", "identical", "uniform", "skewed"])
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("ranks", [(1,), (8, 16, 32, 64), (256, 3)])
@pytest.mark.parametrize("weights", FLOATS)
@pytest.mark.parametrize("activations", FLOATS)
def test_decode_rows(
    activations: torch.dtype, weights: torch.dtype, ranks: tuple[int, ...], rows: int, popularity: str
) -> None:
    slots = slots_of([ranks[i % len(ranks)] for i in range(rows)], weights)
    slot_of_row = rows_by_popularity(popularity, rows)
    segments = tuple(Segment(row, row + 1, slot) for row, slot in enumerate(slot_of_row))
    assert_same_as_reference(Case(SITES, slots, segments, rows), activations)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 15, 16, 17, 42, 43, 256])
@pytest.mark.parametrize("weights", FLOATS)
def test_prefill_segments_between_decode_rows(weights: torch.dtype, length: int) -> None:
    segments = (Segment(0, 1, 0), Segment(2, 2 + length, 1, 0.25), Segment(2 + length, 3 + length, 0))
    assert_same_as_reference(Case(SITES, slots_of([8, 24], weights), segments, length + 4), torch.float32)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), activations=st.sampled_from(FLOATS))
def test_any_layout(case: Case, activations: torch.dtype) -> None:
    if case.tokens:
        assert_same_as_reference(case, activations)


@pytest.mark.parametrize("weights", FLOATS)
@pytest.mark.parametrize("rows", [2, 9])
def test_a_row_is_the_same_to_the_bit_alone_and_in_company(rows: int, weights: torch.dtype) -> None:
    slots = slots_of([8, 64, 1, 16, 7, 32, 8, 8, 5][:rows], weights)
    case = Case(SITES, slots, tuple(Segment(row, row + 1, row) for row in range(rows)), rows)
    for index, s in enumerate(SITES):
        x, y = torch.randn(rows, s.in_features), torch.randn(rows, s.out_features)
        together = call(CpuLoraOps(), case, index, x, y)
        for row in range(rows):
            alone = Case(SITES, slots, (Segment(0, 1, row),), 1)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                solo = call(CpuLoraOps(), alone, index, x[row : row + 1], y[row : row + 1])
                assert torch.equal(solo[0], together[row]), (s.name, row, threads)


@pytest.mark.parametrize("weights", FLOATS)
@pytest.mark.parametrize("length", [2, 3, 4, 7, 16, 17, 37])
def test_a_row_is_the_same_to_the_bit_beside_rows_of_its_own_adapter(length: int, weights: torch.dtype) -> None:
    sites = (*SITES, site("wide", 45, 700, 31))
    slots = slots_of([9, 34], weights, sites)
    company = Case(sites, slots, (Segment(0, 1, 0), Segment(1, 1 + length, 1)), 1 + length)
    for index, s in enumerate(sites):
        x, y = torch.randn(1 + length, s.in_features), torch.randn(1 + length, s.out_features)
        alone = torch.cat(
            [
                call(CpuLoraOps(), Case(sites, slots, (Segment(0, 1, min(row, 1)),), 1), index, x[[row]], y[[row]])
                for row in range(1 + length)
            ]
        )
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(call(CpuLoraOps(), company, index, x, y), alone), (s.name, threads)


def test_a_segment_that_goes_to_matrix_products() -> None:
    for weights in FLOATS:
        length = 1 + MAX_KERNEL_WORK // 64
        segments = (Segment(0, 1, 0), Segment(1, 1 + length, 1, 0.25), Segment(1 + length, 2 + length, 0))
        assert_same_as_reference(Case(SITES, slots_of([8, 64], weights), segments, length + 2), torch.float32)


def test_tokens_without_adapter_and_untouched_sites_stay_as_they_are() -> None:
    packed = adapter(SITES, 4, 0, torch.float32, frozenset({"qkv.0", "qkv.1", "qkv.2", "gate_up.1"}))
    case = Case(SITES, {0: packed}, (Segment(1, 2, 0),), 3)
    for index, s in enumerate(SITES):
        x, y = torch.randn(3, s.in_features), torch.randn(3, s.out_features)
        result = call(CpuLoraOps(), case, index, x, y)
        assert torch.equal(result[[0, 2]], y[[0, 2]])
        assert torch.equal(result[1], y[1]) == (s.name == "qkv")
        if s.name == "gate_up":
            assert torch.equal(result[1, 100:], y[1, 100:])


def test_no_segments_and_empty_segments_change_nothing() -> None:
    slots = slots_of([4], torch.float32)
    x, y = torch.randn(3, 48), torch.randn(3, 80)
    for segments in ((), (Segment(1, 1, 0),)):
        assert torch.equal(call(CpuLoraOps(), Case(SITES, slots, segments, 3), 0, x, y), y)


def test_nan_in_the_input_stays_in_its_row() -> None:
    case = Case(SITES, slots_of([4, 4], torch.float32), (Segment(0, 1, 0), Segment(1, 2, 1)), 2)
    x = torch.randn(2, 48)
    x[0, 3] = float("nan")
    result = call(CpuLoraOps(), case, 0, x, torch.zeros(2, 80))
    assert result[0].isnan().all()
    assert result[1].isfinite().all()


def test_rows_may_lie_apart() -> None:
    case = Case(SITES, slots_of([4, 9], torch.bfloat16), (Segment(0, 1, 0), Segment(1, 4, 1)), 4)
    wide_x, wide_y = torch.randn(4, 60), torch.randn(4, 100)
    x, y = wide_x[:, 5:53], wide_y[:, 7:87]
    expected = call(ReferenceLoraOps(), case, 0, x.contiguous(), y.contiguous())
    before = wide_y.clone()
    ops = CpuLoraOps()
    ops.add(y, x, 0, ops.prepare(case.segments, case.slots))
    torch.testing.assert_close(y, expected)
    assert torch.equal(wide_y[:, :7], before[:, :7])
    assert torch.equal(wide_y[:, 87:], before[:, 87:])


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
        (torch.zeros(2, 48), torch.zeros(2, 80, dtype=torch.float16)),
    ],
)
def test_what_does_not_fit_is_refused(x: torch.Tensor, y: torch.Tensor) -> None:
    ops = CpuLoraOps()
    prepared = ops.prepare((Segment(0, 2, 0),), slots_of([4], torch.float32))
    with pytest.raises(ValueError, match=r"fit|contiguous|float32"):
        ops.add(y, x, 0, prepared)
    assert torch.equal(y, torch.zeros_like(y))


def test_unknown_slots_and_dtypes_are_refused() -> None:
    ops, slots = CpuLoraOps(), slots_of([4], torch.float32)
    with pytest.raises(KeyError):
        ops.prepare((Segment(0, 1, 5),), slots)
    with pytest.raises(ValueError, match="one dtype"):
        ops.prepare((Segment(0, 1, 0), Segment(1, 2, 1)), {**slots, 1: slots_of([4], torch.bfloat16)[0]})


def test_several_threads_may_use_one_operator() -> None:
    ops = CpuLoraOps()
    case = Case(SITES, slots_of([8, 16, 4], torch.float32), tuple(Segment(i, i + 1, i % 3) for i in range(6)), 6)
    x, y = torch.randn(6, 48), torch.randn(6, 80)
    expected = call(ops, case, 0, x, y)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            if not torch.equal(call(ops, case, 0, x, y), expected):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_factory_knows_devices() -> None:
    assert isinstance(make_lora_ops(CPU), CpuLoraOps)
    assert isinstance(make_lora_ops(torch.device("cuda")), TritonLoraOps)
