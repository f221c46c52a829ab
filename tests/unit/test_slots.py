"""The device tier by itself: its budget, what leaves first, rows in use and pins."""

from __future__ import annotations

import pytest
import torch

from loraplex.server.errors import EngineError, LoraplexError, ResourceExhaustedError
from loraplex.server.lora.slots import SlotPool
from tests.unit.fakes import Unmovable, packed

CPU = torch.device("cpu")


def pool_of(*digests: str, capacity: int = 8, nbytes: int = 4) -> SlotPool:
    pool = SlotPool(capacity, CPU)
    for digest in digests:
        assert pool.install(packed(digest, nbytes))
    return pool


def test_the_least_recently_used_leaves() -> None:
    pool = pool_of("a", "b")
    pool.touch("a")
    assert pool.install(packed("c", 4))
    assert pool.resident == {"a", "c"}
    assert pool.stats.evictions == 1
    assert {adapter.digest for adapter in pool.slots.values()} == {"a", "c"}
    assert pool.slots[pool.slot_of("c")].digest == "c"
    pool.check_integrity()


def test_what_a_row_uses_stays_and_nothing_is_evicted_in_vain() -> None:
    pool = pool_of("a", "b")
    pool.retain("a")
    assert not pool.install(packed("big", 8))
    assert pool.resident == {"a", "b"}
    pool.release("a")
    assert pool.install(packed("big", 8))
    assert pool.resident == {"big"}


def test_a_pin_holds_until_it_is_taken_off() -> None:
    pool = pool_of("a", "b")
    pool.pin("a")
    pool.touch("b")
    assert pool.install(packed("c", 4))
    assert pool.resident == {"a", "c"}
    assert pool.pinned_bytes == 4
    pool.unpin("a")
    assert pool.install(packed("d", 4))
    assert pool.resident == {"c", "d"}


def test_forgetting_says_what_came_free_and_takes_the_pin_off() -> None:
    pool = pool_of("a")
    pool.pin("a")
    assert (pool.nbytes("a"), pool.forget("a"), pool.forget("a"), pool.nbytes("a")) == (4, 4, 0, 0)
    assert not pool.pins


def test_slot_numbers_are_never_used_twice() -> None:
    pool = pool_of("a")
    first = pool.slot_of("a")
    pool.forget("a")
    pool.install(packed("a", 4))
    assert pool.slot_of("a") != first


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity_bytes"):
        SlotPool(-1, CPU)


def test_idle_adapters_leave_one_by_one_while_the_device_has_no_memory() -> None:
    pool = pool_of("used", "pinned", "old", "new", capacity=100)
    pool.retain("used")
    pool.pin("pinned")
    assert pool.install(Unmovable.make("x", torch.OutOfMemoryError("none left")))
    assert pool.resident == {"used", "pinned", "new", "x"}
    assert pool.stats.evictions == 1
    pool.check_integrity()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(torch.OutOfMemoryError("none left"), ResourceExhaustedError), (RuntimeError("bus error"), EngineError)],
)
def test_a_device_that_refuses_is_a_typed_error_and_leaves_the_pool_whole(
    raised: Exception, expected: type[LoraplexError]
) -> None:
    pool = pool_of("used", capacity=100)
    pool.retain("used")
    with pytest.raises(expected, match="adapter x"):
        pool.install(Unmovable.make("x", raised))
    assert pool.resident == {"used"}
    pool.check_integrity()
