"""What a caller says about a merge and what comes of it, as plain values. Knows nothing about gRPC."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict


class MergeBase(enum.StrEnum):
    """Which weights an adapter is folded into.

    FULL_PRECISION: the base model's own; DEQUANTIZED: those that the server computes with.
    """

    FULL_PRECISION = "full-precision"
    DEQUANTIZED = "dequantized"


class MergeMethod(enum.StrEnum):
    """How several adapters become one: the weighted sum, or what keeps only a share of each one's values."""

    LINEAR = "linear"
    TIES = "ties"
    DARE_LINEAR = "dare-linear"
    DARE_TIES = "dare-ties"


class MergeKeywords(TypedDict, total=False):
    """How to merge; what is left out takes the server's default.

    Keys:
        base: which weights the adapters are folded into (default: the base model's own).
        scale: multiplies the single adapter's own scaling (default 1).
        method: how several adapters become one (default: the weighted sum).
        density: share of each adapter's values that TIES and DARE keep, in (0, 1] (default 0.5).
        seed: of DARE's choice (default 0).
        quantize: "nf4" stores the result as bitsandbytes does (default: unquantized).
        max_shard_bytes: of a weight file (default 5 GB).
        max_mean_kl: fail where the result is further, in nats, from the unmerged model (default 0.01; none for NF4).
        prompts: what both are compared on (default: a built-in list).
        measure_speed: measure tokens per second and latency of both.
    """

    base: MergeBase | str
    scale: float | None
    method: MergeMethod | str
    density: float | None
    seed: int | None
    quantize: str
    max_shard_bytes: int | None
    max_mean_kl: float | None
    prompts: Sequence[str]
    measure_speed: bool


@dataclass(frozen=True)
class MergeComparison:
    """How far the written model is from base and adapters apart, over `positions` tokens; `mean_kl` is in nats."""

    max_logit_difference: float
    top1_agreement: float
    mean_kl: float
    positions: int


@dataclass(frozen=True)
class SpeedFigures:
    """How fast one side answers: `model` is "unmerged" or "merged", times are in milliseconds."""

    model: str
    tokens_per_second: float
    first_token_ms: float
    inter_token_ms_p50: float


@dataclass(frozen=True)
class MergeProgress:
    """How far a merge is.

    Attributes:
        tensors_done: parameters written; while checking and measuring, steps of those.
        phase: "merging", "checking" or "measuring"; empty in the last one.
        output_path: on the server; this and what follows is set in the last one only.
        adapter_digest: of the first adapter.
        comparison: with the unmerged model.
        speed: of both sides, if it was measured.
        adapter_digests: of all.
    """

    tensors_done: int
    tensors_total: int
    output_path: str = ""
    adapter_digest: str = ""
    phase: str = ""
    comparison: MergeComparison | None = None
    speed: tuple[SpeedFigures, ...] = ()
    adapter_digests: tuple[str, ...] = ()
