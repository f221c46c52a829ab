"""`loraplex train` in this process, on a tiny model and a scripted server."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from loraplex.adapters.training.watching import StopRequest
from loraplex.cli.main import app
from loraplex.cli.train_run import stopped_by_signals
from tests.parity.training_setup import save_base, tiny_run
from tests.unit.fake_server import FakeServer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)], env={"COLUMNS": "200"})


def test_train_and_register(base: Path, tmp_path: Path) -> None:
    config = tiny_run(base, tmp_path)
    (tmp_path / "train.yaml").write_text(config.to_yaml())
    with FakeServer() as server:
        result = run(
            *(
                "--config",
                tmp_path / "train.yaml",
                "--rank",
                2,
                "--set",
                "logging_steps=1",
                "--targets",
                "q_proj,v_proj",
            ),
            *("--register", server.target, "--name", "tiny", "--json"),
        )
        assert result.exit_code == 0, result.output
        (upload,) = server.seen["UploadAdapter"]
    assert upload.request[0].header.name == "tiny"
    done = json.loads(result.stdout)
    assert (done["steps"], len(done["losses"]), done["serving_problem"]) == (6, 6, "")
    assert done["registered"]["name"]
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (2, 4.0, ["q_proj", "v_proj"])
    assert "held out" in result.stderr


def test_train_shows_scores_and_the_folder(base: Path, tmp_path: Path) -> None:
    config = tiny_run(base, tmp_path)
    given = ("--model", base, "--data", config.data, "--output", config.output_dir, "--max-steps", 1)
    result = run(*given, "--set", "score_rows=2", "--set", "score_max_new_tokens=2")
    assert result.exit_code == 0, result.output
    assert "with the adapter" in result.stdout
    assert result.stdout.splitlines()[-1] == config.output_dir


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "model: is missing; data: is missing; output_dir: is missing"),
        (("--model", "m", "--data", "d.jsonl", "--output", "o", "--set", "lora_r=4"), "lora_r: is not a field"),
        (("--config", "none.yaml"), "there is no file none.yaml"),
        (("--set", "rank"), "must be FIELD=VALUE"),
        (("--name", "x"), "goes with --register"),
    ],
)
def test_mistakes_are_told(arguments: tuple[object, ...], text: str) -> None:
    result = run(*arguments)
    assert result.exit_code != 0
    assert text in " ".join(result.output.split())


def test_a_classifier_is_not_registered(base: Path, tmp_path: Path) -> None:
    config = tiny_run(base, tmp_path)
    given = ("--model", base, "--data", config.data, "--output", config.output_dir)
    result = run(*given, "--task", "sequence-classification", "--register", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "no head for classes" in " ".join(result.output.split())
    assert not (tmp_path / "adapter").exists()


def test_the_first_signal_asks_and_the_second_ends() -> None:
    stop, before = StopRequest(), signal.getsignal(signal.SIGINT)
    with stopped_by_signals(stop, Console(stderr=True)):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
