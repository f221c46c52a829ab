"""Advice on a tiny model in a folder: what is read of the data is what the trainer reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loraplex.adapters.training.data_profile import profile_data
from loraplex.adapters.training.frozen_base import load_tokenizer
from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.training_data import load_data
from loraplex.cli.main import app
from tests.parity.training_setup import save_base, tiny_run, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


CHAT = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]} for n in range(9)]
TEXT = [{"text": "one " * (n + 1)} for n in range(9)]


@pytest.mark.parametrize("rows", [CHAT, TEXT, None])
def test_rows_have_the_tokens_that_the_trainer_sees(base: Path, tmp_path: Path, rows: list[object] | None) -> None:
    config = tiny_run(base, tmp_path, **({"rows": rows} if rows else {}), validation_fraction=0.0)
    data = load_data(config, load_tokenizer(config))
    profile = profile_data(config)
    assert (profile.data_format, profile.estimated) == (data.data_format, False)
    assert list(profile.lengths) == sorted(map(len, data.train["input_ids"]))
    assert profile.tokens_total == data.train_tokens
    assert profile.learned == sum(label != -100 for row in data.train["labels"] for label in row[1:])


def test_without_a_tokenizer_tokens_are_estimated(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a" * 40, "completion": "b" * 20}] * 3)
    config = TrainConfig(model=str(tmp_path), data=str(data), output_dir="-")
    profile = profile_data(config)
    assert (profile.estimated, profile.rows, profile.longest, profile.learned) == (True, 3, 15, 15)
    assert profile_data(TrainConfig(model="gpt2", data=str(data), output_dir="-"), fetch=False) == profile


def test_lengths_are_asked_by_share(tmp_path: Path) -> None:
    rows = [{"prompt": "a" * 4 * n, "completion": "bbbb"} for n in range(1, 101)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    profile = profile_data(TrainConfig(model=str(tmp_path), data=str(data), output_dir="-"))
    assert (profile.median, profile.quantile(0.95), profile.longest) == (52, 97, 101)
    assert (profile.longer_than(100), profile.longer_than(101)) == (1, 0)


def test_the_command_advises_and_writes_what_the_trainer_takes(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    yaml = tmp_path / "train.yaml"
    shown = run("advise", "--model", base, "--data", data, "--task", "qa", "--output", yaml, "--device", "l4")
    for text in ("40 rows", "raised to 16", "under 1,000", "q_proj", "qlora", "Time: about"):
        assert text in shown
    config = TrainConfig.from_yaml(yaml)
    assert (config.model, config.rank) == (str(base), 16)
    assert load_data(config, load_tokenizer(config)).longest <= config.max_length
    assert "none of the common mistakes" in run("advise", "--config", yaml, "--task", "qa")


def test_the_command_names_mistakes_in_a_configuration(base: Path, tmp_path: Path) -> None:
    config = tiny_run(base, tmp_path, rank=64, alpha=8, learning_rate=1e-5, target_modules=["q_proj", "wrong"])
    path = tmp_path / "train.yaml"
    path.write_text(config.to_yaml())
    mistakes = json.loads(run("advise", "--config", path, "--json"))
    assert {each["field"] for each in mistakes} == {"alpha", "rank", "learning_rate", "target_modules", "max_length"}
    shown = run("advise", "--config", path)
    assert "wrong hits no linear module" in shown


def test_advice_as_json(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    advice = json.loads(run("advise", "--model", base, "--data", data, "--device", "l4", "--json"))
    assert (advice["data"]["rows"], advice["rank"]["proposed"], advice["rank"]["rank"]) == (40, 8, 16)
    assert set(advice["memory"]) == {"full", "lora", "qlora"}
    assert advice["config"]["rank_pattern"] == {"q_proj": 32, "v_proj": 32, "gate_proj": 8, "down_proj": 8}


@pytest.mark.parametrize("arguments", [("--model", "gpt2"), ("--data", "x"), ("--config", "x", "--model", "gpt2"), ()])
def test_what_is_to_be_advised_must_be_said(arguments: tuple[str, ...]) -> None:
    assert CliRunner().invoke(app, ["advise", *arguments]).exit_code == 2
