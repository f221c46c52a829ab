"""`loraplex bench adapters --short` on a tiny model: budgets, right answers and the document's shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loraplex.cli.main import app


@pytest.mark.slow
def test_short_form_keeps_the_budgets_and_answers_right(model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "results" / "adapters.json"
    options = ["--model", str(model_folder), "--short", "--json", str(output)]
    serve = "--threads 1 --dtype float32 --kv-cache-memory 16MiB"
    result = CliRunner().invoke(app, ["bench", "adapters", *options, "--serve-args", serve])
    assert result.exit_code == 0, result.output
    document = json.loads(output.read_text())
    for key in ("throughput_5", "throughput_100", "kept"):
        assert document[key] > 0
    for key in ("throughput_5", "throughput_100", "kept"):
        assert document["cold"][key] > 0
    each = 2 * 2 * 8 * (32 + 32 + 32 + 16)  # layers, bytes, rank, inputs and outputs of q and v
    assert document["device_bytes_budget"] == 6 * each
    assert document["host_bytes_budget"] == 10 * each
    for tier in ("device", "host"):
        assert 0.5 * document[f"{tier}_bytes_budget"] < document[f"{tier}_bytes_peak"]
        assert document[f"{tier}_bytes_peak"] <= document[f"{tier}_bytes_budget"]
        assert document[f"{tier}_evictions"] > 0
    assert 0 <= document["waste_mixed_ranks"] <= 0.25
    assert 0 < document["load_ms_p50"] <= document["load_ms_p99"]
    assert document["warm"]["requests"] == 24
    assert 0 < document["warm"]["loads_from_disk"] <= 24
    assert document["failed_requests"] == 0
    # The tiny model is float32: what is answered under evictions must be what single requests are answered.
    assert document["same_as_alone"] == 1.0
    assert set(document["rounds_rss_mb"]) == {"after_6", "after_12"}
    assert document["machine"]["cpus"] > 0
    assert str(tmp_path) not in output.read_text()
    assert "100 adapters beside 5" in result.output
