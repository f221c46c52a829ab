"""No request's tokens depend on arrivals, cancellations, preemptions, or adapters that come and go.

A tiny random Llama in fp32 with adapters made by PEFT, the real engine, the real registry. What happens is drawn by
hypothesis; every request must get the tokens that it gets alone, in an engine of its own. The one excuse is a near-tie
of the two best logits, which rounding may decide; how often it was needed is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex.adapters.errors import NotFoundError
from loraplex.adapters.registry import AdapterRegistry
from loraplex.adapters.traits import AdapterTraits
from loraplex.server.config import EngineConfig
from loraplex.server.engine.commands import AbortRequest, AddRequest, ForgetAdapter
from loraplex.server.engine.limits import kv_cache_shape
from loraplex.server.engine.request import GenerationRequest, Logprobs, SamplingParams
from loraplex.server.lora.packing import packed_nbytes
from loraplex.server.models.loader import LoadedModel, load_model
from tests.parity.engine_runs import EngineRun, running_engine
from tests.parity.peft_adapters import RandomAdapter, save_random_adapters
from tests.parity.peft_formats import PeftFormat
from tests.parity.random_traffic import (
    ACTIONS,
    BLOCK_SIZE,
    BUDGETS,
    CONTENTS,
    LONGEST,
    MAX_TOKENS,
    NAMES,
    STORY,
    Abort,
    Action,
    Add,
    Budgets,
    Register,
    Steps,
    Together,
    Unregister,
)
from tests.parity.tiny_models import TinyModel
from tests.unit.fakes import VOCAB, byte_tokenizer

pytestmark = pytest.mark.slow

# Two logits this close may be rounded into either order.
NEAR_TIE = 1e-3
LLAMA = TinyModel(
    "isolation",
    "llama",
    {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    },
)


@dataclass
class Tally:
    """What all examples together have seen."""

    tokens: int = 0
    excuses: int = 0
    preemptions: int = 0
    evictions: int = 0
    aborted: int = 0
    prefix_hits: int = 0
    replaced_while_running: int = 0
    largest_mix: int = 0
    digests: set[str] = field(default_factory=set)


class World:
    """Model, adapters and registry, which all examples share; and what each request gets alone."""

    def __init__(self, model: LoadedModel, registry: AdapterRegistry, folders: tuple[Path, ...]) -> None:
        self.model = model
        self.registry = registry
        self.folders = folders
        self.tokenizer = byte_tokenizer()
        records = [registry.register(f"sizes-{i}", folder).record for i, folder in enumerate(folders)]
        self.traits = {record.digest: record.traits for record in records}
        sites, base, digests = model.decoder.sites, model.decoder.base, list(self.traits)
        self.adapter_bytes = [packed_nbytes(registry.load(digest), sites, torch.float32, base) for digest in digests]
        # Kept registered while solo runs are made of contents that the example has dropped.
        self._solo_weights = {digest: registry.load(digest) for digest in digests}
        for i in range(len(folders)):
            registry.unregister(f"sizes-{i}")
        self.solo = cache(self._solo)

    def config(self, budgets: Budgets) -> EngineConfig:
        largest = max(self.adapter_bytes)
        shape = EngineConfig(block_size=BLOCK_SIZE)
        return EngineConfig(
            max_num_seqs=budgets.rows,
            max_num_batched_tokens=budgets.tokens_per_step,
            max_model_len=LONGEST,
            block_size=BLOCK_SIZE,
            kv_cache_memory=budgets.blocks * kv_cache_shape(self.model, shape).block_bytes,
            adapter_device_memory=int(largest + budgets.extra_adapter_share * (sum(self.adapter_bytes) - largest)),
            enable_prefix_caching=budgets.caching,
        )

    def request(
        self, request_id: str, prompt: tuple[int, ...], params: SamplingParams, digest: str | None, scale: float
    ) -> GenerationRequest:
        """Ask as the server would."""
        traits = self.traits[digest] if digest else AdapterTraits()
        scale = 1.0 if traits.fixed_scale else scale
        return GenerationRequest(
            request_id,
            prompt,
            params,
            adapter_digest=digest,
            adapter_scale=scale,
            adapter_start=traits.start_in(prompt),
        )

    def _solo(self, prompt: tuple[int, ...], digest: str | None, scale: float) -> list[Logprobs]:
        """Return the longest answer to `prompt` from an engine that does nothing else, with the best logprobs."""
        params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, seed=0, logprobs=8)
        request = self.request("solo", prompt, params, digest, scale)
        config = EngineConfig(enable_prefix_caching=False, kv_cache_memory=2**20, max_model_len=LONGEST)
        with running_engine(self.model, self.tokenizer, config, self._solo_weights.__getitem__) as run:
            run.finish(request)
            return run.outputs.logprobs("solo")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("isolation")
    llama = LLAMA.save(root / "model")
    for content in CONTENTS:
        if isinstance(content, PeftFormat):
            content.save(llama, root / "adapters" / content.name)
    save_random_adapters(llama, [c for c in CONTENTS if isinstance(c, RandomAdapter)], root / "adapters")
    model = load_model(str(root / "model"), dtype="float32")
    registry = AdapterRegistry(root / "registry", model.base, allowed_roots=[root / "adapters"])
    yield World(model, registry, tuple(root / "adapters" / content.name for content in CONTENTS))
    registry.close()


@dataclass
class Example:
    """One example: the engine under test, and what was asked of it."""

    world: World
    run: EngineRun
    requests: dict[str, GenerationRequest] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    held: dict[str, str] = field(default_factory=dict)
    replaced_while_running: int = 0
    numbers: Iterator[int] = field(default_factory=count)

    def do(self, action: Action) -> None:
        match action:
            case Together(adds):
                for add in adds:
                    self._add(add)
            case Abort(number):
                self._abort(number)
            case Register(name, content):
                registration = self.world.registry.register(name, self.world.folders[content])
                if registration.previous_digest not in (None, registration.record.digest):
                    self._forget(registration.previous_digest or "")
            case Unregister(name):
                self._unregister(name)
            case Steps(number):
                for _ in range(number):
                    self.run.step()
                    self.run.check_integrity()
                self._release_finished()

    def end(self) -> None:
        """Let everything finish; nothing may be left held."""
        self.run.finish()
        self.run.check_integrity()
        self._release_finished()
        for name in NAMES:
            self._unregister(name)
        self.world.registry.check_integrity()

    def _add(self, action: Add) -> None:
        request_id = f"r{next(self.numbers)}"
        digest = None
        if action.name is not None:
            try:
                digest = self.world.registry.acquire(action.name).digest
            except NotFoundError:
                return
            self.held[request_id] = digest
        params = SamplingParams(max_tokens=action.max_tokens, ignore_eos=True, seed=0, n=action.choices)
        prompt = (*STORY[: action.length], action.tail)
        request = self.world.request(request_id, prompt, params, digest, action.scale)
        self.requests[request_id] = request
        self.run.engine.submit(AddRequest(request))

    def _abort(self, number: int) -> None:
        names = list(self.requests)
        if number >= len(names) or self.run.outputs.finished(names[-1 - number]):
            return
        request_id = names[-1 - number]
        self.aborted.add(request_id)
        # As the server does: the weights may be gone from the store before the engine has heard of it.
        self.run.engine.submit(AbortRequest(request_id))
        self._release(request_id)

    def _unregister(self, name: str) -> None:
        try:
            self._forget(self.world.registry.unregister(name).digest)
        except NotFoundError:
            return

    def _forget(self, digest: str) -> None:
        self.replaced_while_running += digest in self.held.values()
        self.run.engine.submit(ForgetAdapter(digest))

    def _release_finished(self) -> None:
        for request_id in [r for r in self.held if self.run.outputs.finished(r)]:
            self._release(request_id)

    def _release(self, request_id: str) -> None:
        if request_id in self.held:
            self.world.registry.release(self.held.pop(request_id))


def compare(tokens: list[int], solo: list[Logprobs], complete: bool, wanted: int) -> tuple[int, int]:
    """Hold a choice against its solo run; return how many tokens were compared, and how often the excuse was used."""
    if complete:
        assert len(tokens) == wanted
    for index, (token, alone) in enumerate(zip(tokens, solo, strict=False)):
        if token != alone.token_id:
            logprobs = dict(alone.top)
            gap = alone.logprob - logprobs.get(token, float("-inf"))
            assert gap < NEAR_TIE, f"token {index} is {token}, alone {alone.token_id}; the logits differ by {gap}"
            return index + 1, 1
    return len(tokens), 0


def check(example: Example, tally: Tally) -> None:
    outputs = example.run.outputs
    for request_id, request in example.requests.items():
        error = outputs.error(request_id)
        assert error is None, f"{request_id}: {error!r}"
        complete = request_id not in example.aborted
        assert outputs.finished(request_id) or not complete
        scale = request.adapter_scale if request.adapter_digest else 1.0
        if request.acting_digest is not None:
            tally.digests.add(request.acting_digest)
        solo = example.world.solo(request.prompt_token_ids, request.adapter_digest, scale)
        for choice in range(request.params.n):
            tokens = outputs.tokens(request_id, choice)
            compared, excused = compare(tokens, solo, complete, request.params.max_tokens)
            tally.tokens += compared
            tally.excuses += excused
    recorder = example.run.recorder
    tally.aborted += len(example.aborted)
    tally.replaced_while_running += example.replaced_while_running
    if recorder.steps:
        tally.preemptions += recorder.steps[-1].num_preemptions
        tally.prefix_hits += recorder.steps[-1].prefix_hits
        tally.largest_mix = max(tally.largest_mix, *(step.num_adapters for step in recorder.steps))
    if recorder.memory is not None:
        tally.evictions += recorder.memory.device.evictions


def run_example(world: World, contents: list[int], actions: list[Action], budgets: Budgets, tally: Tally) -> None:
    with running_engine(world.model, world.tokenizer, world.config(budgets), world.registry.load) as run:
        example = Example(world, run)
        try:
            for name, content in zip(NAMES, contents, strict=False):
                example.do(Register(name, content))
            for action in actions:
                example.do(action)
        finally:
            example.end()
        check(example, tally)


def properties(world: World, tally: Tally) -> Callable[[], None]:
    """Return the property test; it is made here because hypothesis cannot share module fixtures with examples."""

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        contents=st.permutations(range(len(CONTENTS))),
        actions=st.lists(ACTIONS, min_size=10, max_size=30),
        budgets=BUDGETS,
    )
    def every_request_gets_its_own_tokens(contents: list[int], actions: list[Action], budgets: Budgets) -> None:
        run_example(world, contents, actions, budgets, tally)

    return every_request_gets_its_own_tokens


def test_no_request_depends_on_the_others(world: World) -> None:
    tally = Tally()
    properties(world, tally)()
    print(tally)
    assert tally.tokens > 1000
    assert tally.excuses < 0.02 * tally.tokens, tally
    # The examples were meant to make all of this happen.
    happened: Mapping[str, int] = {name: value for name, value in vars(tally).items() if name != "excuses"}
    assert all(happened.values()), tally
    assert tally.largest_mix >= 2
    assert len(tally.digests) == len(CONTENTS)


def test_the_adapters_change_the_tokens(world: World) -> None:
    """Otherwise a mix-up would go unnoticed."""
    solos = {tuple(entry.token_id for entry in world.solo((*STORY, 0), None, 1.0))}
    scales = {digest: (1.0,) if traits.fixed_scale else (1.0, 0.5, -2.0) for digest, traits in world.traits.items()}
    for digest in scales:
        for scale in scales[digest]:
            solos.add(tuple(entry.token_id for entry in world.solo((*STORY, 0), digest, scale)))
    assert len(solos) == 1 + sum(map(len, scales.values()))
