"""Rows with a context each, on a runner of the server's own: what checks compare and figures time.

Steps are replayed from captured ones where the device can, and run as they are where that is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.adapters.binding import BoundAdapter, ModuleWeights
from loraplex.server.attention.interface import Attention
from loraplex.server.engine.batch import Batch
from loraplex.server.engine.capture import CaptureBackend, Wait
from loraplex.server.engine.cuda_graphs import CudaGraphs
from loraplex.server.engine.graphed_forward import CaptureBudget, CaptureReport, GraphedForward
from loraplex.server.engine.kv_cache import KVCache, KVCacheShape
from loraplex.server.engine.model_runner import ForwardPass, ModelRunner
from loraplex.server.engine.request import GenerationRequest, Logprobs, SamplingParams
from loraplex.server.engine.runner_build import site_groups
from loraplex.server.engine.scheduler import ScheduledSequence
from loraplex.server.engine.sequence import Sequence as EngineSequence
from loraplex.server.engine.step_buffers import StepLimits
from loraplex.server.lora.ops.interface import LoraContext
from loraplex.server.lora.packing import pack_adapter
from loraplex.server.lora.weights import PackedAdapter
from loraplex.server.models.loader import LoadedModel

BLOCK_SIZE = 16
HOST = torch.device("cpu")


@dataclass(frozen=True)
class _Rerun:
    step: Callable[[], object]

    def replay(self) -> None:
        self.step()


class RerunBackend:
    """Implements `CaptureBackend` without capturing: each replay runs the step again. For trying it all on a CPU."""

    def capture(self, step: Callable[[], object]) -> _Rerun:
        """See `CaptureBackend`."""
        return _Rerun(step)

    def staging(self, nbytes: int) -> torch.Tensor:
        """See `CaptureBackend`."""
        return torch.zeros(nbytes, dtype=torch.uint8)

    def upload(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """See `CaptureBackend`."""
        target.copy_(source)

    def mark(self) -> Wait:
        """See `CaptureBackend`."""
        return lambda: None

    def reserved_bytes(self) -> int:
        """See `CaptureBackend`."""
        return 0


class KeptLogits:
    """Implements `ForwardPass`: another one, whose last logits can be looked at until its next step."""

    def __init__(self, inner: ForwardPass) -> None:
        """Start with none."""
        self._inner = inner
        self.last = torch.empty(0)

    def forward(self, batch: Batch, kv_cache: KVCache, lora: LoraContext | None) -> torch.Tensor:
        """See `ForwardPass`."""
        self.last = self._inner.forward(batch, kv_cache, lora)
        return self.last


def attention_kernels() -> Attention:
    """Return the attention of GPUs, on a CPU too: Triton interprets its kernels there."""
    from loraplex.server.attention.triton import TritonAttention

    return TritonAttention()


def lora_kernels(device: torch.device, dtype: torch.dtype) -> Any:
    """Return the LoRA operator of GPUs, likewise."""
    from loraplex.server.lora.ops.triton import TritonLoraOps
    from loraplex.server.lora.ops.triton_plan import Reserved

    return TritonLoraOps(device, Reserved(dtype=dtype))


def random_adapter(model: LoadedModel, rank: int, targets: Sequence[str], seed: int) -> PackedAdapter:
    """Return an adapter on the modules whose names end like one of `targets`, made on the model's device."""
    device = torch.device(model.device)
    return pack_adapter(random_weights(model, rank, targets, seed, device), model.decoder.sites, model.dtype, device)


def random_weights(
    model: LoadedModel, rank: int, targets: Sequence[str], seed: int, device: torch.device
) -> BoundAdapter:
    """Return an adapter as it is bound to the model, with weights that change its logits."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, device=device, dtype=model.dtype)
    modules = {
        name: ModuleWeights(draw(rank, site.in_features), draw(end - start, rank), scaling=0.02 / rank)
        for site in model.decoder.sites
        for name, (start, end) in site.targets.items()
        if name.endswith(tuple(f"{target}_proj" for target in targets))
    }
    return BoundAdapter(f"random-{seed}", modules)


@dataclass(frozen=True)
class Captured:
    """A runner of captured steps, with what it is made of and what capturing took."""

    runner: ModelRunner
    forward: GraphedForward
    logits: KeptLogits
    report: CaptureReport


class Stage:
    """A cache full of random keys and values, and runners for steps of rows in it."""

    def __init__(self, model: LoadedModel, rows: int, context: int) -> None:
        """Make room for `rows` rows of `context` tokens and a few more, and capture nothing yet."""
        device, config = torch.device(model.device), model.decoder.config
        self.model, self.rows = model, rows
        self.limit = -(-(context + BLOCK_SIZE) // BLOCK_SIZE) * BLOCK_SIZE
        self._blocks = self.limit // BLOCK_SIZE
        shape = KVCacheShape(config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE, model.dtype)
        self.cache = KVCache(shape, rows * self._blocks + 1, device)
        for layer in self.cache.layers:
            layer.k.normal_()
            layer.v.normal_()
        self._ops = lora_kernels(device, model.dtype)
        self.logits = KeptLogits(model.decoder)
        """Of the last step that was run as it is."""
        self.eager = ModelRunner(self.logits, self.cache, self._ops, device)

    def capture(self, budget: CaptureBudget) -> Captured:
        """Capture steps; return what replays them."""
        device = torch.device(self.model.device)
        backend: CaptureBackend = RerunBackend() if device.type == "cpu" else CudaGraphs(device)
        limits = StepLimits(self.rows, self.limit, BLOCK_SIZE, scratch_block=self.cache.num_blocks - 1)
        graphed = GraphedForward(
            self.model.decoder.forward,
            self.cache,
            self._ops,
            backend,
            limits,
            self.model.vocab_size,
            device,
            site_groups(self.model.decoder.sites),
        )
        report, logits = graphed.capture(budget), KeptLogits(graphed)
        return Captured(ModelRunner(logits, self.cache, graphed.lora_ops, HOST), graphed, logits, report)

    def sequences(
        self, tokens: Sequence[Sequence[int]], slots: Sequence[int | None], logprobs: int | None = None
    ) -> list[EngineSequence]:
        """Return greedy sequences with these prompts and adapter slots, row by row in blocks of their own."""
        made = []
        for row, (prompt, slot) in enumerate(zip(tokens, slots, strict=True)):
            params = SamplingParams(max_tokens=BLOCK_SIZE, temperature=0.0, seed=0, logprobs=logprobs)
            digest = None if slot is None else str(slot)
            seq = EngineSequence(GenerationRequest(f"r{row}", tuple(prompt), params, adapter_digest=digest), 0, 0.0)
            seq.block_table = list(range(row * self._blocks, (row + 1) * self._blocks))
            made.append(seq)
        return made


def step(
    runner: ModelRunner, rows: Sequence[EngineSequence], slots: dict[int, PackedAdapter], *, advance: bool = False
) -> list[Logprobs]:
    """Run one step of all that the rows have still to compute; `advance` them, or leave all for the same step again."""
    scheduled = [ScheduledSequence(seq, seq.num_uncomputed_tokens) for seq in rows]
    results = runner.run(scheduled, int, slots)
    chosen = []
    for item in scheduled:
        result = results[item]
        assert isinstance(result, Logprobs), result
        chosen.append(result)
        if advance:
            item.seq.num_computed_tokens += item.num_tokens
            item.seq.token_ids.append(result.token_id)
    return chosen
