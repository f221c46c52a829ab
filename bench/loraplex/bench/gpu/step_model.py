"""What a decode step on a GPU must move and launch, and how long that takes at least: a model, not a measurement.

A step reads each weight once for all rows, every row's keys and values, and every distinct adapter once. It takes as
long as the larger of reading and multiplying; launches are counted beside. Knows shapes and cards, no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loraplex.bench.gpu.cards import Card

Weights = Literal["nf4", "bfloat16"]
# Bytes of a weight: NF4 is half a byte and a float32 scale for each 64 weights.
WEIGHT_BYTES: Mapping[str, float] = {"nf4": 0.5 + 4 / 64, "bfloat16": 2.0}
NARROW = 2
"""Bytes of a number in bfloat16: lm_head, keys and values, adapters."""
LAUNCH_S = 1.5e-6
"""Assumed, between two kernels of a captured step. Not measured here."""
# Of a layer: four products; two additions and two norms; the rotation (a product, a shift, a product and sum); writing
# keys and values, decode attention and the sum of its parts; the activation and its product. What is no kernel of ours
# torch computes an operation at a time: none of that is fused yet.
LAYER_LAUNCHES = 4 + 4 + 3 + 3 + 2
DIVIDED_OUTPUTS = 8448
"""Up to which the sums of a product with 4-bit weights are divided, and a launch more adds the parts up."""
OTHER_LAUNCHES = 7
"""Embedding, rotations, rows that sample, last norm, lm_head, float32, and to where logits stay."""
LORA_LAUNCHES = 2
"""Shrink and expand, at each packed product that is captured with LoRA: those of q, k and v, or all of the layers."""
ALL_LINEAR = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class DecoderShape:
    """A gated decoder with rotary positions, as the Hugging Face configuration gives its sizes and class."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    architecture: str = "LlamaForCausalLM"

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """Inputs and outputs of each projection of a layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (self.hidden, query),
            "k": (self.hidden, key),
            "v": (self.hidden, key),
            "o": (query, self.hidden),
            "gate": (self.hidden, self.intermediate),
            "up": (self.hidden, self.intermediate),
            "down": (self.intermediate, self.hidden),
        }

    @property
    def layer_weights(self) -> int:
        """Of all layers' projections."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.modules.values())

    @property
    def packed_outputs(self) -> tuple[int, ...]:
        """Outputs of each product of a layer: q, k and v; o; gate and up; down."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return qkv, self.hidden, 2 * self.intermediate, self.hidden

    def adapter_bytes(self, rank: int, targets: tuple[str, ...] = ALL_LINEAR) -> int:
        """Return the bytes of one adapter."""
        numbers = sum(sum(self.modules[name]) for name in targets)
        return NARROW * rank * self.layers * numbers


SHAPES = {
    "llama-3.1-8b": DecoderShape("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128256),
    "qwen3-4b": DecoderShape("Qwen3-4B", 2560, 9728, 36, 32, 8, 128, 151936, True, "Qwen3ForCausalLM"),
    "smollm2-135m": DecoderShape("SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49152, tied=True),
}
TINY = (
    DecoderShape("tiny Llama", 64, 128, 2, 4, 2, 16, 288),
    DecoderShape("tiny Qwen3", 64, 192, 2, 4, 1, 32, 288, True, "Qwen3ForCausalLM"),
)
"""To check with."""


@dataclass(frozen=True)
class StepKind:
    """A decode step: rows with `context` tokens each, `adapters` distinct ones of one rank on `targets` among them."""

    rows: int
    context: int = 512
    weights: Weights = "nf4"
    adapters: int = 0
    rank: int = 16
    targets: tuple[str, ...] = ALL_LINEAR


@dataclass(frozen=True)
class StepWork:
    """What a step does, in bytes, operations and launches."""

    weights: float
    cache: float
    adapters: float
    flop: float
    launches: int

    @property
    def nbytes(self) -> float:
        """All bytes that are read."""
        return self.weights + self.cache + self.adapters

    def bound_ms(self, card: Card) -> float:
        """Return the milliseconds that reading or multiplying takes at least, whichever is more."""
        return 1e3 * max(self.nbytes / card.reached_bytes_s, self.flop / card.flop_s)

    def modelled_ms(self, card: Card) -> float:
        """Return the bound with the launches of a captured step."""
        return self.bound_ms(card) + 1e3 * self.launches * LAUNCH_S


def step_work(shape: DecoderShape, step: StepKind) -> StepWork:
    """Count one step's work. Norms, the residual stream and logits are left out: under 1 % at 32 rows."""
    head = shape.vocab * shape.hidden
    cached = 2 * NARROW * shape.layers * shape.kv_heads * shape.head_dim
    adapter = shape.adapter_bytes(step.rank, step.targets) if step.adapters else 0
    multiplied = shape.layer_weights + head + adapter // NARROW
    scores = 2 * shape.layers * shape.heads * shape.head_dim * step.context
    sites = shape.layers * (1 if set(step.targets) <= {"q", "k", "v"} else 4)
    sums = sum(outputs <= DIVIDED_OUTPUTS for outputs in shape.packed_outputs) if step.weights == "nf4" else 0
    launches = (LAYER_LAUNCHES + sums) * shape.layers + OTHER_LAUNCHES
    return StepWork(
        weights=shape.layer_weights * WEIGHT_BYTES[step.weights] + head * NARROW,
        cache=step.rows * step.context * cached,
        adapters=step.adapters * adapter,
        flop=2.0 * step.rows * (multiplied + scores),
        launches=launches + (LORA_LAUNCHES * sites if step.adapters else 0),
    )


TARGET_STEPS: Mapping[str, StepKind] = {
    "1 row": StepKind(1),
    "32 rows": StepKind(32),
    "32 rows, weights in bfloat16": StepKind(32, weights="bfloat16"),
    "32 rows, 8 adapters of rank 16": StepKind(32, adapters=8),
    "32 rows, 32 adapters of rank 16": StepKind(32, adapters=32),
    "32 rows, 32 adapters of rank 8 on q and v": StepKind(32, adapters=32, rank=8, targets=("q", "v")),
    "32 rows, 32 adapters of rank 64": StepKind(32, adapters=32, rank=64),
}
"""What the GPU's targets are about, with 512 tokens of context."""


def step_document(shape: DecoderShape, step: StepKind, card: Card) -> dict[str, Any]:
    """Return one step's bytes, launches and milliseconds, as JSON takes them."""
    work = step_work(shape, step)
    return {
        "weight_bytes": round(work.weights),
        "cache_bytes": round(work.cache),
        "adapter_bytes": round(work.adapters),
        "launches": work.launches,
        "bound_ms": round(work.bound_ms(card), 3),
        "modelled_ms": round(work.modelled_ms(card), 3),
    }


def model_document(shape: DecoderShape, card: Card) -> dict[str, Any]:
    """Return what is modelled for the steps of the GPU's targets."""
    return {
        "model": shape.name,
        "card": card.title,
        "bandwidth_tb_s": round(card.reached_bytes_s / 1e12, 2),
        "source": card.source,
        "steps": {name: step_document(shape, step, card) for name, step in TARGET_STEPS.items()},
    }
