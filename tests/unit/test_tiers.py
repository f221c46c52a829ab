"""Both tiers and the loads between them under any order of calls."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.server.engine.scheduler import Residency
from loraplex.server.engine.stats import AdapterMemory, FreedMemory
from loraplex.server.errors import EngineError, LoraplexError, NotFoundError, ResourceExhaustedError
from loraplex.server.lora.device_copies import DeviceCopies
from loraplex.server.lora.loads import MAX_LOADS
from loraplex.server.lora.tiers import AdapterTiers
from loraplex.server.lora.weights import PackedAdapter
from tests.unit.fakes import packed
from tests.unit.slow_copies import SlowCopies

SIZES = {f"a{size}": size for size in (1, 2, 3, 5, 9)}
DIGESTS = st.sampled_from(sorted(SIZES))
CAPACITY = 8


def until(tiers: AdapterTiers, done: Callable[[], bool]) -> None:
    """Poll like the engine does until `done`."""
    deadline = time.monotonic() + 10
    while not done():
        tiers.poll()
        assert time.monotonic() < deadline, "the background load never ended"
        time.sleep(0.0005)


def load(tiers: AdapterTiers, *digests: str) -> None:
    for digest in digests:
        until(tiers, lambda: tiers.require(digest) is Residency.RESIDENT)  # noqa: B023 - it is called at once


class TiersMachine(RuleBasedStateMachine):
    """Budgets hold, nothing in use leaves, and whoever asks long enough gets an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.woken = threading.Event()
        self.broken: set[str] = set()
        self.once_broken: set[str] = set()
        self.tiers = AdapterTiers(self.load, CAPACITY, host_bytes=12, copies=self.make_copies(), on_load=self.woken.set)
        self.rows: list[str] = []

    def make_copies(self) -> DeviceCopies | None:
        return None

    def load(self, digest: str) -> PackedAdapter:
        if digest in self.broken:
            raise NotFoundError(f"{digest} is broken")
        return packed(digest, SIZES[digest])

    def answer(self, digest: str) -> Residency:
        """Ask like the engine: sleep until a load wakes it, as long as the answer is to wait."""
        while True:
            self.woken.clear()
            self.tiers.poll()
            state = self.tiers.require(digest)
            if state is not Residency.LOADING:
                return state
            assert self.woken.wait(10), f"{digest} is loading, and no load that ended woke anybody"

    @rule(digest=DIGESTS)
    def use(self, digest: str) -> None:
        state = self.answer(digest)
        if state is Residency.RESIDENT:
            self.tiers.retain(digest)
            self.rows.append(digest)
        elif state is Residency.FAILED:
            error = self.tiers.failure(digest)
            # The load may have begun before it was mended.
            assert isinstance(error, ResourceExhaustedError) or digest in self.once_broken
        else:
            assert state is Residency.NO_ROOM

    @rule(digest=DIGESTS)
    def begin(self, digest: str) -> None:
        self.tiers.require(digest)

    @rule(digest=DIGESTS)
    def prefetch(self, digest: str) -> None:
        self.tiers.prefetch(digest)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(self.rows))
        self.rows.remove(digest)
        self.tiers.release(digest)

    @rule(digest=DIGESTS, action=st.sampled_from(["pin", "unpin"]))
    def manage(self, digest: str, action: str) -> None:
        getattr(self.tiers, action)(digest)

    @rule(digest=DIGESTS)
    def forget(self, digest: str) -> None:
        if digest in self.rows:
            return
        had = self.tiers.memory(digest)
        assert self.tiers.forget(digest) == FreedMemory(had.device_bytes, had.host_bytes)
        assert self.tiers.memory(digest) == AdapterMemory()

    @rule(digest=DIGESTS)
    def break_or_mend(self, digest: str) -> None:
        self.broken ^= {digest}
        self.once_broken.add(digest)

    @rule()
    def poll(self) -> None:
        self.tiers.poll()

    @invariant()
    def consistent(self) -> None:
        self.tiers.check_integrity()
        for digest in self.rows:
            assert self.tiers.slots[self.tiers.slot_of(digest)].digest == digest

    def teardown(self) -> None:
        for digest in self.rows:
            self.tiers.release(digest)
        for digest in SIZES:
            self.tiers.forget(digest)
        self.tiers.close()
        self.tiers.poll()
        assert not self.tiers.held, "what was loading when it was forgotten came back"


TiersMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTiers = TiersMachine.TestCase


class SlowTiersMachine(TiersMachine):
    """The same where copies to the device take longer than the engine's calls."""

    def make_copies(self) -> DeviceCopies:
        return SlowCopies(self.woken.set, delay_s=0.001)


SlowTiersMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestSlowTiers = SlowTiersMachine.TestCase


