"""Every number that the advisor and the plans took from the course text that the project began with, in one table.

The text is a set of rules of thumb; where we measured something ourselves, docs/training.md says whether it agrees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SeedFigure:
    """One figure: its value, the section of the text and the name it has there, and what it is used for here."""

    value: Any
    section: str
    name: str
    used_for: str


_TUNING, _MODULES, _QLORA = "Tuning LoRA's hyperparameters", "Choosing target modules", "QLoRA"
_ANALYSIS, _PRACTICE, _LAYER = "Analysing LoRA's performance", "Best practice", "Advanced LoRA"

SEED_FIGURES: Mapping[str, SeedFigure] = {
    "base_rank": SeedFigure(
        {"simple": 4, "medium": 16, "complex": 32}, _TUNING, "recommend_rank.base_rank", "rank, by task complexity"
    ),
    "size_factor": SeedFigure(
        {"small": 0.5, "medium": 1.0, "large": 1.5, "xlarge": 2.0},
        _TUNING,
        "recommend_rank.size_multiplier",
        "factor on the rank, by model size",
    ),
    "size_bounds": SeedFigure(
        {"small": 1, "medium": 7, "large": 13},
        _TUNING,
        "recommend_rank, its comments",
        "billions of parameters up to which a model is small, medium, large",
    ),
    "rank_range": SeedFigure(
        {"classification": (4, 8), "dialogue": (16, 32), "code": (32, 64), "multimodal": (64, 128)},
        _ANALYSIS,
        "task_specific_recommendations; questions, Q2",
        "range that the rank is kept within, by task kind",
    ),
    "alpha_factor": SeedFigure(2, _TUNING, "recommend_alpha", "alpha = factor * rank"),
    "dropout": SeedFigure(
        {1_000: 0.1, 10_000: 0.05, None: 0.01}, _TUNING, "recommend_dropout", "dropout below that many rows"
    ),
    "module_rank": SeedFigure(
        {"q_proj": 32, "k_proj": 16, "v_proj": 32, "o_proj": 16, "gate_proj": 8, "up_proj": 16, "down_proj": 8},
        _LAYER,
        "adaptive_rank_selection",
        "ranks of single modules at rank 16; scaled with the rank",
    ),
    "task_modules": SeedFigure(
        {"generation": "all", "qa": "all", "classification": "attention", "summarization": "attention"},
        _MODULES,
        "task_recommendations",
        "which modules are adapted, by task",
    ),
    "learning_rate": SeedFigure(2e-4, _PRACTICE, "learning_rate_strategy", "learning rate of A and B"),
    "unfrozen_factor": SeedFigure(
        0.1, _PRACTICE, "learning_rate_strategy", "factor for layers of the base that are trained too"
    ),
    "scheduler": SeedFigure("cosine", _PRACTICE, "learning_rate_strategy", "course of the learning rate"),
    "warmup": SeedFigure(0.1, _PRACTICE, "learning_rate_strategy", "share of the steps with a rising learning rate"),
    "epochs": SeedFigure(3, _QLORA, "train_with_qlora", "how often every row is seen"),
    "batch_size": SeedFigure(4, _QLORA, "train_with_qlora", "rows of a forward pass"),
    "accumulation": SeedFigure(4, _QLORA, "train_with_qlora", "forward passes of an optimizer step"),
    "max_length": SeedFigure(512, _QLORA, "train_with_qlora", "tokens of a sequence, where no data says otherwise"),
    "memory_7b_gb": SeedFigure(
        {"full": 60, "lora": 24, "qlora": 9}, _QLORA, "compare_approaches; Q4", "shown beside the memory of a 7B model"
    ),
    "time_factor": SeedFigure(
        {"full": 1.0, "lora": 1.2, "qlora": 1.5},
        _QLORA,
        "compare_approaches",
        "training time beside full fine-tuning; shown beside what is measured",
    ),
    "accuracy_loss": SeedFigure(
        {"full": 0.0, "lora": 0.01, "qlora": 0.02},
        _QLORA,
        "compare_approaches",
        "accuracy lost against full fine-tuning; shown beside what is measured",
    ),
    "rank_accuracy": SeedFigure(
        {1: 0.65, 2: 0.72, 4: 0.81, 8: 0.87, 16: 0.91, 32: 0.93, 64: 0.94, 128: 0.94},
        _ANALYSIS,
        "rank_performance.accuracy",
        "shown beside a measured sweep",
    ),
    "rank_share_percent": SeedFigure(
        {1: 0.01, 2: 0.02, 4: 0.04, 8: 0.08, 16: 0.16, 32: 0.32, 64: 0.64, 128: 1.28},
        _ANALYSIS,
        "rank_performance.parameters",
        "shown beside the exact share of parameters",
    ),
    "sweet_spot": SeedFigure((8, 32), _ANALYSIS, "efficiency_analysis", "shown beside the measured one"),
    "low_rank_alarm": SeedFigure(
        4, _TUNING, "recommend_rank.base_rank (the least of them)", "below it a rank is called too low for its task"
    ),
}


def seed(key: str) -> Any:
    """Return the value of a figure."""
    return SEED_FIGURES[key].value


def seed_table() -> str:
    """Return the table as Markdown, as docs/training.md shows it."""
    lines = ["| figure | value | where the text has it | used for |", "|---|---|---|---|"]
    for key, figure in SEED_FIGURES.items():
        value = ", ".join(_entries(figure.value))
        lines.append(f"| `{key}` | {value} | {figure.section}: {figure.name} | {figure.used_for} |")
    return "\n".join(lines) + "\n"


def _entries(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield f"{'more' if name is None else name}: {_plain(each)}"
    else:
        yield _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]} to {value[1]}"
    return f"{value:g}" if isinstance(value, float) else str(value)
