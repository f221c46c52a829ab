"""The engine around a fake model: any schedule gives every request exactly its own answer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.server.engine.commands import (
    AbortRequest,
    AddRequest,
    ForgetAdapter,
    Stop,
)
from loraplex.server.engine.request import FinishReason, GenerationRequest, Usage
from loraplex.server.engine.stats import NullObserver, RequestStats, StepStats
from loraplex.server.errors import (
    DeadlineError,
    EngineError,
    UnavailableError,
)
from tests.unit.engine_driving import Outbox, check_integrity, request, run
from tests.unit.fakes import FakeDecoder, expected_tokens, make_engine


def test_a_request_gets_its_tokens_usage_and_reason() -> None:
    outbox = Outbox()
    engine = make_engine(outbox)
    engine.submit(AddRequest(request("r", [5, 6, 7], max_tokens=6)))
    run(engine)
    assert outbox.tokens("r") == expected_tokens([5, 6, 7], 6)
    last = outbox.last("r")
    assert last.finished
    assert last.usage == Usage(prompt_tokens=3, completion_tokens=6, cached_tokens=0)
    assert last.choices[0].finish_reason is FinishReason.LENGTH


Action = tuple[str, int, int, int]
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 20), st.integers(0, 5)),
        st.tuples(st.just("abort"), st.integers(0, 30), st.just(0), st.just(0)),
        st.tuples(st.just("forget"), st.integers(1, 4), st.just(0), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 6), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(
    actions=ACTIONS,
    num_blocks=st.integers(14, 30),
    capacity=st.integers(1, 5),
    host_capacity=st.integers(0, 8),
    caching=st.booleans(),
    fanout=st.integers(1, 3),
)
def test_every_request_gets_its_own_answer(
    actions: list[Action], num_blocks: int, capacity: int, host_capacity: int, caching: bool, fanout: int
) -> None:
    """Arrivals, cancellations, preemptions, evictions and unregistrations in any order change no request's tokens."""
    outbox = Outbox()
    engine = make_engine(
        outbox,
        num_blocks=num_blocks,
        capacity=capacity,
        host_capacity=host_capacity,
        enable_prefix_caching=caching,
        max_model_len=56,
    )
    added: dict[str, GenerationRequest] = {}
    aborted: set[str] = set()
    forgets = 0
    for kind, a, b, c in actions:
        if kind == "add":
            # Few different prompts, so that prefixes are shared; scale 0.5 for one adapter in three, one that begins to
            # act somewhere in the prompt, one that may not act at all.
            prompt = [7] * (a // 2) + [a]
            digest, scale = (f"adapter-{c}", 0.5 if c == 3 else 1.0) if c else (None, 1.0)
            start = {4: b % len(prompt), 5: 0 if b % 2 else None}.get(c, 0)
            req = request(
                f"r{len(added)}",
                prompt,
                max_tokens=b,
                n=fanout,
                adapter_digest=digest,
                adapter_scale=scale,
                adapter_start=start,
            )
            added[req.request_id] = req
            engine.submit(AddRequest(req))
        elif kind == "abort" and f"r{a}" in added:
            aborted.add(f"r{a}")
            engine.submit(AbortRequest(f"r{a}"))
        elif kind == "forget":
            engine.submit(ForgetAdapter(f"adapter-{a}", ticket=forgets))
            forgets += 1
        elif kind == "step":
            for _ in range(a):
                engine.step()
                check_integrity(engine)
    run(engine)
    engine.step()  # a request that was aborted last ended before anything ran
    check_integrity(engine)
    for name, req in added.items():
        count = req.params.max_tokens
        expected = expected_tokens(
            req.prompt_token_ids, count, req.acting_digest, req.adapter_scale, req.adapter_start or 0
        )
        for choice in range(fanout):
            tokens = outbox.tokens(name, choice)
            if name in aborted:
                assert tokens == expected[: len(tokens)]
            else:
                assert tokens == expected
    assert engine._parts.blocks.num_free_blocks == num_blocks
    assert len(outbox.forgotten) == forgets


def test_an_abort_frees_row_and_blocks_at_the_next_step() -> None:
    outbox = Outbox()
    engine = make_engine(outbox, num_blocks=16)
    engine.submit(AddRequest(request("r", [1] * 9, max_tokens=30)))
    engine.step()
    assert engine._parts.blocks.num_free_blocks < 16
    engine.submit(AbortRequest("r"))
    engine.step()
    assert engine._parts.blocks.num_free_blocks == 16
    assert not engine.has_work
    assert not outbox.last("r").finished, "an aborted request gets no further output"


def test_aborting_what_is_unknown_is_nothing() -> None:
    engine = make_engine(Outbox())
    engine.submit(AbortRequest("never"))
    assert engine.step() is False


def test_a_failing_step_loses_only_its_requests() -> None:
    outbox = Outbox()
    engine = make_engine(outbox, decoder=FakeDecoder(fail_on=99))
    engine.submit(AddRequest(request("bad", [99])))
    engine.step()
    engine.submit(AddRequest(request("good", [1, 2])))
    run(engine)
    assert isinstance(outbox.last("bad").error, EngineError)
    assert outbox.tokens("good") == expected_tokens([1, 2], 8)
    check_integrity(engine)


def test_a_passed_deadline_ends_the_request() -> None:
    outbox = Outbox()
    engine = make_engine(outbox)
    engine.submit(AddRequest(request("r", [1], deadline=0.0)))
    run(engine)
    assert isinstance(outbox.last("r").error, DeadlineError)


def test_stop_tells_the_living() -> None:
    outbox = Outbox()
    engine = make_engine(outbox)
    engine.submit(AddRequest(request("r", [1], max_tokens=100)))
    engine.submit(Stop())
    engine.run()
    assert isinstance(outbox.last("r").error, UnavailableError)


@pytest.mark.parametrize("at", [0, 3])
def test_a_stop_token_ends_the_choice(at: int) -> None:
    tokens = expected_tokens([1, 2, 3], 8)
    outbox = Outbox()
    engine = make_engine(outbox)
    engine.submit(AddRequest(request("r", [1, 2, 3], stop_token_ids=(tokens[at],))))
    run(engine)
    assert outbox.tokens("r") == tokens[: tokens.index(tokens[at]) + 1]
    assert outbox.last("r").choices[0].finish_reason is FinishReason.STOP


def test_the_context_ends_a_choice() -> None:
    outbox = Outbox()
    engine = make_engine(outbox, max_model_len=10)
    engine.submit(AddRequest(request("r", [1] * 6, max_tokens=100)))
    run(engine)
    assert len(outbox.tokens("r")) == 4
    assert outbox.last("r").choices[0].finish_reason is FinishReason.LENGTH


def test_later_choices_find_the_prompt_in_the_cache() -> None:
    outbox, decoder = Outbox(), FakeDecoder()
    engine = make_engine(outbox, decoder=decoder)
    engine.submit(AddRequest(request("r", [1] * 9, n=3, max_tokens=2)))
    run(engine)
    assert [outbox.tokens("r", choice) for choice in range(3)] == [expected_tokens([1] * 9, 2)] * 3
    assert engine._parts.scheduler.prefix_hits == 16, "two choices found two blocks each"
    assert outbox.last("r").usage == Usage(9, 6, 0)


class Recorder(NullObserver):
    """Keeps what the engine reports."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.requests: list[RequestStats] = []

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_request(self, stats: RequestStats) -> None:
        self.requests.append(stats)


def test_the_observer_sees_every_token_and_request_once() -> None:
    recorder = Recorder()
    engine = make_engine(Outbox(), observer=recorder, num_blocks=14, max_model_len=56)
    for index in range(6):
        engine.submit(AddRequest(request(f"r{index}", [index] * 9, max_tokens=20, adapter_name=f"n{index}")))
    run(engine)
    tokens = [token for step in recorder.steps for token in step.tokens]
    assert len(tokens) == 6 * 20
    assert sum(token.prompt_tokens for token in tokens) == 6 * 9
    assert sum(token.time_to_first_token_s is not None for token in tokens) == 6
    assert len(recorder.requests) == 6
    assert recorder.steps[-1].num_preemptions > 0, "the pool was meant to be too small"
    assert recorder.steps[-1].num_running == 0