def test_rows_wait_for_a_copy_and_nothing_takes_its_place_meanwhile() -> None:
    copies = SlowCopies()
    tiers = AdapterTiers(lambda digest: packed(digest, 4), 4, host_bytes=8, copies=copies)
    until(tiers, lambda: tiers.require("a") is not None and "a" in tiers.resident)
    assert tiers.require("a") is Residency.LOADING
    assert tiers.prefetch("a") is Residency.LOADING
    until(tiers, lambda: tiers.require("b") is Residency.NO_ROOM)
    copies.finish()
    assert tiers.require("a") is Residency.RESIDENT
    tiers.retain("a")
    tiers.check_integrity()
    tiers.release("a")
    assert tiers.require("b") is Residency.LOADING, "what has arrived and is idle leaves"
    copies.finish()
    assert tiers.require("b") is Residency.RESIDENT
    tiers.close()
    assert copies.closed


def test_what_leaves_the_device_comes_back_from_the_host_without_a_load() -> None:
    loaded: Counter[str] = Counter()

    def loader(digest: str) -> PackedAdapter:
        loaded[digest] += 1
        return packed(digest, 4)

    tiers = AdapterTiers(loader, 4, host_bytes=8)
    load(tiers, "a", "b")
    assert tiers.resident == {"b"}
    assert tiers.require("a") is Residency.RESIDENT
    assert tiers.require("b") is Residency.RESIDENT
    load(tiers, "c", "a")
    assert loaded == {"a": 2, "b": 1, "c": 1}, "the host held b and c when a was needed again"
    tiers.close()


def test_bytes_are_counted_in_each_budget_and_once_where_the_device_is_the_cpu() -> None:
    tiers = AdapterTiers(lambda digest: packed(digest, 4), 8, host_bytes=4)
    load(tiers, "a", "b")
    stats = tiers.stats
    assert (stats.device.used_bytes, stats.host.used_bytes, stats.shared_bytes) == (8, 4, 4)
    assert tiers.memory("a") == AdapterMemory(4, 0)
    assert tiers.memory("b") == AdapterMemory(4, 4)
    assert tiers.held == {"a", "b"}
    assert [load.tier for load in tiers.take_load_stats()] == ["host", "device", "host", "device"]
    assert not tiers.take_load_stats()
    tiers.close()


def test_a_prefetch_stays_off_the_device_and_within_its_share_of_the_host() -> None:
    tiers = AdapterTiers(lambda digest: packed(digest, 4), 8, host_bytes=16)
    load(tiers, "a", "b")
    names = [f"p{number}" for number in range(5)]

    def ask() -> list[Residency]:
        tiers.poll()
        return [tiers.prefetch(name) for name in names]

    until(tiers, lambda: ask().count(Residency.NO_ROOM) == 2)
    for _ in range(20):
        assert ask()[:2] == [Residency.NO_ROOM] * 2
        time.sleep(0.001)
    assert tiers.resident == {"a", "b"}
    assert tiers.stats.host.loads == 4, "two were read ahead, and not again and again"
    assert tiers.require("p0") is Residency.RESIDENT
    tiers.close()


def test_one_large_adapter_does_not_end_prefetching() -> None:
    tiers = AdapterTiers(lambda digest: packed(digest, 12 if digest == "large" else 2), 16, host_bytes=16)
    load(tiers, "large", "small")
    for name in ("p0", "p1"):
        tiers.prefetch(name)
    until(tiers, lambda: [tiers.prefetch(name) for name in ("p0", "p1")] == [Residency.NO_ROOM] * 2)
    tiers.close()


def test_a_prefetch_that_fails_is_told_to_its_requests() -> None:
    def loader(digest: str) -> PackedAdapter:
        raise NotFoundError("no blob")

    tiers = AdapterTiers(loader, 8, host_bytes=8)
    until(tiers, lambda: tiers.prefetch("a") is Residency.FAILED)
    assert isinstance(tiers.failure("a"), NotFoundError)
    tiers.close()


def test_slow_sources_hold_up_only_their_own() -> None:
    gate = threading.Event()

    def loader(digest: str) -> PackedAdapter:
        if digest.startswith("slow"):
            gate.wait()
        return packed(digest)

    tiers = AdapterTiers(loader, 100)
    slow = [f"slow{number}" for number in range(2 * MAX_LOADS)]

    def ask() -> bool:
        assert {tiers.require(name) for name in slow} == {Residency.LOADING}
        return tiers.require("fast") is Residency.RESIDENT

    until(tiers, ask)
    gate.set()
    load(tiers, *slow)
    tiers.close()


