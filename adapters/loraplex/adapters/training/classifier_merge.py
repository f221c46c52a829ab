"""Folds a classifier's adapter into its base, by PEFT; the result loads in transformers without PEFT.

Only for adapters of `sequence-classification`: generating models are merged by `adapters/merge.py`, which needs no PEFT
and holds one matrix at a time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loraplex.adapters.disk import (
    check_new_folder,
    disk_full_is_typed,
    move_folder,
    parents_made,
    partial_folder,
    sync_folder,
)
from loraplex.adapters.errors import AdapterFormatError, PreconditionError
from loraplex.adapters.folder import CONFIG_FILE
from loraplex.adapters.prompts import BUILT_IN
from loraplex.adapters.training.frozen_base import load_base, load_tokenizer
from loraplex.adapters.training.quiet_libraries import quiet_libraries
from loraplex.adapters.training.train_config import TrainConfig

LABELS_FILE = "labels.json"
_TOLERANCE = 1e-3
_LONGEST = 64


def is_classifier(adapter: Path) -> bool:
    """Return whether the folder holds an adapter of a classifier, by its config's `task_type`."""
    try:
        config = json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("task_type") == "SEQ_CLS"


def merge_classifier(model: str, adapter: Path, output: Path) -> float:
    """Write base `model` plus `adapter` to the new folder `output`; return the largest difference of any class's logit.

    Computed in float32 and compared on built-in texts before anything is written.

    Raises:
        AlreadyExistsError: `output` exists.
        AdapterFormatError: the adapter lacks the names of its classes.
        PreconditionError: the base cannot be loaded, or merged and unmerged differ by more than rounding.
        ResourceExhaustedError: the disk is full.
    """
    import peft

    check_new_folder(output)
    config = TrainConfig(
        model, "-", str(output), task="sequence-classification", quantization="none", dtype="float32", device="cpu"
    )
    with quiet_libraries(), torch.inference_mode():
        tokenizer = load_tokenizer(config)
        base = load_base(config, torch.device("cpu"), _labels(adapter))
        base.config.pad_token_id = tokenizer.pad_token_id
        try:
            wrapped: Any = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
        except (ValueError, RuntimeError) as error:
            raise PreconditionError(f"the adapter does not fit {model}: {error!s:.300}") from error
        longest = min(_LONGEST, getattr(base.config, "max_position_embeddings", _LONGEST) // 2)
        batch = tokenizer(list(BUILT_IN), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        unmerged = wrapped(**inputs).logits
        merged = wrapped.merge_and_unload()
        difference = float((merged(**inputs).logits - unmerged).abs().max())
        if not difference <= _TOLERANCE * max(1.0, float(unmerged.abs().max())):
            raise PreconditionError(f"merged and unmerged differ by {difference:g} in a logit; nothing is written")
        with disk_full_is_typed("writing the merged model"), parents_made(output), partial_folder(output) as folder:
            merged.save_pretrained(str(folder))
            tokenizer.save_pretrained(str(folder))
            sync_folder(folder)
            move_folder(folder, output)
    return difference


def _labels(adapter: Path) -> Sequence[str]:
    path = adapter / LABELS_FILE
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFormatError.of(LABELS_FILE, "is needed: the names of the classes, a JSON list in order") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise AdapterFormatError.of(LABELS_FILE, "must be a JSON list of the names of the classes")
    return labels
