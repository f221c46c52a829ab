"""Writes a trained adapter as PEFT does, in a form that depends on nothing but what was trained.

The folder is filled under another name by the caller, and renamed when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraplex.adapters.folder import CONFIG_FILE, TEMPLATE_FILE, WEIGHTS_FILE
from loraplex.adapters.training.classifier_merge import LABELS_FILE
from loraplex.adapters.training.train_config import TrainConfig


def save_adapter(model: Any, config: TrainConfig, folder: Path, initial: Path, labels: Sequence[str] = ()) -> None:
    """Write adapter config, float32 weights, and what else is its own: a chat template, a classifier's `labels`.

    A PiSSA adapter becomes a plain one of twice the rank for the unchanged base, by what it started from in `initial`.

    Raises:
        OSError: if it cannot be written.
    """
    options = {"save_embedding_layers": False}
    if config.init_lora_weights.startswith("pissa"):
        options["path_initial_model_for_weight_conversion"] = str(initial)  # type: ignore[assignment]
    model.save_pretrained(str(folder), **options)
    # PEFT's card is a form to fill in; ours says what was done.
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / CONFIG_FILE
    values = json.loads(path.read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = config.base_model_name or config.model
    # PEFT keeps names as a set, whose order changes from run to run.
    for name in ("target_modules", "modules_to_save"):
        if isinstance(values.get(name), list):
            values[name] = sorted(values[name])
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if config.chat_template:
        (folder / TEMPLATE_FILE).write_text(Path(config.chat_template).read_text(encoding="utf-8"), encoding="utf-8")
    if labels:
        (folder / LABELS_FILE).write_text(json.dumps(list(labels), ensure_ascii=False) + "\n", encoding="utf-8")
    # safetensors makes files that nobody else may read.
    (folder / WEIGHTS_FILE).chmod(0o644)