def test_what_is_forgotten_while_it_loads_is_loaded_again() -> None:
    gate, stored = threading.Event(), [False]

    def loader(digest: str) -> PackedAdapter:
        if not gate.is_set():
            gate.wait()
            raise NotFoundError("deleted")
        assert stored[0]
        return packed(digest)

    tiers = AdapterTiers(loader, CAPACITY)
    assert tiers.require("a") is Residency.LOADING
    assert tiers.forget("a") == FreedMemory()  # its request was aborted and its name unregistered; the file goes
    stored[0] = True  # the same content is registered again
    gate.set()
    until(tiers, lambda: tiers.require("a") is not Residency.LOADING)
    assert tiers.resident == {"a"}
    tiers.close()


def test_loading_happens_on_another_thread_and_wakes() -> None:
    gate, woken, threads = threading.Event(), threading.Event(), []

    def slow(digest: str) -> PackedAdapter:
        threads.append(threading.current_thread())
        gate.wait()
        return packed(digest)

    tiers = AdapterTiers(slow, 8, on_load=woken.set)
    assert tiers.require("a") is Residency.LOADING
    assert not tiers.poll()
    gate.set()
    assert woken.wait(5)
    load(tiers, "a")
    assert threads[0] is not threading.current_thread()
    tiers.close()


@pytest.mark.parametrize(
    ("raised", "expected"), [(NotFoundError("no blob"), NotFoundError), (OSError("disk"), EngineError)]
)
def test_a_failed_load_is_told_once_and_tried_again(raised: Exception, expected: type[LoraplexError]) -> None:
    attempts = []

    def loader(digest: str) -> PackedAdapter:
        attempts.append(digest)
        if len(attempts) == 1:
            raise raised
        return packed(digest)

    tiers = AdapterTiers(loader, 8)
    until(tiers, lambda: tiers.require("a") is Residency.FAILED)
    assert isinstance(tiers.failure("a"), expected)
    load(tiers, "a")
    assert len(attempts) == 2
    tiers.close()


def test_a_pin_is_brought_as_soon_as_there_is_room() -> None:
    tiers = AdapterTiers(lambda digest: packed(digest, 4), 4)
    load(tiers, "busy")
    tiers.retain("busy")
    tiers.pin("pinned")
    until(tiers, lambda: bool(tiers._ready))
    assert tiers.resident == {"busy"}
    tiers.release("busy")
    tiers.poll()
    assert tiers.resident == {"pinned"}
    assert tiers.require("busy") is Residency.LOADING
    until(tiers, lambda: tiers.require("busy") is Residency.FAILED)
    assert isinstance(tiers.failure("busy"), ResourceExhaustedError)
    tiers.close()


def test_a_pin_beside_others_that_leave_no_room_waits_for_one_of_them_to_go() -> None:
    loaded: Counter[str] = Counter()

    def loader(digest: str) -> PackedAdapter:
        loaded[digest] += 1
        return packed(digest, 4)

    tiers = AdapterTiers(loader, 8)
    for digest in ("a", "b"):
        tiers.pin(digest)
        until(tiers, lambda: digest in tiers.resident)  # noqa: B023 - it is called at once
    tiers.pin("late")
    until(tiers, lambda: loaded["late"] == 1 and "late" not in tiers._loads)
    for _ in range(20):
        tiers.poll()
    assert tiers.resident == {"a", "b"}
    assert loaded["late"] == 1, "not again and again in vain"
    tiers.unpin("a")
    until(tiers, lambda: tiers.resident == {"b", "late"})
    tiers.close()


def test_a_pin_that_cannot_be_loaded_is_not_tried_for_ever() -> None:
    attempts = []

    def loader(digest: str) -> PackedAdapter:
        attempts.append(digest)
        raise NotFoundError("no blob")

    tiers = AdapterTiers(loader, 8)
    tiers.pin("a")
    until(tiers, lambda: bool(attempts) and "a" not in tiers._loads)
    for _ in range(5):
        tiers.poll()
    assert len(attempts) == 1
    tiers.close()


def test_what_nobody_waits_for_any_more_is_let_go() -> None:
    tiers = AdapterTiers(lambda digest: packed(digest, 8), 8, host_bytes=8)
    load(tiers, "a")
    tiers.retain("a")
    until(tiers, lambda: tiers.require("b") is Residency.NO_ROOM)
    assert tiers._host.held_bytes == 8
    tiers.poll()  # the step after b's request has gone
    tiers.poll()
    assert not tiers._ready
    assert tiers._host.held_bytes == 0
    tiers.close()


def test_few_adapters_load_at_one_time() -> None:
    gate = threading.Event()

    def slow(digest: str) -> PackedAdapter:
        gate.wait()
        return packed(digest, 8)

    tiers = AdapterTiers(slow, 8)
    for number in range(50):
        assert tiers.require(f"a{number}") is Residency.LOADING
    assert len(tiers._loads) == MAX_LOADS
    gate.set()
    tiers.close()
