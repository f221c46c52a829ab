"""The adapter memory: budget, pins, rows in use and background loading under any order of calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.server.engine.scheduler import Residency
from loraplex.server.errors import EngineError, NotFoundError, ResourceExhaustedError
from loraplex.server.lora.slots import MAX_LOADS_AHEAD, SlotPool
from loraplex.server.lora.weights import PackedAdapter
from tests.unit.fakes import packed

SIZES = {f"a{size}": size for size in (1, 2, 3, 5, 9)}
CAPACITY = 8


def until(pool: SlotPool, done: Callable[[], bool]) -> None:
    """Poll like the engine does until `done`."""
    deadline = time.monotonic() + 10
    while not done():
        pool.poll()
        assert time.monotonic() < deadline, "the background load never ended"
        time.sleep(0.0005)


class SlotPoolMachine(RuleBasedStateMachine):
    """Any order of calls keeps the budget and never drops an adapter that a row uses."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(lambda digest: packed(digest, SIZES[digest]), CAPACITY)
        self.rows: list[str] = []

    @rule(digest=st.sampled_from(sorted(SIZES)))
    def use(self, digest: str) -> None:
        state = self.pool.require(digest)
        if state is Residency.LOADING:
            until(self.pool, lambda: self.pool.require(digest) is not Residency.LOADING)
            state = self.pool.require(digest)
        if state is Residency.RESIDENT:
            self.pool.retain(digest)
            self.rows.append(digest)
        elif state is Residency.FAILED:
            assert isinstance(self.pool.failure(digest), ResourceExhaustedError)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(self.rows))
        self.rows.remove(digest)
        self.pool.release(digest)

    @rule(digest=st.sampled_from(sorted(SIZES)), action=st.sampled_from(["pin", "unpin", "forget"]))
    def manage(self, digest: str, action: str) -> None:
        getattr(self.pool, action)(digest)

    @rule()
    def poll(self) -> None:
        self.pool.poll()

    @invariant()
    def consistent(self) -> None:
        self.pool.check_integrity()
        for digest in self.rows:
            assert self.pool.slots[self.pool.slot_of(digest)].digest == digest

    def teardown(self) -> None:
        self.pool.close()


SlotPoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestSlotPool = SlotPoolMachine.TestCase


def load(pool: SlotPool, digest: str) -> None:
    until(pool, lambda: pool.require(digest) is Residency.RESIDENT)


def test_the_least_recently_used_leaves() -> None:
    pool = SlotPool(lambda digest: packed(digest, 4), 8)
    load(pool, "a")
    load(pool, "b")
    pool.require("a")
    load(pool, "c")
    assert pool.resident == {"a", "c"}
    assert pool.stats.evictions == 1
    pool.close()


def test_what_a_row_uses_stays_and_nothing_is_evicted_in_vain() -> None:
    pool = SlotPool(lambda digest: packed(digest, 8 if digest == "big" else 4), 8)
    load(pool, "a")
    load(pool, "b")
    pool.retain("a")
    until(pool, lambda: pool.require("big") is Residency.NO_ROOM)
    assert pool.resident == {"a", "b"}
    pool.release("a")
    assert pool.require("big") is Residency.RESIDENT
    pool.close()


def test_a_forgotten_adapter_goes_with_its_last_row() -> None:
    pool = SlotPool(packed, 8)
    load(pool, "a")
    pool.retain("a")
    pool.forget("a")
    assert pool.resident == {"a"}
    pool.release("a")
    assert pool.resident == frozenset()
    pool.close()


def test_what_is_forgotten_while_it_loads_is_loaded_again() -> None:
    gate, stored = threading.Event(), [False]

    def load(digest: str) -> PackedAdapter:
        gate.wait()
        if not stored[0]:
            raise NotFoundError("deleted")
        return packed(digest)

    pool = SlotPool(load, CAPACITY)
    assert pool.require("a") is Residency.LOADING
    pool.forget("a")  # its request was aborted and its name unregistered; the file goes
    gate.set()
    until(pool, lambda: not pool._loading)
    stored[0] = True  # the same content is registered again
    until(pool, lambda: pool.require("a") is not Residency.LOADING)
    assert pool.resident == {"a"}
    pool.close()


def test_loading_happens_on_another_thread_and_wakes() -> None:
    gate, woken, threads = threading.Event(), threading.Event(), []

    def slow(digest: str) -> PackedAdapter:
        threads.append(threading.current_thread())
        gate.wait()
        return packed(digest)

    pool = SlotPool(slow, 8, on_load=woken.set)
    assert pool.require("a") is Residency.LOADING
    assert not pool.poll()
    gate.set()
    assert woken.wait(5)
    load(pool, "a")
    assert threads[0] is not threading.current_thread()
    pool.close()


@pytest.mark.parametrize(
    ("raised", "expected"), [(NotFoundError("no blob"), NotFoundError), (OSError("disk"), EngineError)]
)
def test_a_failed_load_is_told_once_and_tried_again(raised: Exception, expected: type[Exception]) -> None:
    attempts = []

    def loader(digest: str) -> PackedAdapter:
        attempts.append(digest)
        if len(attempts) == 1:
            raise raised
        return packed(digest)

    pool = SlotPool(loader, 8)
    until(pool, lambda: pool.require("a") is Residency.FAILED)
    assert isinstance(pool.failure("a"), expected)
    load(pool, "a")
    assert len(attempts) == 2
    pool.close()


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity_bytes"):
        SlotPool(packed, -1)


def test_what_nobody_waits_for_any_more_is_dropped() -> None:
    pool = SlotPool(lambda digest: packed(digest, 8), 8)
    load(pool, "a")
    pool.retain("a")
    until(pool, lambda: pool.require("b") is Residency.NO_ROOM)
    pool.poll()  # the step after b's request has gone
    pool.poll()
    assert not pool._ready
    pool.close()


def test_few_adapters_load_ahead_of_the_budget() -> None:
    gate = threading.Event()

    def slow(digest: str) -> PackedAdapter:
        gate.wait()
        return packed(digest, 8)

    pool = SlotPool(slow, 8)
    for number in range(50):
        assert pool.require(f"a{number}") is Residency.LOADING
    assert len(pool._loading) == MAX_LOADS_AHEAD
    gate.set()
    pool.close()
