"""The training configuration: what it takes, what it refuses, and its YAML form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraplex.adapters.errors import InvalidRequestError, NotFoundError
from loraplex.adapters.training.train_config import TrainConfig

REQUIRED = {"model": "m", "data": "d.jsonl", "output_dir": "out"}


def config(**values: Any) -> TrainConfig:
    return TrainConfig.from_values({**REQUIRED, **values})


def test_yaml_gives_back_every_field(tmp_path: Path) -> None:
    made = config(
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 32},
        alpha_pattern={"q_proj": 64.0},
        learning_rate=2e-5,
        prompt_field="Frage: ü",
        chat="yes",
        loraplus_lr_ratio=16.0,
    )
    path = tmp_path / "train.yaml"
    path.write_text(made.to_yaml({"rank": "two lines\nof reason"}), encoding="utf-8")
    assert TrainConfig.from_yaml(path) == made
    assert "# two lines\n# of reason\nrank: 16\n" in path.read_text(encoding="utf-8")


def test_yaml_as_people_write_it(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("model: m\ndata: d\noutput_dir: out\nlearning_rate: 2e-4\nepochs: 1\nalpha: 8\nchat: no\n")
    made = TrainConfig.from_yaml(path, {"rank": 4, "data": "other"})
    assert (made.learning_rate, made.epochs, made.alpha, made.chat) == (2e-4, 1.0, 8.0, "no")
    assert (made.rank, made.data) == (4, "other")


def test_alpha_follows_rank_unless_it_is_given() -> None:
    assert config(rank=8).lora_alpha == 16
    assert config(rank=8, alpha=5).lora_alpha == 5


@pytest.mark.parametrize(
    ("values", "field", "text"),
    [
        ({"ranks": 4}, "ranks", "did you mean rank?"),
        ({"rank": 0}, "rank", "from 1"),
        ({"rank": 4.0}, "rank", "a whole number"),
        ({"rank": True}, "rank", "a whole number"),
        ({"packing": 1}, "packing", "true or false"),
        ({"learning_rate": "fast"}, "learning_rate", "a number"),
        ({"learning_rate": float("nan")}, "learning_rate", "more than 0"),
        ({"dropout": float("nan")}, "dropout", "from 0"),
        ({"quantization": "int4"}, "quantization", "one of none, nf4"),
        ({"target_modules": []}, "target_modules", "at least one"),
        ({"target_modules": [3]}, "target_modules", "a list of names"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj", "positive"),
        ({"rank_pattern": [4]}, "rank_pattern", "must map"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights", "quantized base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights", "must be default"),
        ({"early_stopping_patience": 2, "validation_fraction": 0}, "early_stopping_patience", "needs validation"),
        ({"task": "sequence-classification", "packing": True}, "packing", "no meaning"),
        ({"data_format": "labelled-text"}, "data_format", "sequence-classification"),
        ({"model": " "}, "model", "empty"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        config(**values)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert text in violation.description


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        config(rank=-1, task="poetry", seed=-3)
    assert {violation.field for violation in caught.value.violations} == {"rank", "task", "seed"}


def test_missing_fields_are_named() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        TrainConfig.from_values({"model": "m"})
    assert [violation.field for violation in caught.value.violations] == ["data", "output_dir"]


@pytest.mark.parametrize("content", [b"a: [1", b"- 1\n- 2\n", b"", b"model: \xff\n"])
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "train.yaml"
    path.write_bytes(content)
    with pytest.raises(InvalidRequestError, match=r"train\.yaml"):
        TrainConfig.from_yaml(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        TrainConfig.from_yaml(tmp_path / "train.yaml")
