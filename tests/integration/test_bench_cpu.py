"""`loraplex bench cpu --short` and `bench growth` on a tiny model: the documents' shapes, and right answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loraplex.bench.cpu_report import RATES, TEXTS
from loraplex.cli.main import app


@pytest.mark.slow
def test_short_form_writes_every_figure(model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "results" / "cpu.json"
    options = ["--model", str(model_folder), "--short", "--repeat", "1", "--json", str(output)]
    serve = "--threads 1 --dtype float32 --kv-cache-memory 16MiB --adapter-device-memory 64MiB"
    result = CliRunner().invoke(app, ["bench", "cpu", *options, "--serve-args", serve])
    assert result.exit_code == 0, result.output
    document = json.loads(output.read_text())
    for key in TEXTS:
        assert set(document[key]) == {"nf4", "int8"}
        assert all(value > 0 for value in document[key].values()), key
    for key in RATES:
        assert set(document["spread"][key]["nf4"]) == {"lowest", "highest"}
    assert document["failed_requests"] == 0
    # Both are float32 on a tiny model: a batch must answer exactly what single requests are answered.
    assert document["same_as_alone"] == {"nf4": 1.0, "int8": 1.0}
    assert document["prompt_tokens"]["nf4"] >= 48
    assert set(document["lora_adds_ms"]["int8"]) == {"same", "mixed", "mixed_r8"}
    assert document["machine"]["cpus"] > 0
    assert document["budgets_mb"]["nf4"]["adapters"] == pytest.approx(64 * 1024**2 / 1e6, abs=0.1)
    assert document["server"]["int8"]["quantization"] == "int8"
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in output.read_text()
    assert "through gRPC from another process" in result.output


@pytest.mark.slow
def test_growth_has_every_point_of_every_sweep(model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "growth.json"
    options = ["--model", str(model_folder), "--most", "4", "--tokens", "16", "--repeat", "1", "--json", str(output)]
    serve = "--threads 1 --dtype float32 --kv-cache-memory 32MiB --adapter-device-memory 64MiB"
    result = CliRunner().invoke(app, ["bench", "growth", *options, "--serve-args", serve])
    assert result.exit_code == 0, result.output
    sweeps = json.loads(output.read_text())["sweeps"]
    assert {name: [point["x"] for point in sweep["points"]] for name, sweep in sweeps.items()} == {
        "rows": [1, 2, 4],
        "adapters": [1, 2, 4],
        "rank": [4, 8],
        "context": [128],
    }
    for sweep in sweeps.values():
        assert all(point["tok_s"] > 0 and point["failed"] == 0 for point in sweep["points"])
    assert any(point["step_ms"] for sweep in sweeps.values() for point in sweep["points"])
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
