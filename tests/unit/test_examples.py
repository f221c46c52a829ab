"""The example adapters: small, self-contained, made from data that can be made again, and better than the base."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

EXAMPLES = Path(__file__).parents[2] / "adapters" / "examples"
TASKS = ["sentiment", "sql", "date", "json"]
MEGABYTE = 1_000_000


@pytest.fixture
def script_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the scripts, which lie outside the import root, be imported by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("make_data", "scoring"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def rows_of(task: str, split: str) -> list[dict[str, str]]:
    text = (EXAMPLES / "data" / f"{task}.{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def json_of(task: str, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((EXAMPLES / task / name).read_text(encoding="utf-8"))
    return content


def test_every_folder_with_an_adapter_is_a_known_task() -> None:
    assert sorted(path.parent.name for path in EXAMPLES.glob("*/adapter_config.json")) == sorted(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_adapter_is_small_and_finite(task: str) -> None:
    weights = EXAMPLES / task / "adapter_model.safetensors"
    assert weights.stat().st_size < MEGABYTE
    config = json_of(task, "adapter_config.json")
    with safe_open(weights, framework="pt") as tensors:
        names = list(tensors.keys())
        assert len(names) == 30 * 2 * len(config["target_modules"])
        for name in names:
            tensor = tensors.get_tensor(name)
            assert tensor.isfinite().all()
            assert tensor.any(), f"{name} was not trained"
            assert config["r"] in tensor.shape


@pytest.mark.parametrize("task", TASKS)
def test_config_names_the_public_base_and_no_path(task: str) -> None:
    config = json_of(task, "adapter_config.json")
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert 4 <= config["r"] <= 8
    for name in ("adapter_config.json", "README.md", "metrics.json"):
        text = (EXAMPLES / task / name).read_text(encoding="utf-8")
        assert "/work" not in text
        assert "/tmp" not in text


@pytest.mark.parametrize("task", TASKS)
def test_adapter_beats_the_base_by_twenty_points(task: str) -> None:
    metrics = json_of(task, "metrics.json")
    assert metrics["rows"] == len(rows_of(task, "test")) >= 100
    for adapter in ("adapter", "adapter_nf4"):
        for kind in ("accuracy", "lenient"):
            assert metrics[f"{adapter}_{kind}"] - metrics[f"base_{kind}"] >= 0.2, (adapter, kind)


@pytest.mark.parametrize("task", TASKS)
def test_held_out_rows_are_held_out(task: str) -> None:
    train, test = rows_of(task, "train"), rows_of(task, "test")
    assert len({row["prompt"] for row in train + test}) == len(train) + len(test)
    if task != "sentiment":
        assert {row["completion"] for row in train}.isdisjoint(row["completion"] for row in test)


def test_word_lists_of_train_and_test_are_disjoint() -> None:
    words = json.loads((EXAMPLES / "words.json").read_text(encoding="utf-8"))
    for task in ("sentiment", "json"):
        for key, values in words[task]["train"].items():
            assert set(values).isdisjoint(words[task]["test"][key])
    assert set(words["sql"]["train"]).isdisjoint(words["sql"]["test"])


@pytest.mark.usefixtures("script_path")
@pytest.mark.parametrize("task", TASKS)
def test_data_is_what_the_script_makes(task: str) -> None:
    import make_data

    for split, count in (("train", make_data.TRAIN_ROWS), ("test", make_data.TEST_ROWS)):
        assert rows_of(task, split) == make_data.rows_of(task, split, count)


@pytest.mark.usefixtures("script_path")
@pytest.mark.parametrize("task", TASKS)
def test_every_expected_answer_scores_itself(task: str) -> None:
    import scoring

    for row in rows_of(task, "test"):
        assert scoring.strict(row["completion"] + "\n", row["completion"])
        assert scoring.lenient(task, row["prompt"], f"Sure: {row['completion']}", row["completion"])


SQL_PROMPT = "Write one SQL query.\nTable: books (title, pages, publisher, cost)\nQuestion: ..."


@pytest.mark.usefixtures("script_path")
@pytest.mark.parametrize(
    ("task", "completion", "expected", "right"),
    [
        ("sentiment", "This review is negative.", "negative", True),
        ("sentiment", "It is positive, not negative.", "positive", False),
        ("sentiment", "", "positive", False),
        ("date", "The date is 2020-01-02.", "2020-01-02", True),
        ("json", '```json\n{"city": "Rome",\n "count": 2}\n```', '{"count": 2, "city": "Rome"}', True),
        ("json", '{"count": 2', '{"count": 2}', False),
        ("sql", "```sql\nselect avg(cost) from books\n```", "SELECT AVG(cost) FROM books;", True),
        ("sql", "SELECT SUM(cost) FROM books;", "SELECT AVG(cost) FROM books;", False),
        ("sql", "SELECT * FROM books WHERE cost >= 70", "SELECT * FROM books WHERE cost > 70;", False),
        ("sql", "SELECT nothing FROM nowhere;", "SELECT AVG(cost) FROM books;", False),
    ],
)
def test_lenient_score_judges_the_meaning(task: str, completion: str, expected: str, right: bool) -> None:
    import scoring

    assert scoring.lenient(task, SQL_PROMPT, completion, expected) is right
