"""A tiny base model with a tokenizer, data it can learn, and runs on them in seconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.watching import Progress, Silent, StopRequest
from tests.unit.tiny_tokenizers import byte_level_fast, wrap

ROWS = [{"prompt": f"{n} plus one?", "completion": f"{n + 1}."} for n in range(40)]


def save_base(folder: Path, model_type: str = "llama", **settings: Any) -> Path:
    """Write a random model of two layers with a chat tokenizer to `folder`."""
    tokenizer = wrap(byte_level_fast())
    tokenizer.save_pretrained(folder)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh models have near-uniform attention, where nothing that is computed wrong would show.
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Sequence[Any] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_run(base: Path, folder: Path, rows: Sequence[Any] = ROWS, **settings: Any) -> TrainConfig:
    """Return the configuration of a short run on `rows` in `folder`."""
    folder.mkdir(exist_ok=True)
    values = {
        "model": str(base),
        "data": str(write_rows(folder / "data.jsonl", rows)),
        "output_dir": str(folder / "adapter"),
        "rank": 4,
        "dropout": 0.1,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "per_device_batch_size": 4,
        "save_steps": 2,
        "score_rows": 4,
        "score_max_new_tokens": 6,
        "dtype": "float32",
    }
    return TrainConfig.from_values({**values, **settings})


class Watcher(Silent):
    """Keeps what it is told; `stop_after` asks for a stop at that step."""

    def __init__(self, stop_after: int = 0, on_step: Callable[[int], None] = lambda step: None) -> None:
        self.notes: list[str] = []
        self.steps: list[Progress] = []
        self.stop = StopRequest()
        self._stop_after = stop_after
        self._on_step = on_step

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, progress: Progress) -> None:
        self.steps.append(progress)
        self._on_step(progress.step)
        if progress.step == self._stop_after:
            self.stop.set()
