"""`loraplex serve` as a process: what keeps it from starting, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loraplex.client import Client
from loraplex.client.errors import LoraplexClientError
from loraplex.server.errors import ModelLoadError
from tests.integration.serving import LONG, Folders, RunningServer

TIMEOUT_S = 120


def _command(model: Path, *options: str) -> list[str]:
    ports = ["--port", "0", "--metrics-port", "0"]
    return [
        sys.executable,
        "-m",
        "loraplex.cli",
        "serve",
        "--model",
        str(model),
        "--dtype",
        "float32",
        *ports,
        *options,
    ]


def _refused(model: Path, *options: str) -> str:
    """Start a server that must not come up; return what it says, on one line."""
    result = subprocess.run(_command(model, *options), capture_output=True, encoding="utf-8", timeout=TIMEOUT_S)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert "serving" not in result.stdout
    assert "error: " in result.stderr
    return " ".join(result.stderr.split())


def test_port_taken(server: RunningServer, model_folder: Path) -> None:
    said = _refused(model_folder, "--port", str(server.server.port))
    assert f"cannot listen on 127.0.0.1:{server.server.port}" in said
    assert "choose another --port" in said


def test_metrics_port_taken(server: RunningServer, model_folder: Path) -> None:
    said = _refused(model_folder, "--metrics-port", str(server.server.metrics_port))
    assert f"cannot serve metrics on 127.0.0.1:{server.server.metrics_port}" in said
    assert "choose another --metrics-port" in said


def test_unknown_architecture_names_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    said = _refused(tmp_path)
    assert "BertModel" in said
    assert "LlamaForCausalLM" in said
    assert "GPT2LMHeadModel" in said


def test_model_folder_missing(tmp_path: Path) -> None:
    assert "nowhere" in _refused(tmp_path / "nowhere")


def test_state_folder_in_use(server: RunningServer, model_folder: Path) -> None:
    assert str(server.folders.state) in _refused(model_folder, "--state-dir", str(server.folders.state))


def test_failed_start_gives_back_the_ports(folders: Folders) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ModelLoadError, match="no such folder"):
        RunningServer(folders, metrics_port=port, adapters=(folders.model / "none",))
    with RunningServer(folders, metrics_port=port) as running:
        assert running.server.metrics_port == port


@contextmanager
def _serving(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    """Start a server process and a client of it; it is killed if the test has not ended it."""
    command = _command(model, *options)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", env=environment) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"on 127.0.0.1:(\d+)", process.stdout.readline())
            assert found, "the server did not say where it serves"
            with Client(f"127.0.0.1:{found[1]}", timeout=TIMEOUT_S) as client:
                yield process, client
        finally:
            process.kill()


@pytest.mark.slow
def test_sigterm_lets_a_stream_finish_and_a_second_one_does_not(model_folder: Path) -> None:
    with _serving(model_folder, "--grace-period", "100") as (process, client):
        stream = client.stream("x", max_tokens=200, ignore_eos=True)
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert len(stream.collect().choices[0].token_ids) == 200
        assert process.wait(TIMEOUT_S) == 0
    with _serving(model_folder, "--grace-period", "100") as (process, client):
        stream = client.stream("x", max_tokens=LONG, ignore_eos=True)
        next(stream)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        with pytest.raises(LoraplexClientError):
            stream.collect()
        assert process.wait(TIMEOUT_S) == 0
