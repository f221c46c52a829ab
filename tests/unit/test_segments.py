"""Segments: every token of a row with an adapter lies in exactly one, and in the right one."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from loraplex.server.lora.segments import Segment, build_segments

ROWS = st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 2)), st.sampled_from([1.0, 0.5])))


@given(rows=ROWS)
def test_each_token_is_where_its_row_says(rows: list[tuple[int, int | None, float]]) -> None:
    segments = build_segments(rows)
    expected = [(slot, scale) for length, slot, scale in rows for _ in range(length)]
    found: list[tuple[int | None, float]] = [(None, 1.0)] * len(expected)
    for segment in segments:
        for token in range(segment.start, segment.end):
            assert found[token][0] is None, "segments overlap"
            found[token] = (segment.slot, segment.scale)
    assert found == [(slot, scale if slot is not None else 1.0) for slot, scale in expected]
    assert list(segments) == sorted(segments)


@given(rows=ROWS)
def test_neighbours_with_equal_weights_are_one(rows: list[tuple[int, int | None, float]]) -> None:
    segments = build_segments(rows)
    for left, right in pairwise(segments):
        assert (left.end, left.slot, left.scale) != (right.start, right.slot, right.scale)


def test_a_batch_without_adapters_has_none() -> None:
    assert build_segments([(4, None, 1.0), (1, None, 1.0)]) == ()


def test_scale_divides_segments() -> None:
    assert build_segments([(2, 0, 1.0), (1, 0, 0.5)]) == (Segment(0, 2, 0, 1.0), Segment(2, 3, 0, 0.5))
