"""Whose turn it is: the heap against the definition, which looks at every head again each time."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.server.engine.request import GenerationRequest, SamplingParams
from loraplex.server.engine.sequence import Sequence
from loraplex.server.engine.waiting import AdapterKey, WaitingQueues

MAX_WAIT_S = 2.0


def sequence(digest: str | None, arrival: float) -> Sequence:
    request = GenerationRequest("r", (1,), SamplingParams(seed=0), adapter_digest=digest, adapter_name=digest or "")
    return Sequence(request, 0, arrival)


def best_again_and_again(
    queues: dict[AdapterKey, deque[Sequence]], last: dict[AdapterKey, float], rows: Counter[AdapterKey], now: float
) -> Iterator[Sequence]:
    """The definition; takes quadratic time."""
    closed: set[AdapterKey] = set()

    def rank(head: Sequence) -> tuple[bool, int, float, float]:
        key = head.request.adapter_digest
        since = max(head.arrival_s, last.get(key, head.arrival_s))
        overdue = now - since > MAX_WAIT_S
        return (not overdue, 0 if overdue else rows[key], since, head.arrival_s)

    while heads := [queue[0] for key, queue in queues.items() if queue and key not in closed]:
        head = min(heads, key=rank)
        yield head
        queue = queues[head.request.adapter_digest]
        if queue and queue[0] is head:
            closed.add(head.request.adapter_digest)


@settings(max_examples=200, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.sampled_from([None, "a", "b", "c", "d"]), st.integers(0, 40)), max_size=25),
    rows=st.dictionaries(st.sampled_from([None, "a", "b", "c"]), st.integers(0, 4)),
    earlier=st.dictionaries(st.sampled_from([None, "a", "b"]), st.integers(0, 40)),
    admit=st.lists(st.booleans(), max_size=40),
)
def test_heads_come_as_defined(
    arrivals: list[tuple[str | None, int]],
    rows: dict[str | None, int],
    earlier: dict[str | None, int],
    admit: list[bool],
) -> None:
    now = 4.0
    queues, last = WaitingQueues(MAX_WAIT_S), dict[AdapterKey, float]()
    plain: dict[AdapterKey, deque[Sequence]] = {}
    for digest, tenths in sorted(arrivals, key=lambda item: item[1]):
        seq = sequence(digest, tenths / 10)
        queues.add(seq)
        plain.setdefault(digest, deque()).append(seq)
    for key, tenths in earlier.items():
        queues.note_admission(key, tenths / 10)
        if key in plain:
            last[key] = tenths / 10
    counts, plain_counts = Counter(rows), Counter(rows)
    expected = best_again_and_again(plain, last, plain_counts, now)
    decisions = iter(admit)
    for head in queues.heads(counts, now):
        assert next(expected) is head
        key = head.request.adapter_digest
        if next(decisions, False):
            queues.remove(head)
            queues.note_admission(key, now)
            plain[key].popleft()
            last[key] = now
            counts[key] += 1
            plain_counts[key] += 1
    assert next(expected, None) is None
    assert len(queues) == sum(map(len, plain.values())) == len(list(queues))


def test_names_of_waiting_adapters_are_bounded() -> None:
    queues = WaitingQueues(MAX_WAIT_S)
    for number in range(10):
        queues.add(sequence(f"a{number}" if number else None, 0.0))
    assert queues.adapter_names(4) == {"a1", "a2", "a3", "a4"}
    assert len(queues.adapter_names(100)) == 9
