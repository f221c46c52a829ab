"""Aliases: which target a request gets, and what an alias may point at."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.adapters.alias import MAX_TARGETS, Alias, AliasTarget, checked_targets
from loraplex.adapters.errors import InvalidRequestError
from tests.unit.conftest import to

KEYS = [f"user-{number}" for number in range(20_000)]


def chosen(weights: dict[str, float], alias: str = "live") -> dict[str, str]:
    made = Alias(alias, to(**weights))
    return {key: made.choose(key) for key in KEYS}


@pytest.mark.parametrize("weights", [{"a": 9.0, "b": 1.0}, {"a": 1.0, "b": 1.0, "c": 2.0}, {"a": 0.001, "b": 0.009}])
def test_targets_get_their_shares(weights: dict[str, float]) -> None:
    total = sum(weights.values())
    counts = {
        "sticky": Counter(chosen(weights).values()),
        "by chance": Counter(Alias("live", to(**weights)).choose("") for _ in KEYS),
    }
    for kind, count in counts.items():
        for name, weight in weights.items():
            share = weight / total
            # Six standard deviations: wrong once in 500 million runs.
            assert abs(count[name] - share * len(KEYS)) < 6 * math.sqrt(len(KEYS) * share * (1 - share)), (kind, name)


def test_only_the_keys_that_must_move_when_weights_change() -> None:
    before, after = chosen({"a": 9.0, "b": 1.0}), chosen({"a": 8.0, "b": 2.0})
    moved = {(before[key], after[key]) for key in KEYS if before[key] != after[key]}
    assert moved == {("a", "b")}
    third = chosen({"a": 9.0, "b": 1.0, "c": 10.0})
    assert all(third[key] in (before[key], "c") for key in KEYS)


def test_two_aliases_choose_independently() -> None:
    weights = {"a": 1.0, "b": 1.0}
    one, two = chosen(weights), chosen(weights, "other")
    same = sum(one[key] == two[key] for key in KEYS)
    assert abs(same - len(KEYS) / 2) < 6 * math.sqrt(len(KEYS)) / 2


def test_without_a_request_the_heaviest_counts() -> None:
    assert Alias("live", to(a=1.0, b=3.0, c=2.0)).choose() == "b"


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-300, 1e300), min_size=1), st.text())
def test_any_key_and_any_weights_choose_a_target(weights: dict[str, float], key: str) -> None:
    alias = Alias("live", checked_targets(to(**weights)))
    assert alias.choose(key) in weights
    if key:
        assert alias.choose(key) == alias.choose(key)


def test_moving_keeps_what_was_before() -> None:
    alias = Alias("live", to("a"))
    assert alias.moved(to("a")) == alias
    moved = alias.moved(to("b"))
    assert (moved.targets, moved.previous) == (to("b"), to("a"))
    assert moved.moved(to("b")) == moved, "a repeated call does not lose the way back"
    assert moved.moved(moved.previous).moved(moved.targets) == moved


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        ((), "must be 1 to"),
        (to(*(f"t{number}" for number in range(MAX_TARGETS + 1))), "must be 1 to"),
        (to("a", "b", "a"), "one target twice"),
        (to(a=1.0, b=0.0), "of b must be above 0"),
        (to(a=1.0, b=-1.0), "above 0"),
        (to(a=math.inf, b=1.0), "above 0"),
        (to(a=math.nan, b=1.0), "above 0"),
    ],
)
def test_targets_that_are_not_allowed(targets: tuple[AliasTarget, ...], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        checked_targets(targets)


def test_a_single_target_needs_no_weight() -> None:
    assert checked_targets(to(a=0.0)) == to("a")
