"""`loraplex bench peers` on a tiny model: ours is judged right by PEFT, and a peer that breaks is listed with why."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from loraplex.bench.peers.driver_process import DriverProcess
from loraplex.bench.peers.peer import Peer, ours
from loraplex.bench.peers.trials import Sizes
from loraplex.bench.peers.verdict import candidates, judge
from loraplex.cli import bench_peers

SIZES = Sizes(rows=3, tokens=12, long_prompt=24)


@pytest.fixture
def bench(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bench_peers.PeersBench:
    """Ours, and llama.cpp in an environment in which nothing is installed."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    broken = Peer("broken", "broken", "llama_cpp", ("a==1",), options={"source": "0"})
    python = tmp_path / "cache" / "broken" / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    (tmp_path / "cache" / "broken" / "installed.json").write_text('[["a==1"], []]')
    return bench_peers.PeersBench(
        [ours("none", "1.0"), broken], tmp_path / "cache", model_folder, tmp_path / "none.gguf", 2, 1, sizes=SIZES
    )


@pytest.mark.slow
def test_ours_is_right_and_what_breaks_is_listed(bench: bench_peers.PeersBench, tmp_path: Path) -> None:
    output, chart = tmp_path / "results" / "peers.json", tmp_path / "chart.png"
    assert bench_peers.run(bench, output, chart)
    own, broken, *others = json.loads(output.read_text())
    assert own["correct"] is True
    assert own["judged"]["mixed"]["rows_right"] == 3
    assert own["judged"]["mixed"]["greedy_share"] > 0.9
    for figure in ("base_tok_s", "mixed_tok_s", "one_stream_tok_s", "ttft_512_ms", "ready_s"):
        assert own[figure] > 0
        assert broken[figure] is None
    assert broken["system"] == "broken"
    assert broken["correct"] is None
    assert "prepare" in broken["reason"]
    assert all(other["reason"] for other in others)
    assert chart.read_bytes().startswith(b"\x89PNG")
    about = json.loads(output.with_name("peers-machine.json").read_text())
    assert about["sizes"]["rows"] == 3


@pytest.mark.slow
def test_the_oracle_knows_whose_answer_it_is(bench: bench_peers.PeersBench, tmp_path: Path) -> None:
    """What transformers and PEFT write is right; the same with the answers of two adapters exchanged is not."""
    job = bench_peers.make_common_job(bench, tmp_path)
    names = list(job.adapters)
    prompts = [[5, 9, 40], [7, 7, 20], [30, 2, 11]]
    python = Path(sys.executable)
    with (
        DriverProcess(python, "transformers_peft", tmp_path / "peft.log", {}, None) as peft,
        DriverProcess(python, "oracle", tmp_path / "oracle.log", {}, None) as oracle,
    ):
        peft.ask({"start": {**job.as_plain(), "options": {"dtype": "float32"}}}, 120)
        oracle.ask({"start": job.as_plain()}, 120)
        requests: list[dict[str, Any]] = [
            {"prompt": prompt, "adapter": name} for prompt, name in zip(prompts, names, strict=True)
        ]
        written = peft.ask({"run": requests, "max_tokens": 24}, 120)["tokens"]

        def correct(outputs: list[list[int]]) -> bool:
            asked = [
                (r["prompt"], out, candidates(r["adapter"], names)) for r, out in zip(requests, outputs, strict=True)
            ]
            return judge(oracle.ask({"score": asked}, 120)["scores"]).correct

        assert correct(written)
        others = [{**request, "adapter": names[0]} for request in requests]
        assert not correct(peft.ask({"run": others, "max_tokens": 24}, 120)["tokens"])
        assert oracle.ask({"tokenize": ["ab"]}, 120)["ids"]
