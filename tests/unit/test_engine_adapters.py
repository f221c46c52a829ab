"""The engine and its adapters: loaded, activated, pinned and forgotten around a fake model."""

from __future__ import annotations

import time

import torch

from loraplex.server.engine.commands import (
    AddRequest,
    ForgetAdapter,
    PinAdapter,
    UnpinAdapter,
)
from loraplex.server.engine.request import Usage
from loraplex.server.engine.stats import AdapterMemory, FreedMemory
from loraplex.server.errors import (
    NotFoundError,
    ResourceExhaustedError,
)
from loraplex.server.lora.weights import PackedAdapter
from tests.unit.engine_driving import Outbox, check_integrity, request, run
from tests.unit.fakes import FakeDecoder, Unmovable, expected_tokens, make_engine, packed


def test_adapters_and_base_share_a_step() -> None:
    outbox, decoder = Outbox(), FakeDecoder()
    engine = make_engine(outbox, decoder=decoder)
    for name, digest in (("a", "x"), ("b", "y"), ("c", "z"), ("d", None)):
        engine.submit(AddRequest(request(name, [1, 2], adapter_digest=digest, max_tokens=40)))
    run(engine)
    assert max(decoder.batch_sizes) == 4
    assert max(decoder.adapters_in_batch) == 3
    assert outbox.tokens("b") == expected_tokens([1, 2], 40, "y")


def test_an_activated_adapter_reads_its_prompt_from_the_base_cache() -> None:
    outbox = Outbox()
    engine = make_engine(outbox)
    prompt = list(range(1, 15))
    engine.submit(AddRequest(request("base", prompt, max_tokens=1)))
    run(engine)
    engine.submit(AddRequest(request("r", prompt, adapter_digest="x", adapter_start=9, max_tokens=5)))
    run(engine)
    assert outbox.tokens("r") == expected_tokens(prompt, 5, "x", start=9)
    assert outbox.last("r").usage == Usage(prompt_tokens=14, completion_tokens=5, cached_tokens=8)
    assert outbox.last("r").adapter_digest == "x"


def test_an_adapter_that_is_not_invoked_is_neither_loaded_nor_named() -> None:
    def load(digest: str) -> PackedAdapter:
        raise NotFoundError(f"{digest} is asked for")

    outbox = Outbox()
    engine = make_engine(outbox, load=load)
    engine.submit(AddRequest(request("r", [1, 2, 3], adapter_digest="x", adapter_start=None, max_tokens=5)))
    run(engine)
    assert outbox.tokens("r") == expected_tokens([1, 2, 3], 5)
    assert outbox.last("r").adapter_digest is None


def test_an_adapter_that_cannot_be_loaded_fails_its_request() -> None:
    def load(digest: str) -> PackedAdapter:
        if digest == "gone":
            raise NotFoundError("no such blob")
        return packed(digest)

    outbox = Outbox()
    engine = make_engine(outbox, load=load)
    engine.submit(AddRequest(request("r", [1], adapter_digest="gone")))
    engine.submit(AddRequest(request("s", [1], adapter_digest="fine")))
    run(engine)
    assert isinstance(outbox.last("r").error, NotFoundError)
    assert outbox.tokens("s") == expected_tokens([1], 8, "fine")


def test_an_adapter_larger_than_the_memory_is_refused() -> None:
    outbox = Outbox()
    engine = make_engine(outbox, load=lambda digest: packed(digest, nbytes=1000))
    engine.submit(AddRequest(request("r", [1], adapter_digest="huge")))
    run(engine)
    error = outbox.last("r").error
    assert isinstance(error, ResourceExhaustedError)
    assert "--adapter-device-memory" in str(error)


def test_pins_keep_an_adapter_and_can_fill_the_memory() -> None:
    outbox = Outbox()
    engine = make_engine(outbox, capacity=1)
    engine.submit(PinAdapter("pinned"))
    while engine.resident != {"pinned"}:
        engine.step()
    engine.submit(AddRequest(request("r", [1], adapter_digest="other")))
    run(engine)
    assert isinstance(outbox.last("r").error, ResourceExhaustedError)
    engine.submit(UnpinAdapter("pinned"))
    engine.submit(AddRequest(request("s", [1], adapter_digest="other")))
    run(engine)
    assert outbox.tokens("s") == expected_tokens([1], 8, "other")


