"""Captured steps against the decoder itself: a fake device that replays what it recorded, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.server.engine.graphed_forward import CaptureBudget, GraphedForward
from loraplex.server.engine.kv_cache import KVCache, KVCacheShape
from loraplex.server.engine.model_runner import ModelRunner, build_batch
from loraplex.server.engine.request import GenerationRequest, Logprobs, SamplingParams
from loraplex.server.engine.scheduler import ScheduledSequence
from loraplex.server.engine.sequence import Sequence as EngineSequence
from loraplex.server.engine.step_buffers import StepBuffers, StepLimits
from loraplex.server.engine.step_shapes import StepShape, choose_shapes, step_shapes
from loraplex.server.lora.changes import ReplacedNorm
from loraplex.server.lora.ops.interface import StaticLoraOps
from loraplex.server.models.norms import RmsNorm
from tests.unit.recording_backend import RecordingBackend
from tests.unit.torch_decoder import HIDDEN, MAX_RANK, VOCAB, StaticTorchOps, TorchDecoder, adapter

CPU = torch.device("cpu")
BLOCK, BLOCKS, CONTEXT = 4, 50, 24
LIMITS = StepLimits(max_rows=6, max_context=CONTEXT, block_size=BLOCK, scratch_block=BLOCKS)
ADAPTERS = {index: adapter(index, rank) for index, rank in enumerate((1, 2, 3, MAX_RANK, MAX_RANK + 1))}
TOO_LARGE = 4


def cache() -> KVCache:
    made = KVCache(KVCacheShape(1, 1, HIDDEN, BLOCK, torch.float32), BLOCKS + 1, CPU)
    made.layers[0].k.fill_(float("nan"))  # whatever reads what nobody wrote is found out
    made.layers[0].k[BLOCKS] = 0
    return made


class World:
    """The same requests on captured steps and on the decoder alone, each with a cache of its own."""

    def __init__(self, budget: CaptureBudget | None = None) -> None:
        self.backend, self.decoder, self.cache = RecordingBackend(), TorchDecoder(), cache()
        ops = StaticTorchOps()
        assert isinstance(ops, StaticLoraOps)
        self.graphed = GraphedForward(self.decoder.forward, self.cache, ops, self.backend, LIMITS, VOCAB, CPU)
        self.report = self.graphed.capture(budget or CaptureBudget())
        self.runner = ModelRunner(self.graphed, self.cache, self.graphed.lora_ops, CPU)
        self.plain = ModelRunner(TorchDecoder(), cache(), StaticTorchOps(), CPU)

    def step(self, rows: Sequence[EngineSequence], tokens: Sequence[int]) -> int:
        """Run one step on both, and compare all logits; return how many replays it took."""
        scheduled = [ScheduledSequence(seq, number) for seq, number in zip(rows, tokens, strict=True)]
        before = self.graphed.replays
        found, wanted = (runner.run(scheduled, int, ADAPTERS) for runner in (self.runner, self.plain))
        assert found.keys() == wanted.keys()
        for item in scheduled:
            if item in wanted:
                result, expected = found[item], wanted[item]
                assert isinstance(result, Logprobs)
                assert isinstance(expected, Logprobs)
                assert dict(result.top) == pytest.approx(dict(expected.top), abs=1e-5)
                item.seq.token_ids.append(result.token_id)
            item.seq.num_computed_tokens += item.num_tokens
        return self.graphed.replays - before


def sequences(adapters: Sequence[int | None], prompt: int = 3) -> list[EngineSequence]:
    """Sequences with blocks of their own; the digest of an adapter is its slot."""
    blocks, made = iter(range(BLOCKS)), []
    for index, slot in enumerate(adapters):
        params = SamplingParams(max_tokens=CONTEXT, seed=0, logprobs=VOCAB)
        digest = None if slot is None else str(slot)
        request = GenerationRequest(f"r{index}", tuple(range(1, prompt + 1)), params, adapter_digest=digest)
        seq = EngineSequence(request, choice=0, arrival_s=0.0)
        seq.block_table = [next(blocks) for _ in range(-(-CONTEXT // BLOCK))]
        made.append(seq)
    return made


def after_prompts(world: World, adapters: Sequence[int | None]) -> list[EngineSequence]:
    rows = sequences(adapters)
    for seq in rows:
        world.step([seq], [seq.num_uncomputed_tokens])
    return rows


@pytest.fixture(scope="module")
def shared() -> World:
    return World()


def test_the_shapes_cover_every_step_with_little_padding() -> None:
    for most in (1, 2, 7, 16, 32, 33, 100, 256):
        shapes = step_shapes(most)
        assert shapes[0] == StepShape(most, most), "the one that every step fits in comes first"
        assert len(shapes) < 9 * most.bit_length()
        for rows in range(1, most + 1):
            (chosen,) = choose_shapes(shapes, rows, 0)
            assert chosen.segments == 0, "no adapters, no LoRA"
            assert chosen.rows <= max(2 * rows - 1, 1)
            assert chosen.rows <= 1.5 * rows or rows < 16
            for segments in (1, rows // 2, rows):
                (fits,) = choose_shapes(shapes, rows, segments)
                assert fits.rows == chosen.rows
                assert segments <= fits.segments <= max(1, 4 * segments)
        assert not choose_shapes(shapes, most + 1, 0)


def test_a_step_of_one_token_a_row_is_replayed_and_a_prompt_is_not(shared: World) -> None:
    rows = sequences([None, 1, 1])
    assert shared.step(rows, [3, 3, 3]) == 0
    calls = shared.decoder.calls
    for _ in range(5):
        assert shared.step(rows, [1, 1, 1]) == 1
    assert shared.decoder.calls == calls, "no host code of the decoder runs in a replay"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_run_of_steps_gives_the_decoders_own_logits(data: st.DataObject) -> None:
    """Rows, adapters and their order change from step to step; what another step left behind must not show."""
    world = _world()
    rows = after_prompts(world, data.draw(st.lists(st.sampled_from([None, 0, 1, 2, 3]), min_size=1, max_size=6)))
    for _ in range(data.draw(st.integers(1, 6))):
        chosen = data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=len(rows), unique=True))
        assert world.step(chosen, [1] * len(chosen)) == 1


_WORLDS: list[World] = []


def _world() -> World:
    """Return one world for all examples: what they leave behind is part of the test."""
    if not _WORLDS:
        _WORLDS.append(World())
    return _WORLDS[0]


def test_padding_touches_nothing_but_the_scratch_block(shared: World) -> None:
    rows = after_prompts(shared, [1, 2, None, 3, 0])
    before = shared.cache.layers[0].k.clone()
    written = {seq.block_table[seq.num_computed_tokens // BLOCK] for seq in rows}
    assert shared.step(rows, [1] * 5) == 1, "five rows run as six"
    changed = (~torch.isclose(before, shared.cache.layers[0].k, equal_nan=True)).flatten(1).any(1).nonzero()
    assert set(changed.flatten().tolist()) <= written | {BLOCKS}


def test_every_segment_acts_whatever_the_shape_was_captured_with(shared: World) -> None:
    """More segments than any step before; each row must get its own adapter, not a neighbour's and not none."""
    alone = []
    for slot in range(4):
        (seq,) = after_prompts(shared, [slot])
        shared.step([seq], [1])
        alone.append(seq.output_token_ids)
    rows = after_prompts(shared, [0, 1, 2, 3])
    assert shared.step(rows, [1] * 4) == 1
    assert [seq.output_token_ids for seq in rows] == alone
    assert len(set(map(tuple, alone))) > 1, "or a mix-up would go unnoticed"


