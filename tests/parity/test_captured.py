"""Decode steps that are recorded once and replayed give the bits of steps that are called kernel by kernel."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loraplex.adapters.binding import BoundAdapter, ModuleWeights
from loraplex.server.config import EngineConfig
from loraplex.server.lora.ops.interface import LoraContext, LoraOps, make_lora_ops
from loraplex.server.lora.overrides import find_overrides
from loraplex.server.lora.packing import pack_adapter
from loraplex.server.lora.segments import LoraBatch, build_segments
from loraplex.server.lora.weights import PackedAdapter
from loraplex.server.models import captured as captured_module
from loraplex.server.models.captured import CapturedDecoder
from loraplex.server.models.integer_product import integer_products_available
from loraplex.server.models.loader import LoadedModel, load_model
from loraplex.server.native.program import Program
from tests.parity.adapter_variants import VARIANTS, Draw
from tests.parity.engine_runs import running_engine
from tests.parity.paged_rows import PagedRows
from tests.parity.tiny_models import TinyModel
from tests.unit.fakes import byte_tokenizer

needs_vnni = pytest.mark.skipif(not integer_products_available(), reason="this CPU has no AVX512-VNNI")

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "max_position_embeddings": 512}
LENGTHS = (40, 31, 7, 300)  # the last has a context of two parts
RANKS = (1, 8, 33)
# How many steps each row takes alone or beside the others, and with which adapter: None is the base.
ROWS_IN_TURN = ((0, 1, 2, 3), (0, 1), (0, 1, 2, 3), (1,), (3, 0, 2), (0, 1, 2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    TinyModel("llama", "llama", SIZES).save(path)
    return path


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def adapters(model: LoadedModel) -> dict[int, PackedAdapter]:
    """Return one adapter a slot, of several ranks, the first on the attention alone."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 8

    packed = {}
    for slot, rank in enumerate(RANKS):
        modules = {
            module: ModuleWeights(random(rank, site.in_features), random(end - start, rank), scaling=0.5)
            for site in model.decoder.sites
            for module, (start, end) in site.targets.items()
            if slot or "q_proj" in module
        }
        bound = BoundAdapter(f"rank {rank}", modules)
        packed[slot] = pack_adapter(bound, model.decoder.sites, torch.bfloat16, torch.device("cpu"))
    return packed


def logits(model: LoadedModel, captured: CapturedDecoder | None, slots: dict[int, PackedAdapter]) -> list[torch.Tensor]:
    """Compute prompts of all but the last twenty tokens, then these, some rows at a time, and return every logit."""
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(3, 90, (length,), generator=generator).tolist() for length in LENGTHS]
    rows = PagedRows(model.decoder, sequences, model.dtype, run_by=captured)
    ops = make_lora_ops(torch.device("cpu"))

    def context(entries: object) -> LoraContext | None:
        if not slots:
            return None
        assert isinstance(entries, list)
        segments = build_segments(
            (count, None if row == 2 else row % len(slots), 0.5 + row) for row, _, count in entries
        )
        prepared = ops.prepare(segments, slots)
        return LoraContext(ops, tokens=prepared, logits=prepared)

    rows.advance({row: length - 6 for row, length in enumerate(LENGTHS)}, context)
    for together in ROWS_IN_TURN:
        rows.advance(dict.fromkeys(together, 1), context)
    return [torch.stack(each) for each in rows.logits]


