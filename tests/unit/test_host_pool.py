"""The host tier by itself: its budget, what leaves first, and what is held."""

from __future__ import annotations

import pytest

from loraplex.server.lora.host_pool import HostPool, pinned_nbytes
from tests.unit.fakes import packed


def pool_of(*digests: str, capacity: int = 4) -> HostPool:
    pool = HostPool(capacity)
    for digest in digests:
        assert pool.put(packed(digest))
    return pool


def test_the_least_recently_used_leaves() -> None:
    pool = pool_of("a", "b", "c", "d")
    found = pool.get("a")
    assert found is not None
    assert found.digest == "a"
    pool.put(packed("e", 2))
    assert pool.digests == {"a", "d", "e"}
    assert pool.stats.evictions == 2
    assert pool.stats.peak_bytes == 4
    pool.check_integrity()


def test_what_is_held_stays_and_nothing_leaves_in_vain() -> None:
    pool = pool_of("a", "b", "c", "d")
    pool.hold("a")
    pool.hold("a")
    pool.hold("nobody's")
    assert not pool.put(packed("large", 4))
    assert pool.digests == {"a", "b", "c", "d"}
    pool.let_go("a")
    assert pool.held_bytes == 1
    pool.let_go("a")
    pool.let_go("b")
    pool.check_integrity()
    assert pool.put(packed("large", 4))
    assert pool.digests == {"large"}


def test_what_exceeds_the_budget_is_not_kept() -> None:
    pool = pool_of("a")
    assert not pool.put(packed("huge", 5))
    assert pool.digests == {"a"}
    assert HostPool(0).put(packed("empty", 0))
    assert not HostPool(0).put(packed("a"))


def test_forgetting_frees_what_is_held_too_and_says_how_much() -> None:
    pool = pool_of("a", capacity=9)
    pool.put(packed("b", 5))
    pool.hold("b")
    assert (pool.nbytes("b"), pool.forget("b"), pool.forget("b"), pool.nbytes("b")) == (5, 5, 0, 0)
    assert pool.stats.used_bytes == 1
    pool.check_integrity()


def test_a_second_copy_takes_the_first_ones_place() -> None:
    pool = pool_of("a", "b")
    pool.put(packed("a", 2))
    assert pool.stats.used_bytes == 3
    pool.check_integrity()


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity_bytes"):
        HostPool(-1)


def test_pinned_memory_is_counted_in_the_blocks_that_it_comes_in() -> None:
    assert [pinned_nbytes(size) for size in (0, 1, 2, 3, 64, 65, 2**30 + 1)] == [0, 1, 2, 4, 64, 128, 2**31]
    pool = HostPool(16, pinned=True)
    assert pool.put(packed("a", 5))
    assert pool.put(packed("b", 8))
    pool.hold("b")
    assert (pool.nbytes("a"), pool.stats.used_bytes, pool.held_bytes) == (8, 16, 8)
    pool.check_integrity()
    assert pool.put(packed("c", 1))
    assert pool.digests == {"b", "c"}
    assert not pool.put(packed("d", 9))
    assert (pool.forget("b"), pool.stats.used_bytes) == (8, 1)
    pool.check_integrity()
