"""The advice against the seed text's own functions, written down here again as it has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.adapters.training.rank_advice import RULES, TASKS, advise_dropout, advise_rank, advise_scope, size_of
from loraplex.adapters.training.seed_figures import SEED_FIGURES, seed_table

B = 1_000_000_000
DOCUMENT = Path(__file__).parents[2] / "docs" / "training.md"


def recommend_rank(task_complexity: str, model_size: str) -> int:
    """The seed text's function."""
    base_rank = {"simple": 4, "medium": 16, "complex": 32}.get(task_complexity, 16)
    size_multiplier = {"small": 0.5, "medium": 1.0, "large": 1.5, "xlarge": 2.0}.get(model_size, 1.0)
    return int(base_rank * size_multiplier)


@pytest.mark.parametrize("complexity", ["simple", "medium", "complex"])
@pytest.mark.parametrize(("parameters", "size"), [(0.5, "small"), (3, "medium"), (8, "large"), (70, "xlarge")])
def test_the_proposal_is_the_seed_texts(complexity: str, parameters: float, size: str) -> None:
    advice = advise_rank("dialogue", int(parameters * B), complexity)  # type: ignore[arg-type]
    assert (advice.size, advice.proposed) == (size, recommend_rank(complexity, size))


@pytest.mark.parametrize(
    ("parameters", "size"),
    [
        (999_999_999, "small"),
        (1_000_000_000, "medium"),
        (3_212_749_824, "medium"),
        (6_738_415_616, "large"),  # "7B", which the seed text calls large
        (7_241_732_096, "large"),
        (13_015_864_320, "large"),  # "13B"
        (14_770_033_664, "xlarge"),
    ],
)
def test_a_models_size_goes_by_its_rounded_name(parameters: int, size: str) -> None:
    assert size_of(parameters) == size


# task, billions, proposed, rank: the task's range wins, and the reason shows it.
CLAMPED = [
    ("classification", 0.135, 2, 4),
    ("classification", 7, 6, 6),
    ("classification", 70, 8, 8),
    ("dialogue", 0.135, 8, 16),
    ("dialogue", 7, 24, 24),  # the seed text's own example: "medium" task, "large" model
    ("code", 0.135, 16, 32),
    ("code", 70, 64, 64),
    ("multimodal", 3, 32, 64),
]


@pytest.mark.parametrize(("task", "billions", "proposed", "rank"), CLAMPED)
def test_the_rank_is_kept_within_the_tasks_range(task: str, billions: float, proposed: int, rank: int) -> None:
    advice = advise_rank(task, int(billions * B))  # type: ignore[arg-type]
    assert (advice.proposed, advice.rank) == (proposed, rank)
    assert (f"raised to {rank}" in advice.reason) == (rank > proposed)
    assert f"{advice.lowest} to {advice.highest}" in advice.reason


def test_a_complexity_of_ones_own_is_clamped_too() -> None:
    advice = advise_rank("classification", 70 * B, "complex")
    assert (advice.proposed, advice.rank) == (64, 8)
    assert "lowered to 8" in advice.reason


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_modules_and_a_rank(task: str) -> None:
    rule = RULES[task]  # type: ignore[index]
    wanted = "attention" if task in ("classification", "summarization") else "all"
    assert advise_scope(task) == wanted  # type: ignore[arg-type]
    assert advise_rank(task, B).complexity == rule.complexity  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "dropout"), [(1, 0.1), (999, 0.1), (1_000, 0.05), (9_999, 0.05), (10_000, 0.01), (10**7, 0.01)]
)
def test_dropout_goes_by_rows(rows: int, dropout: float) -> None:
    assert advise_dropout(rows)[0] == dropout
    assert f"{rows:,} rows" in advise_dropout(rows)[1]


def test_the_document_shows_the_table_as_it_is() -> None:
    assert seed_table() in DOCUMENT.read_text(encoding="utf-8"), "docs/training.md: replace the table by seed_table()"
    assert all(f"`{key}`" in seed_table() for key in SEED_FIGURES)
