"""Sweeps and comparisons on a tiny model: real training, a real server, and what the reports then hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loraplex.adapters.errors import InvalidRequestError, PreconditionError
from loraplex.adapters.training.full_tuning import tune_fully
from loraplex.adapters.training.method_process import run_method
from loraplex.cli.main import app
from tests.parity.training_setup import Watcher, save_base, tiny_run

HELD_OUT = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def test_full_fine_tuning_trains_everything_and_leaves_nothing(base: Path, tmp_path: Path) -> None:
    config = tiny_run(base, tmp_path, quantization="none", learning_rate=1e-3, max_steps=10)
    watcher = Watcher()
    result = tune_fully(config, watcher)
    assert result.base is not None
    assert result.adapter is not None
    assert result.adapter.loss < 0.9 * result.base.loss
    assert result.trainable_parameters == result.total_parameters
    assert (result.steps, len(watcher.steps), result.validation_rows) == (10, 10, HELD_OUT)
    assert not Path(config.output_dir).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


def test_full_fine_tuning_of_a_quantized_base_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="quantization"):
        tune_fully(tiny_run(base, tmp_path))


@pytest.mark.slow
def test_a_method_runs_in_a_process_of_its_own(base: Path, tmp_path: Path) -> None:
    told: list[str] = []
    config = tiny_run(base, tmp_path, quantization="none", max_steps=2)
    run = run_method("lora", config, told.append)
    assert (run.rows, run.trained > 0, 0 < run.memory < 2**31) == (HELD_OUT, True, True)
    assert "lora: training" in told
    assert (Path(config.output_dir) / "adapter_model.safetensors").is_file()
    with pytest.raises(PreconditionError, match="there is no data file"):
        run_method("full", replace(config, data=str(tmp_path / "missing.jsonl")), told.append)


def analyze(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["analyze", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_a_sweep_is_measured_and_takes_more_ranks_later(base: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "train.yaml", tmp_path / "out"
    path.write_text(tiny_run(base, tmp_path, quantization="none", max_steps=2).to_yaml())
    analyze("ranks", "--config", path, "--output", out, "--ranks", "1", "--no-serve")
    first = json.loads((out / "ranks.json").read_text())
    shown = analyze(
        *("ranks", "--config", path, "--output", out, "--ranks", "1,4", "--serve-tokens", 8, "--repeat", 1),
        *("--quantization", "none"),
    )
    assert "sweet spot rank" in shown
    document = json.loads((out / "ranks.json").read_text())
    one, four = document["points"]
    assert (one["rank"], four["rank"], four["trained"]) == (1, 4, 4 * one["trained"])
    assert one["seconds"] == first["points"][0]["seconds"]  # not trained again
    assert all(point["serving"]["same"] > 0 and point["serving"]["distinct"] > 0 for point in (one, four))
    assert "http" not in (out / "ranks.html").read_text().replace("data:image/png", "")
    assert (out / "ranks.png").read_bytes().startswith(b"\x89PNG")
