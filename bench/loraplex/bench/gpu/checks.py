"""Whether everything that runs on a GPU is right there: kernels, the whole decoder, captured steps, isolation.

Each check compares with something else than what it checks: the operators' fp32 definitions, transformers, steps run as
they are, rows alone. Differences are relative to the largest number compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from loraplex.adapters.binding import BoundAdapter
from loraplex.bench.gpu.nf4 import LookedUpLinear, nf4_linear, quantize
from loraplex.bench.gpu.random_model import config_values, random_model
from loraplex.bench.gpu.stage import Stage, attention_kernels, lora_kernels, random_adapter, random_weights, step
from loraplex.bench.gpu.step_model import ALL_LINEAR, DecoderShape, Weights
from loraplex.server.attention.interface import AttentionParams
from loraplex.server.attention.reference import ReferenceAttention
from loraplex.server.engine.graphed_forward import CaptureBudget
from loraplex.server.engine.kv_cache import LayerKVCache
from loraplex.server.engine.model_runner import build_batch
from loraplex.server.engine.scheduler import ScheduledSequence
from loraplex.server.engine.sequence import Sequence as EngineSequence
from loraplex.server.lora.ops.reference import ReferenceLoraOps
from loraplex.server.lora.packing import pack_adapter
from loraplex.server.lora.segments import build_segments
from loraplex.server.lora.weights import PackedAdapter
from loraplex.server.models.loader import LoadedModel

ALLOWED = {torch.float32: 2e-4, torch.bfloat16: 4e-2}
"""Of a whole decoder; single kernels are held to a quarter."""


@dataclass(frozen=True)
class Check:
    """What was compared, how far apart it was, and how far it may be."""

    what: str
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether it is right; NaN is not."""
        return self.difference <= self.allowed


@dataclass(frozen=True)
class CheckSize:
    """How much is checked: the decoder's shapes, rows of kernel checks, ranks of adapters, tokens of a context."""

    shapes: tuple[DecoderShape, ...]
    rows: tuple[int, ...] = (1, 5, 16, 33)
    ranks: tuple[int, ...] = (1, 8, 24, 64, 256)
    dtypes: tuple[torch.dtype, ...] = tuple(ALLOWED)
    context: int = 200


def run_checks(device: torch.device, size: CheckSize, say: Callable[[Check], None]) -> bool:
    """Run every check, tell each, and return whether all passed."""
    passed = True
    for shape in size.shapes:
        for dtype in size.dtypes:
            for check in _of_shape(shape, dtype, device, size):
                say(check)
                passed = passed and check.passed
    return passed


def _of_shape(shape: DecoderShape, dtype: torch.dtype, device: torch.device, size: CheckSize) -> Iterator[Check]:
    name = f"{shape.name} {str(dtype).removeprefix('torch.')}"
    model = random_model(shape, "bfloat16", attention_kernels(), device, dtype=dtype, max_positions=512)
    yield from _lora(name, model, device, size)
    yield from _attention(name, model, size)
    yield _product(name, shape, dtype, device)
    yield from _transformers(name, shape, dtype, device, size)
    kinds: tuple[Weights, ...] = ("bfloat16", "nf4") if shape.hidden % 64 == 0 else ("bfloat16",)
    for weights in kinds:
        held = (
            model if weights == "bfloat16" else random_model(shape, weights, attention_kernels(), device, dtype=dtype)
        )
        yield from _steps(f"{name}, weights {'as they are' if weights == 'bfloat16' else weights}", held, size)