@needs_vnni
@pytest.mark.parametrize("with_adapters", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_replayed_steps_are_the_called_ones(
    folder: Path, quantization: str, with_adapters: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(folder), quantization=quantization, dtype="auto")
    slots = adapters(model) if with_adapters else {}
    runs: list[int] = []
    run = Program.run

    def counted(program: Program, threads: int) -> None:
        runs.append(threads)
        run(program, threads)

    monkeypatch.setattr(Program, "run", counted)
    replayed = logits(model, CapturedDecoder(model.decoder), slots)
    assert runs == [threads] * len(ROWS_IN_TURN)
    for one, other in zip(replayed, logits(model, None, slots), strict=True):
        assert torch.equal(one, other)


class EveryStepAnew:
    """Random rows and adapters of all kinds, packed for each step: where the last step's lay, others lie now."""

    def __init__(self, model: LoadedModel, ops: LoraOps, steps: int) -> None:
        self._model, self._ops = model, ops
        self._bound = {name: make(model.base, Draw(number)) for number, (name, make) in enumerate(VARIANTS.items())}
        plain = self._bound["plain"].modules
        for part in ("q_proj", "down_proj", "lm_head"):
            self._bound[part] = BoundAdapter(part, {name: w for name, w in plain.items() if part in name})
        draw = random.Random(0)
        # Mostly what a program can do, so that steps of one size differ in the sites that are touched.
        names = [None, *self._bound, *("plain", "dora", "bias_on_b", "q_proj", "down_proj", "lm_head") * 3]
        rows = [draw.sample(range(4), draw.randint(1, 4)) for _ in range(steps)]
        self._steps = [{row: draw.choice(names) for row in together} for together in rows]

    def logits(self, captured: CapturedDecoder | None) -> list[torch.Tensor]:
        """Run all steps and return every logit of each row."""
        generator = torch.Generator().manual_seed(1)
        sequences = [torch.randint(3, 90, (len(self._steps),), generator=generator).tolist() for _ in range(4)]
        rows = PagedRows(self._model.decoder, sequences, self._model.dtype, run_by=captured)
        for number, adapters in enumerate(self._steps):
            rows.advance(dict.fromkeys(adapters, 1), self._context(list(adapters.values()), number))
        return [torch.stack(each) for each in rows.logits]

    def _context(self, names: list[str | None], step: int) -> LoraContext | None:
        decoder = self._model.decoder
        dtype = torch.float32 if step % 7 == 6 else torch.bfloat16
        slots = {
            slot: pack_adapter(self._bound[name], decoder.sites, dtype, torch.device("cpu"), decoder.base)
            for slot, name in enumerate(names)
            if name is not None
        }
        scales = [1.0 if slot in slots and slots[slot].holds_one_scale else 0.5 + slot for slot in range(len(names))]
        segments = build_segments((1, slot if slot in slots else None, scales[slot]) for slot in range(len(names)))
        if not segments:
            return None
        prepared = self._ops.prepare(segments, slots)
        return LoraContext(self._ops, prepared, prepared, find_overrides(LoraBatch(segments, segments), slots))


@needs_vnni
def test_whatever_differs_between_two_steps_is_set_anew_or_recorded(tmp_path: Path, threads: int) -> None:
    """A model with windows, steps with and without adapters, of two dtypes, some with what only PyTorch computes."""
    TinyModel("mistral-window", "mistral", SIZES | {"sliding_window": 7}).save(tmp_path)
    model = load_model(str(tmp_path), quantization="nf4", dtype="auto")
    steps = EveryStepAnew(model, make_lora_ops(torch.device("cpu")), 80)
    for one, other in zip(steps.logits(CapturedDecoder(model.decoder)), steps.logits(None), strict=True):
        assert torch.equal(one, other)


@needs_vnni
def test_another_cache_is_refused(folder: Path) -> None:
    """Also by a step that would be recorded: those recorded before have the first one's addresses."""
    model = load_model(str(folder), quantization="nf4", dtype="auto")
    captured = CapturedDecoder(model.decoder)
    first, second = (PagedRows(model.decoder, [[5, 6], [7, 8]], model.dtype, run_by=captured) for _ in range(2))
    first.advance({0: 1})
    with pytest.raises(AssertionError, match="one KV cache"):
        second.advance({0: 1, 1: 1})


@needs_vnni
def test_an_engine_has_replayed_before_its_first_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no request waits while what runs programs is compiled."""
    runs: list[int] = []
    run = Program.run

    def counted(program: Program, threads: int) -> None:
        runs.append(threads)
        run(program, threads)

    monkeypatch.setattr(Program, "run", counted)
    model = load_model(str(folder), quantization="nf4", dtype="auto")
    no_adapters: dict[str, BoundAdapter] = {}
    with running_engine(model, byte_tokenizer(), EngineConfig(kv_cache_memory=2**20), no_adapters.__getitem__):
        assert runs


@needs_vnni
def test_programs_that_were_let_go_are_recorded_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_module, "MOST_PROGRAMS", 1)
    model = load_model(str(folder), quantization="nf4", dtype="auto")
    slots = adapters(model)
    for one, other in zip(
        logits(model, CapturedDecoder(model.decoder), slots), logits(model, None, slots), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_what_pytorch_computes_is_not_recorded(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LayerNorm, dense products: a program without them would be wrong."""
    monkeypatch.setattr(Program, "run", lambda self, threads: pytest.fail("a program ran"))
    sizes = {"n_positions": 512} if model_type == "gpt2" else {"max_position_embeddings": 512}
    TinyModel(model_type, model_type, sizes).save(tmp_path)
    model = load_model(str(tmp_path), quantization="none", dtype="float32")
    for one, other in zip(logits(model, CapturedDecoder(model.decoder), {}), logits(model, None, {}), strict=True):
        assert torch.equal(one, other)
