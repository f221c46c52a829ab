"""Traits: where in a prompt an adapter begins, and the way into the catalog and back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.adapters.traits import AdapterTraits


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ((5, 6, 1), 0),
        ((1, 5, 6), 1),
        ((5, 6, 5, 6, 7), 2),
        ((5, 5, 6), 1),
        ((6, 5), None),
        ((5,), None),
        ((), None),
    ],
)
def test_an_activated_adapter_starts_at_its_last_invocation(prompt: tuple[int, ...], start: int | None) -> None:
    assert AdapterTraits("alora", invocation_tokens=(5, 6)).start_in(prompt) == start


@given(prompt=st.lists(st.integers(0, 2), max_size=12), invocation=st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_the_last_occurrence_is_found(prompt: list[int], invocation: list[int]) -> None:
    found = [i for i in range(len(prompt)) if prompt[i : i + len(invocation)] == invocation]
    assert AdapterTraits(invocation_tokens=tuple(invocation)).start_in(prompt) == (found[-1] if found else None)


class CountedTokens(tuple[int, ...]):
    """A prompt that counts how often it is looked at."""

    looks = 0

    def __getitem__(self, index: Any) -> Any:
        CountedTokens.looks += len(range(*index.indices(len(self)))) if isinstance(index, slice) else 1
        return super().__getitem__(index)


def test_a_long_invocation_is_looked_for_once() -> None:
    """Both come from others; here every place of the prompt nearly is the invocation."""
    invocation = (2, *(1,) * 500)
    CountedTokens.looks = 0
    assert AdapterTraits("alora", invocation_tokens=invocation).start_in(CountedTokens((1,) * 2000)) is None
    assert 0 < CountedTokens.looks <= 3 * 2000


def test_others_start_at_once() -> None:
    assert AdapterTraits().start_in((1, 2)) == 0
    assert AdapterTraits("dora", fixed_scale=True).start_in(()) == 0


def test_traits_survive_the_catalog() -> None:
    traits = AdapterTraits("alora", True, (1, 2))
    assert AdapterTraits.from_json(traits.to_json()) == traits
    assert AdapterTraits.from_json({}) == AdapterTraits()