def _lora(name: str, model: LoadedModel, device: torch.device, size: CheckSize) -> Iterator[Check]:
    ops, oracle = lora_kernels(device, model.dtype), ReferenceLoraOps()
    slots = {i: random_adapter(model, rank, ALL_LINEAR, i) for i, rank in enumerate(size.ranks)}
    for rows in size.rows:
        # A row in three has no adapter, and one adapter has a long segment.
        slot_of = [None if row % 3 == 2 else row % len(slots) for row in range(rows)]
        entries = [(1 if row % 7 else 3, slot, 0.5 + row % 2) for row, slot in enumerate(slot_of)]
        segments, tokens = build_segments(entries), sum(length for length, _, _ in entries)
        prepared, expected = ops.prepare(segments, slots), oracle.prepare(segments, slots)
        worst = 0.0
        for site in range(4):
            linear = model.decoder.sites[site]
            x = torch.randn(tokens, linear.in_features, device=device).to(model.dtype)
            y = torch.randn(tokens, linear.out_features, device=device).to(model.dtype)
            wanted = y.clone()
            ops.add(y, x, site, prepared)
            oracle.add(wanted, x, site, expected)
            worst = max(worst, _apart(y, wanted))
        yield Check(f"{name}: LoRA kernels, {rows} rows", worst, ALLOWED[model.dtype] / 4)


def _attention(name: str, model: LoadedModel, size: CheckSize) -> Iterator[Check]:
    config = model.decoder.config
    stage = Stage(model, max(size.rows), size.context)
    for rows in size.rows:
        lengths = [1 + (37 * row) % size.context for row in range(rows)]
        seqs = stage.sequences([[0] * length for length in lengths], [None] * rows)
        for row, seq in enumerate(seqs):  # decodes, and prompts of up to 40 tokens behind some context
            seq.num_computed_tokens = max(0, lengths[row] - (1 if row % 4 else 40))
        items = [ScheduledSequence(seq, seq.num_uncomputed_tokens) for seq in seqs]
        items.sort(key=lambda item: item.num_tokens != 1)
        batch = build_batch(items, int, 16, torch.device(model.device))
        tokens = len(batch.token_ids)
        q, k, v = (
            torch.randn(tokens, heads, config.head_dim, device=model.device).to(model.dtype)
            for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        )
        params = AttentionParams(config.head_dim**-0.5)
        layer = stage.cache.layers[0]
        own = LayerKVCache(layer.k.clone(), layer.v.clone())
        found = attention_kernels()(q, k, v, layer, batch, params)
        wanted = ReferenceAttention()(q, k, v, own, batch, params)
        difference = max(_apart(found, wanted), _apart(layer.k, own.k), _apart(layer.v, own.v))
        yield Check(f"{name}: attention, {rows} rows", difference, ALLOWED[model.dtype] / 4)


