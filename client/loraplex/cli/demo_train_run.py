"""The phases of `loraplex demo-train`: train, have a server take the adapter, ask it what it has never seen."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraplex.bench.commit import current_commit
from loraplex.bench.machine import machine_info
from loraplex.bench.server_process import ServerProcess
from loraplex.cli import train_run
from loraplex.cli.output import to_stderr
from loraplex.client import Client, DeadlineError

CONFIG = "demo-train.yaml"
NAME = "demo-trained"
MIN_GAIN = 0.2
MIN_ROWS = 100
_PROBE_S = 1.0
_DATA = (("data", "train"), ("validation_data", "test"))


def run(server: str, examples: Path, output: Path, settings: Mapping[str, Any]) -> bool:
    """Train what `demo-train.yaml` in `examples` says and write `output`; return whether all held.

    Raises:
        LoraplexError: something cannot be trained.
        ServerProcessError: a server does not start.
        LoraplexClientError: it refuses something.
    """
    from loraplex.server.models.demo import demo_model_path

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="loraplex-train-") as scratch:
        data = {name: str(examples / "data" / f"date.{kind}.jsonl") for name, kind in _DATA}
        given = {"output_dir": str(Path(scratch) / NAME), **data, **settings}
        config = train_run.read_config(examples / CONFIG, given)
        trained = train_run.run(config, resume=False)
        if trained is None:
            return False
        train_run.show(trained)
        result = trained.result
        trained_s = time.monotonic() - started
        with _server(server, demo_model_path(), Path(scratch)) as target, Client(target) as client:
            adapter = client.upload_adapter(NAME, result.output_dir).adapter
            asked = result.answers[0][0]
            messages = [{"role": "user", "content": asked.prompt}]
            options: dict[str, Any] = {"max_tokens": config.score_max_new_tokens, "temperature": 0.0}
            answer, of_base = (client.generate(messages, name, **options) for name in (NAME, ""))
    assert result.base is not None
    assert result.adapter is not None
    gain = (result.adapter.accuracy or 0.0) - (result.base.accuracy or 0.0)
    held = gain >= MIN_GAIN and result.adapter.rows >= MIN_ROWS and answer.adapter_digest == adapter.digest
    document = {
        "held": held,
        "seconds": round(time.monotonic() - started, 1),
        "base_accuracy": result.base.accuracy,
        "adapter_accuracy": result.adapter.accuracy,
        "base_contained": result.base.contained,
        "adapter_contained": result.adapter.contained,
        "rows": result.adapter.rows,
        "registered": {"name": adapter.name, "digest": adapter.digest},
        "served_prompt": asked.prompt,
        "served_answer": answer.text,
        "expected_answer": asked.expected,
        "base_answer": of_base.text,
        "training_and_scores_s": round(trained_s, 1),
        "training_s": round(result.seconds, 1),
        "steps": result.steps,
        "tokens_per_second": round(result.tokens_per_second, 1),
        "peak_memory": result.peak_memory,
        "losses": result.losses,
        "config": config.to_values(),
        "commit": current_commit(),
        "machine": machine_info(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console = to_stderr()
    console.print(f"{asked.prompt}\n  served: {answer.text!r}\n  base:   {of_base.text!r}", markup=False)
    console.print(f"{'held' if held else 'DID NOT HOLD'}: {gain:+.0%} on {result.adapter.rows} rows; written: {output}")
    return held


@contextmanager
def _server(server: str, model: Path, scratch: Path) -> Iterator[str]:
    """Yield `server` if it serves `model`, else a server that is started for the block."""
    if _serves(server, model):
        yield server
        return
    arguments = ["--model", str(model), "--quantization", "nf4"]
    with ServerProcess(arguments, scratch / "server.log") as started:
        started.wait_until_ready()
        yield started.target


def _serves(server: str, model: Path) -> bool:
    with Client(server) as client:
        try:
            client.wait_until_ready(_PROBE_S)
        except DeadlineError:
            return False
        return Path(client.server_info().model_path) == model