def test_what_cannot_be_captured_runs_as_it_is() -> None:
    world = World()
    too_many = after_prompts(world, [None] * 7)
    assert world.step(too_many, [1] * 7) == 0, "more rows than were captured"
    large = after_prompts(world, [1, TOO_LARGE])
    assert world.step(large, [1, 1]) == 0, "a rank beyond what was reserved"
    mixed = after_prompts(world, [1, 2])
    mixed += sequences([None], prompt=5)
    mixed[2].block_table = [40, 41, 42, 43, 44, 45]
    assert world.step(mixed, [1, 1, 2]) == 0, "a chunk of a prompt"
    mixed[2].num_computed_tokens = 2
    assert world.step(mixed, [1, 1, 1]) == 0, "a chunk of one token, which samples nothing"
    assert world.step(mixed[:2], [1, 1]) == 1


def test_an_adapter_with_norms_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    rows = after_prompts(world, [1])
    norm = ReplacedNorm((torch.ones(HIDDEN),), lambda tensors: RmsNorm(tensors[0], 1e-6))
    monkeypatch.setitem(ADAPTERS, 1, replace(ADAPTERS[1], norms={"final": norm}))
    assert world.step(rows, [1]) == 0


def test_a_step_runs_as_the_one_with_the_fewest_sites_that_serves_it() -> None:
    groups = (frozenset[int](), frozenset({0}))
    ops, backend, kv_cache = StaticTorchOps(), RecordingBackend(), cache()
    graphed = GraphedForward(TorchDecoder().forward, kv_cache, ops, backend, LIMITS, VOCAB, CPU, groups)
    shapes = graphed.capture().shapes
    assert choose_shapes(shapes, 2, 1) == [StepShape(2, 1, 0), StepShape(2, 1, 1)]
    assert choose_shapes(shapes, 2, 0) == [StepShape(2, 0)], "no adapters, no groups"
    assert set(ops.reserved) == set(groups)
    runner = ModelRunner(graphed, kv_cache, graphed.lora_ops, CPU)
    rows = sequences([1, 2])
    runner.run([ScheduledSequence(seq, 3) for seq in rows], int, ADAPTERS)
    for seq in rows:
        seq.num_computed_tokens = 3
        seq.token_ids.append(1)
    runner.run([ScheduledSequence(seq, 1) for seq in rows], int, ADAPTERS)
    assert graphed.replays == 1, "the fake operator's adapters act at the second group's site only"