def _product(name: str, shape: DecoderShape, dtype: torch.dtype, device: torch.device) -> Check:
    matrix = quantize(torch.randn(shape.intermediate // 64 * 64, 128, device=device))
    worst = 0.0
    for rows in (1, 4, 8, 17, 64):
        x = torch.randn(rows, 128, device=device).to(dtype)
        wanted = x.float() @ LookedUpLinear(matrix, torch.float32).dequantize().T
        worst = max(worst, _apart(nf4_linear(matrix, dtype)(x), wanted))
    return Check(f"{name}: NF4 product", worst, ALLOWED[dtype] / 4)


def _transformers(
    name: str, shape: DecoderShape, dtype: torch.dtype, device: torch.device, size: CheckSize
) -> Iterator[Check]:
    """Compare prompts and a decode step, every row with an adapter of its own, with transformers in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}[shape.architecture]
    torch.manual_seed(1)
    make: Any = AutoModelForCausalLM.from_config
    theirs = make(AutoConfig.for_model(family, **config_values(shape, 512))).float().eval().to(device)
    state = {key: value.detach() for key, value in theirs.state_dict().items()}
    model = random_model(shape, "bfloat16", attention_kernels(), device, dtype=dtype, max_positions=512, state=state)
    bound = [random_weights(model, rank, ALL_LINEAR, 50 + rank, device) for rank in size.ranks]
    slots = {i: _packed(each, model) for i, each in enumerate(bound)}
    rows = len(bound) + 1
    prompts = [[(31 * row + 7 * at) % shape.vocab for at in range(3 + 5 * row)] for row in range(rows)]
    stage = Stage(model, rows, max(map(len, prompts)))
    seqs = stage.sequences(prompts, [*range(len(bound)), None])
    for what in ("prompts", "a decode step"):
        computed = [list(seq.token_ids) for seq in seqs]
        step(stage.eager, seqs, slots, advance=True)
        order = sorted(range(rows), key=lambda row: -1 if row == rows - 1 else row)  # the base before the slots
        wanted = torch.stack([_their_logits(theirs, bound, row, computed[row]) for row in order])
        yield Check(f"{name}: {what} beside transformers", _apart(stage.logits.last, wanted), ALLOWED[dtype])


@torch.no_grad()
def _their_logits(theirs: Any, bound: Sequence[BoundAdapter], row: int, tokens: list[int]) -> torch.Tensor:
    """Return transformers' last logits for a row, its adapter added to the weights while it runs."""
    modules = bound[row].modules if row < len(bound) else {}
    device = next(theirs.parameters()).device
    for sign in (1, -1):
        if sign < 0:
            logits: torch.Tensor = theirs(input_ids=torch.tensor([tokens], device=device)).logits[0, -1].float()
        for name, weights in modules.items():
            delta = weights.scaling * weights.b.float() @ weights.a.float()
            theirs.get_submodule(name).weight.add_(delta, alpha=sign)
    return logits


def _steps(name: str, model: LoadedModel, size: CheckSize) -> Iterator[Check]:
    """Compare replayed decode steps with those run as they are, and mixed rows with rows alone."""
    rows = min(8, max(size.rows))
    slots = {i: random_adapter(model, rank, ALL_LINEAR, 90 + i) for i, rank in enumerate(size.ranks)}
    slots[len(slots)] = random_adapter(model, 8, ("q", "v"), 99)
    stage = Stage(model, rows, size.context)
    captured = stage.capture(CaptureBudget(max_seconds=20))
    worst = 0.0
    for number in range(1, rows + 1):
        for chosen in ([None] * number, [row % len(slots) for row in range(number)], [len(slots) - 1] * number):
            seqs = _decoding(stage, chosen, model)
            step(stage.eager, seqs, slots)
            wanted = stage.logits.last.clone()
            step(captured.runner, seqs, slots)
            worst = max(worst, _apart(captured.logits.last, wanted))
    complete = "" if captured.report.complete else ", not all captured"
    yield Check(f"{name}: {captured.forward.replays} replayed steps{complete}", worst, ALLOWED[model.dtype])
    yield Check(f"{name}: steps that were not replayed", 3 * rows - captured.forward.replays, 0)
    mixed: list[int | None] = [None if row % 3 == 2 else row % len(slots) for row in range(rows)]
    seqs = _decoding(stage, mixed, model)
    step(captured.runner, seqs, slots)
    together = captured.logits.last.clone()
    order = sorted(range(rows), key=lambda row: -1 if mixed[row] is None else mixed[row] or 0)
    worst = 0.0
    for place, row in enumerate(order):
        step(stage.eager, [seqs[row]], slots)
        worst = max(worst, _apart(stage.logits.last[0], together[place]))
    yield Check(f"{name}: mixed rows beside rows alone", worst, ALLOWED[model.dtype])


def _decoding(stage: Stage, slots: Sequence[int | None], model: LoadedModel) -> list[EngineSequence]:
    prompts = [[(11 * row + at) % model.vocab_size for at in range(9 + 13 * row % 60)] for row in range(len(slots))]
    seqs = stage.sequences(prompts, slots)
    for seq in seqs:
        seq.num_computed_tokens = len(seq.token_ids) - 1
    return seqs


def _packed(bound: BoundAdapter, model: LoadedModel) -> PackedAdapter:
    return pack_adapter(bound, model.decoder.sites, model.dtype, torch.device(model.device))


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference over the largest number of `wanted`; NaN if anything is."""
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-6))


def sizes(short: bool, shapes: Sequence[DecoderShape]) -> CheckSize:
    """Return what is checked of `shapes`: all of it, or little in float32, for Triton's interpreter."""
    full = CheckSize(tuple(shapes))
    return replace(full, rows=(1, 5), ranks=(1, 24), dtypes=(torch.float32,), context=40) if short else full