def test_an_adapter_is_forgotten_with_its_last_request() -> None:
    outbox = Outbox()
    engine = make_engine(outbox, host_capacity=10, load=lambda digest: packed(digest, 2), max_num_seqs=1)
    for name in ("running", "waiting"):
        engine.submit(AddRequest(request(name, [1], adapter_digest="x")))
    while not outbox.outputs:
        engine.step()
    engine.submit(ForgetAdapter("x", ticket=1))
    engine.submit(ForgetAdapter("x", ticket=2))
    engine.step()
    assert engine.memory("x") == AdapterMemory(2, 2)
    assert engine.held == {"x"}
    while engine.has_work:
        assert not outbox.forgotten
        engine.step()
    assert outbox.forgotten == {1: FreedMemory(2, 2), 2: FreedMemory()}, "the same bytes come free once"
    assert engine.memory("x") == AdapterMemory()
    assert not engine.held
    engine.submit(ForgetAdapter("never seen", ticket=3))
    engine.step()
    assert outbox.forgotten[3] == FreedMemory()


def test_a_pin_keeps_what_was_to_be_forgotten() -> None:
    """The same content was registered again while its last request ran."""
    outbox = Outbox()
    engine = make_engine(outbox)
    engine.submit(AddRequest(request("r", [1], adapter_digest="x")))
    while not outbox.outputs:
        engine.step()
    engine.submit(ForgetAdapter("x", ticket=1))
    engine.submit(PinAdapter("x"))
    run(engine)
    assert outbox.forgotten == {1: FreedMemory()}
    assert engine.resident == {"x"}


def test_choices_of_one_request_that_cannot_return_end_it_together() -> None:
    outbox = Outbox()
    engine = make_engine(
        outbox, num_blocks=8, capacity=100, host_capacity=200, load=lambda digest: packed(digest, 60), max_model_len=32
    )
    engine.submit(AddRequest(request("old", [1, 2, 3, 4], max_tokens=28, ignore_eos=True)))
    engine.step()
    engine.submit(AddRequest(request("two", [5, 6], adapter_digest="x", n=2, max_tokens=26, ignore_eos=True)))
    scheduler = engine._parts.scheduler
    for _ in range(1000):
        engine.step()
        if scheduler.num_preemptions >= 2 and len(scheduler.running) == 1:
            break
    assert [seq.request.request_id for seq in scheduler.running] == ["old"]
    # The pinned adapter takes the place that both choices need to come back.
    engine.submit(PinAdapter("big"))
    run(engine)
    assert isinstance(outbox.last("two").error, ResourceExhaustedError)
    assert sum(output.finished for output in outbox.outputs["two"]) == 1
    assert outbox.tokens("old") == expected_tokens([1, 2, 3, 4], 28)
    check_integrity(engine)


def test_a_device_without_memory_fails_only_the_requests_for_what_it_has_no_room_for() -> None:
    loaded: list[str] = []

    def load(digest: str) -> PackedAdapter:
        loaded.append(digest)
        full = [torch.OutOfMemoryError("none left")] * 1000
        return Unmovable.make(digest, *full) if digest == "x" else packed(digest)

    outbox = Outbox()
    engine = make_engine(outbox, load=load)
    engine.submit(PinAdapter("x"))
    for name, digest in (("a", "x"), ("b", "y"), ("c", None)):
        engine.submit(AddRequest(request(name, [1, 2], adapter_digest=digest)))
    run(engine)
    assert isinstance(outbox.last("a").error, ResourceExhaustedError)
    assert outbox.tokens("b") == expected_tokens([1, 2], 8, "y")
    assert outbox.tokens("c") == expected_tokens([1, 2], 8)
    tries = loaded.count("x")
    for _ in range(20):
        engine.step()
        time.sleep(0.001)
    assert loaded.count("x") == tries, "the pin is not tried for ever"
    check_integrity(engine)
