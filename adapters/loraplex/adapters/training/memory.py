"""One plan of memory: every way to train an adapter, every way to serve it, beside what the seed text says of 7B.

Puts together what `training_memory` and `serving_memory` count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.training.architecture import ModelArchitecture
from loraplex.adapters.training.seed_figures import seed
from loraplex.adapters.training.serving_memory import QUANTIZATIONS, ServingShape, serving_memory
from loraplex.adapters.training.training_memory import METHODS, TrainingShape, training_memory

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "kv_cache")
# What the seed text calls a 7B model, in billions of parameters.
_SEVEN = (6.0, 8.0)


@dataclass(frozen=True)
class PlanRow:
    """One bar of the plan: "train" or "serve", how, and bytes by part.

    `seed_gb` is the seed's figure where it has one, `measured` the bytes of a real step where that was measured.
    """

    purpose: str
    method: str
    parts: Mapping[str, int]
    total: int
    seed_gb: float | None = None
    measured: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """The plan for one model; bytes of the parts are at the peak, without what the process itself needs."""

    model: str
    architecture: str
    origin: str
    parameters: int
    trained: int
    rows: tuple[PlanRow, ...]

    @property
    def trained_share(self) -> float:
        """Parameters of A and B, of those of the base."""
        return self.trained / self.parameters


def plan_memory(model: ModelArchitecture, training: TrainingShape, serving: ServingShape | None) -> MemoryPlan:
    """Plan training by every method and, unless `serving` is None, serving with every quantization.

    Raises:
        InvalidRequestError: no module answers to the targets.
    """
    trained = [training_memory(model, method, training) for method in METHODS]
    served = [serving_memory(model, each, serving) for each in QUANTIZATIONS] if serving else []
    figures = seed("memory_7b_gb") if _SEVEN[0] <= model.parameters / 1e9 <= _SEVEN[1] else {}
    return MemoryPlan(
        model=model.name,
        architecture=model.architecture,
        origin=model.origin,
        parameters=model.parameters,
        trained=next(each.trained for each in trained if each.method == "lora"),
        rows=(
            *(PlanRow("train", each.method, each.parts, each.total, figures.get(each.method)) for each in trained),
            *(PlanRow("serve", each.quantization, each.parts, each.total) for each in served),
        ),
    )


def plan_document(plan: MemoryPlan, training: TrainingShape, serving: ServingShape | None) -> dict[str, Any]:
    """Return the plan as plain values for JSON, with what it was made for."""
    assumed: dict[str, Any] = {
        "rows": training.rows,
        "length": training.length,
        "dtype": str(training.dtype).removeprefix("torch."),
        "gradient_checkpointing": training.checkpointing,
        "gradient_accumulation_steps": training.accumulation,
        "rank": training.rank,
        "target_modules": training.targets if isinstance(training.targets, str) else list(training.targets),
    }
    if serving:
        assumed["serving"] = {
            "sequences": serving.sequences,
            "context": serving.context,
            "adapters": serving.adapters,
            "dtype": str(serving.dtype).removeprefix("torch."),
        }
    return {
        "model": plan.model,
        "architecture": plan.architecture,
        "config_from": plan.origin,
        "parameters": plan.parameters,
        "trained_parameters": plan.trained,
        "trained_share": plan.trained_share,
        "assumed": assumed,
        "bytes": [
            {"purpose": row.purpose, "method": row.method, **row.parts, "total": row.total, **_beside(row)}
            for row in plan.rows
        ],
    }


def _beside(row: PlanRow) -> dict[str, Any]:
    return {"seed_gb": row.seed_gb, "measured": row.measured}
