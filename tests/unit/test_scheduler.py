"""The scheduler: budgets hold, everything finishes, nobody starves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.server.config import EngineConfig
from loraplex.server.engine.block_manager import BlockManager
from loraplex.server.engine.request import GenerationRequest, SamplingParams
from loraplex.server.engine.scheduler import Residency, Scheduler, StepPlan
from loraplex.server.engine.sequence import Sequence
from loraplex.server.engine.waiting import WaitingQueues
from loraplex.server.errors import LoraplexError, NotFoundError, ResourceExhaustedError

BLOCK = 4


class FakeSlots:
    """Room for `capacity` adapters; a new one loads for `load_steps` calls of `require`."""

    def __init__(self, capacity: int = 100, load_steps: int = 0, broken: frozenset[str] = frozenset()) -> None:
        self.rows: dict[str, int] = {}
        self.prefetched: list[str] = []
        self._capacity = capacity
        self._load_steps = load_steps
        self._asked: dict[str, int] = {}
        self._broken = broken

    def require(self, digest: str) -> Residency:
        if digest in self._broken:
            return Residency.FAILED
        if digest in self.rows:
            return Residency.RESIDENT
        self._asked[digest] = self._asked.get(digest, 0) + 1
        if self._asked[digest] <= self._load_steps:
            return Residency.LOADING
        idle = [name for name, rows in self.rows.items() if rows == 0]
        if len(self.rows) >= self._capacity and not idle:
            return Residency.NO_ROOM
        if len(self.rows) >= self._capacity:
            del self.rows[idle[0]]
        self.rows[digest] = 0
        return Residency.RESIDENT

    def prefetch(self, digest: str) -> Residency:
        self.prefetched.append(digest)
        return Residency.FAILED if digest in self._broken else Residency.LOADING

    def failure(self, digest: str) -> LoraplexError:
        return NotFoundError(f"{digest} is broken")

    def retain(self, digest: str) -> None:
        self.rows[digest] += 1

    def release(self, digest: str) -> None:
        self.rows[digest] -= 1
        assert self.rows[digest] >= 0


def make(
    num_blocks: int = 64, slots: FakeSlots | None = None, **config: object
) -> tuple[Scheduler, BlockManager, FakeSlots]:
    blocks = BlockManager(num_blocks, BLOCK)
    slots = slots or FakeSlots()
    settings_ = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": BLOCK, "max_wait_s": 2.0, **config}
    return Scheduler(EngineConfig(**settings_), blocks, slots), blocks, slots  # type: ignore[arg-type]


_ids: Iterator[int] = iter(range(10**9))


def sequence(
    prompt: int, max_tokens: int = 3, digest: str | None = None, arrival: float = 0.0, scale: float = 1.0
) -> Sequence:
    number = next(_ids)
    # Different first tokens keep prompts from sharing blocks unless a test wants it.
    tokens = (number, *range(prompt - 1))
    params = SamplingParams(max_tokens=max_tokens, seed=0)
    request = GenerationRequest(str(number), tokens, params, adapter_digest=digest, adapter_scale=scale)
    return Sequence(request, 0, arrival)


def run_step(scheduler: Scheduler, blocks: BlockManager, now: float) -> tuple[StepPlan, list[Sequence]]:
    """Play runner and engine for one step; return the plan and what finished."""
    plan = scheduler.schedule(now)
    finished = []
    for item in plan.scheduled:
        seq, samples, computed = item.seq, item.samples, item.seq.num_computed_tokens
        seq.num_computed_tokens += item.num_tokens
        blocks.publish(seq, computed)
        if samples:
            seq.token_ids.append(7)
            if seq.num_output_tokens >= seq.request.params.max_tokens:
                scheduler.finish(seq)
                finished.append(seq)
    for seq, _ in plan.failed:
        scheduler.finish(seq)
    return plan, finished


def run_all(scheduler: Scheduler, blocks: BlockManager, limit: int = 2000) -> list[Sequence]:
    finished: list[Sequence] = []
    for step in range(limit):
        if not scheduler.has_work:
            return finished
        finished += run_step(scheduler, blocks, step * 0.1)[1]
        blocks.check_integrity(list(scheduler.sequences()))
    pytest.fail(f"work is left after {limit} steps: {list(scheduler.sequences())}")


@settings(max_examples=80, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 24), st.integers(1, 12), st.sampled_from([None, "a", "b", "c"])), max_size=14
    ),
    num_blocks=st.integers(10, 30),
    capacity=st.integers(1, 3),
    load_steps=st.integers(0, 3),
)
def test_budgets_hold_and_everything_finishes(
    requests: list[tuple[int, int, str | None]], num_blocks: int, capacity: int, load_steps: int
) -> None:
    scheduler, blocks, slots = make(num_blocks, FakeSlots(capacity, load_steps))
    sequences = [sequence(*request) for request in requests]
    for seq in sequences:
        scheduler.add(seq)
    finished: list[Sequence] = []
    for step in range(3000):
        if not scheduler.has_work:
            break
        plan, done = run_step(scheduler, blocks, step * 0.1)
        finished += done
        assert sum(item.num_tokens for item in plan.scheduled) <= 16
        assert len(plan.scheduled) <= 4
        assert len({id(item.seq) for item in plan.scheduled}) == len(plan.scheduled)
        blocks.check_integrity(list(scheduler.sequences()))
    assert {id(seq) for seq in finished} == {id(seq) for seq in sequences}
    assert blocks.num_free_blocks == num_blocks
    assert all(rows == 0 for rows in slots.rows.values())


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    scheduler, blocks, _ = make()
    short, long = sequence(3, max_tokens=10), sequence(40)
    scheduler.add(short)
    run_step(scheduler, blocks, 0.0)
    scheduler.add(long)
    plan, _ = run_step(scheduler, blocks, 0.1)
    assert [(item.seq, item.num_tokens) for item in plan.scheduled] == [(short, 1), (long, 15)]
    plan, _ = run_step(scheduler, blocks, 0.2)
    assert [(item.seq, item.num_tokens) for item in plan.scheduled] == [(short, 1), (long, 15)]


def test_the_youngest_is_preempted_and_finishes_later() -> None:
    scheduler, blocks, _ = make(num_blocks=8)
    old, young = sequence(8, max_tokens=16), sequence(8, max_tokens=16)
    for seq in (old, young):
        scheduler.add(seq)
    finished = run_all(scheduler, blocks)
    assert finished == [old, young]
    assert old.num_preemptions == 0
    assert young.num_preemptions > 0
    assert scheduler.num_preemptions == young.num_preemptions


def test_a_full_queue_refuses() -> None:
    scheduler, _, _ = make(max_waiting=2)
    scheduler.add(sequence(1))
    scheduler.add(sequence(1))
    with pytest.raises(ResourceExhaustedError, match="max_waiting") as caught:
        scheduler.add(sequence(1))
    assert caught.value.retry_after_s is not None


def test_finish_works_wherever_a_sequence_is() -> None:
    scheduler, blocks, slots = make(max_num_seqs=1)
    running, waiting = sequence(3, digest="a"), sequence(3, digest="a")
    scheduler.add(running)
    scheduler.add(waiting)
    run_step(scheduler, blocks, 0.0)
    scheduler.finish(waiting)
    scheduler.finish(running)
    assert not scheduler.has_work
    assert slots.rows == {"a": 0}
    blocks.check_integrity([])


@pytest.mark.parametrize("scale_step", [0.0, 0.001])
def test_a_flood_on_one_adapter_does_not_hold_up_another(scale_step: float) -> None:
    """Nor does one under many scales, which are no queues of their own."""
    scheduler, blocks, _ = make()
    for number in range(200):
        scheduler.add(sequence(4, max_tokens=8, digest="flood", scale=1 + number * scale_step))
    run_step(scheduler, blocks, 0.0)
    rare = sequence(4, max_tokens=8, digest="rare", arrival=0.05)
    scheduler.add(rare)
    for step in range(1, 200):
        _, finished = run_step(scheduler, blocks, step * 0.1)
        if rare in finished:
            break
    assert rare.first_scheduled_s is not None
    assert rare.first_scheduled_s <= 1.0, "it takes the first row that comes free"
    assert scheduler.num_waiting > 150


def test_an_adapter_with_rows_is_not_passed_over_without_bound() -> None:
    """A stream of new adapters has fewer rows each than the busy one; the age bound still lets the busy one in."""
    scheduler, blocks, _ = make(max_num_seqs=2, max_wait_s=1.0)
    scheduler.add(sequence(2, max_tokens=500, digest="busy"))
    run_step(scheduler, blocks, 0.0)
    waiting = sequence(2, max_tokens=2, digest="busy", arrival=0.0)
    scheduler.add(waiting)
    for step in range(1, 100):
        for _ in range(2):
            scheduler.add(sequence(2, max_tokens=2, digest=f"new-{next(_ids)}", arrival=step * 0.1))
        run_step(scheduler, blocks, step * 0.1)
        if waiting.first_scheduled_s is not None:
            break
    assert waiting.first_scheduled_s is not None
    assert 1.0 <= waiting.first_scheduled_s <= 1.5


def test_a_loading_adapter_holds_up_only_its_own_requests() -> None:
    scheduler, blocks, _ = make(slots=FakeSlots(load_steps=5))
    slow, base = sequence(2, digest="slow"), sequence(2)
    scheduler.add(slow)
    scheduler.add(base)
    plan, _ = run_step(scheduler, blocks, 0.0)
    assert [item.seq for item in plan.scheduled] == [base]
    assert set(run_all(scheduler, blocks)) == {slow, base}


def test_an_adapter_without_room_gets_it_in_the_end() -> None:
    """Two busy adapters fill the memory with a steady stream; the third drains them when it is overdue."""
    scheduler, blocks, _ = make(slots=FakeSlots(capacity=2), max_wait_s=1.0)
    third = sequence(2, digest="c", arrival=0.05)
    for step in range(200):
        for digest in ("a", "b"):
            scheduler.add(sequence(2, max_tokens=4, digest=digest, arrival=step * 0.1))
        run_step(scheduler, blocks, step * 0.1)
        if step == 0:
            scheduler.add(third)
        if third.first_scheduled_s is not None:
            break
    assert third.first_scheduled_s is not None
    assert third.first_scheduled_s < 3.0


def test_a_broken_adapter_fails_only_its_own_requests() -> None:
    scheduler, blocks, _ = make(slots=FakeSlots(broken=frozenset({"broken"})))
    broken, fine = sequence(2, digest="broken"), sequence(2, digest="a")
    scheduler.add(broken)
    scheduler.add(fine)
    plan, _ = run_step(scheduler, blocks, 0.0)
    assert [(seq, type(error)) for seq, error in plan.failed] == [(broken, NotFoundError)]
    assert run_all(scheduler, blocks) == [fine]


def test_the_adapters_that_are_next_are_prefetched_once_rows_are_full() -> None:
    slots = FakeSlots(broken=frozenset({"broken"}))
    scheduler, blocks, _ = make(slots=slots, max_num_seqs=2)
    for number in range(2):
        scheduler.add(sequence(2, max_tokens=9, digest=f"running-{number}"))
    run_step(scheduler, blocks, 0.0)
    assert not slots.prefetched
    late = [sequence(2, digest=f"late-{number}", arrival=1.0 + number) for number in range(3)]
    for seq in [*late, late_twin := sequence(2, digest="late-0", arrival=0.5), sequence(2, arrival=0.9)]:
        scheduler.add(seq)
    run_step(scheduler, blocks, 2.0)
    assert slots.prefetched == ["late-0", "late-1"], "a batch's worth, each adapter once, the base not"
    assert late_twin.first_scheduled_s is None
    broken = sequence(2, digest="broken", arrival=0.1)
    scheduler.add(broken)
    plan, _ = run_step(scheduler, blocks, 2.1)
    assert [(seq, type(error)) for seq, error in plan.failed] == [(broken, NotFoundError)]
    run_all(scheduler, blocks)


def test_a_wait_for_an_adapter_is_noted_from_the_first_row_it_could_have_had() -> None:
    scheduler, blocks, _ = make(slots=FakeSlots(load_steps=2), max_num_seqs=1)
    first, cold = sequence(2, max_tokens=3), sequence(2, digest="cold")
    scheduler.add(first)
    run_step(scheduler, blocks, 0.0)
    scheduler.add(cold)
    run_step(scheduler, blocks, 1.0)
    assert cold.adapter_missed_s is None, "there was no row"
    for step in range(2, 9):
        run_step(scheduler, blocks, float(step))
    assert cold.first_scheduled_s is not None
    assert cold.adapter_missed_s is not None
    assert cold.first_scheduled_s - cold.adapter_missed_s == 2.0
    assert first.adapter_missed_s is None


def test_a_burst_over_many_cold_adapters_asks_for_each_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quadratic once: a thousand waiting adapters cost a second a step."""
    slots = FakeSlots(load_steps=10**6)
    scheduler, _, _ = make(slots=slots, max_waiting=10**6)
    for number in range(3000):
        scheduler.add(sequence(1, digest=f"cold-{number}"))
    ranked = 0
    rank = WaitingQueues._rank

    def counting(*arguments: Any) -> Any:
        nonlocal ranked
        ranked += 1
        return rank(*arguments)

    monkeypatch.setattr(WaitingQueues, "_rank", counting)
    scheduler.schedule(0.0)
    assert set(slots._asked.values()) == {1}
    assert ranked <= 2 * 3000


def test_idle_adapters_leave_no_trace() -> None:
    scheduler, blocks, _ = make()
    for number in range(50):
        scheduler.add(sequence(2, digest=f"adapter-{number}"))
    run_all(scheduler, blocks)
    assert not scheduler._waiting._last_admission_s
    assert not scheduler._waiting._queues
