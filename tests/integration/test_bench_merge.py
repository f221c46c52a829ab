"""`loraplex bench merge` on a tiny model: the document's shape, and that merges ran beside the load."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loraplex.bench.merge_cost import until_tidy
from loraplex.cli.main import app


async def test_a_merge_that_was_left_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / ".merged-1.partial").mkdir()
    waiting = asyncio.create_task(until_tidy(tmp_path))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    (tmp_path / ".merged-1.partial").rmdir()
    await waiting


@pytest.mark.slow
def test_load_beside_merges(model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "merge.json"
    options = ["--model", str(model_folder), "--repeat", "1", "--tokens", "64", "--json", str(output)]
    serve = "--threads 1 --dtype float32 --kv-cache-memory 32MiB --adapter-device-memory 64MiB"
    result = CliRunner().invoke(app, ["bench", "merge", *options, "--serve-args", serve])
    assert result.exit_code == 0, result.output
    document = json.loads(output.read_text())
    assert document["failed_requests"] == 0
    assert document["merges_left_at_the_end_of_a_run"] == 1
    assert document["merge_s_on_an_idle_server"] > 0
    assert document["tokens_per_second_alone"]["median"] > 0
    assert document["kept"] == pytest.approx(
        document["tokens_per_second_beside_merge"]["median"] / document["tokens_per_second_alone"]["median"], rel=1e-3
    )
    assert document["merge_mean_kl"] < 1e-6
    assert document["bench"]["base"] == "dequantized"
    assert str(tmp_path) not in output.read_text()