def test_capturing_ends_with_its_budget_and_steps_run_as_the_next_larger_shape() -> None:
    ticks = count()

    def clock() -> float:
        return float(next(ticks))

    world = World(budget=CaptureBudget(max_bytes=250))
    assert [*world.report.shapes] == step_shapes(6)[:3]
    assert world.report.nbytes == 300
    assert not world.report.complete
    rows = after_prompts(world, [1, None])
    assert world.step(rows, [1, 1]) == 1
    limited = GraphedForward(
        TorchDecoder().forward, cache(), StaticTorchOps(), RecordingBackend(), LIMITS, VOCAB, CPU
    ).capture(CaptureBudget(max_seconds=1.5), clock)
    assert len(limited.shapes) == 1


def test_a_full_device_is_told() -> None:
    backend = RecordingBackend(fail_at=2)
    graphed = GraphedForward(TorchDecoder().forward, cache(), StaticTorchOps(), backend, LIMITS, VOCAB, CPU)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        graphed.capture()


def test_a_host_memory_is_not_filled_again_before_it_was_copied() -> None:
    backend = RecordingBackend(lazy=True)
    buffers = StepBuffers(LIMITS, backend, CPU)
    seen: list[list[int]] = []
    static = buffers.batch(6)
    for number in range(1, 6):
        rows = sequences([None] * 2, prompt=number)
        batch = build_batch([ScheduledSequence(_at_end(seq), 1) for seq in rows], int, BLOCK, CPU)
        buffers.load(batch, 6)
        backend.queue.append(lambda: seen.append(static.token_ids.tolist()))
    backend.finish()
    assert seen == [[number, number, 0, 0, 0, 0] for number in range(1, 6)]
    assert static.context_lens.tolist() == [5, 5, 1, 1, 1, 1]
    assert static.block_tables[2:].unique().tolist() == [BLOCKS]
    with pytest.raises(ValueError, match="do not fit"):
        buffers.load(batch, 1)


def _at_end(seq: EngineSequence) -> EngineSequence:
    seq.num_computed_tokens = len(seq.token_ids) - 1
    return seq


def test_the_fake_device_refuses_to_be_read_while_it_records() -> None:
    with pytest.raises(RuntimeError, match="waits for the device"):
        RecordingBackend().capture(lambda: torch.ones(1).item())
