"""What belongs into a Hugging Face folder beside the weights: config, tokenizer, index and a model card."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex.adapters.folder import TEMPLATE_FILE
from loraplex.adapters.model_folder import INDEX_FILE, SINGLE_FILE, ModelFolder
from loraplex.adapters.tensor_file import TensorPlan

TOKENIZER_CONFIG = "tokenizer_config.json"
# By name, so that nothing else in the base's folder (code, other formats of the weights) travels along.
COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    TEMPLATE_FILE,
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)


@dataclass(frozen=True)
class Provenance:
    """How the weights came about; `files` maps each weight file to its SHA-256."""

    adapter_digest: str
    base: str
    quantization: str | None
    scale: float
    dtype: torch.dtype
    modules: int
    files: Mapping[str, str]


def write_companions(
    model: ModelFolder,
    folder: Path,
    plans: Mapping[str, Sequence[TensorPlan]],
    provenance: Provenance,
    chat_template: str | None,
    *,
    untied: bool,
) -> None:
    """Write everything but the weights into `folder`.

    An adapter's `chat_template` takes the place of the base's. `untied` says that lm_head has weights of its own now.

    Raises:
        OSError: if a file cannot be read or written.
    """
    for name in COPIED_FILES:
        if (model.path / name).is_file():
            shutil.copyfile(model.path / name, folder / name)
    if chat_template is not None:
        (folder / TEMPLATE_FILE).write_bytes(chat_template.encode())
        _drop_template(folder / TOKENIZER_CONFIG)
    config = {key: value for key, value in model.config.items() if key not in ("torch_dtype", "dtype")}
    config["dtype"] = str(provenance.dtype).removeprefix("torch.")
    if untied:
        config["tie_word_embeddings"] = False
    _write_json(folder / "config.json", config)
    if tuple(plans) != (SINGLE_FILE,):
        weight_map = {plan.name: file for file, shard in plans.items() for plan in shard}
        total = sum(plan.nbytes for shard in plans.values() for plan in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / INDEX_FILE, index)
    (folder / "README.md").write_text(_card(model, provenance))


def _drop_template(path: Path) -> None:
    if path.is_file():
        content = json.loads(path.read_bytes())
        if isinstance(content, dict) and content.pop("chat_template", None) is not None:
            _write_json(path, content)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _card(model: ModelFolder, provenance: Provenance) -> str:
    started = "the base's own weights"
    if provenance.quantization:
        started = f"the base's weights after quantization to {provenance.quantization} and back (bitsandbytes)"
    base_files = {name: _sha256(model.path / name) for name in ("config.json", *model.files)}
    return f"""---
library_name: transformers
tags:
- merged
- lora
---
# {model.path.name} with one LoRA adapter merged in

Written by `loraplex merge`. It loads like any other model, without PEFT.

| | |
|---|---|
| adapter | `{provenance.adapter_digest}` |
| base | {model.path.name} |
| merged into | {started} (`{provenance.base}`) |
| modules changed | {provenance.modules} |
| adapter scale | {provenance.scale:g} times the adapter's own scaling |
| dtype | {str(provenance.dtype).removeprefix("torch.")} |

Every changed weight is W + scale * scaling * B A, computed in float32.

## SHA-256 of the base's files
{_listing(base_files)}

## SHA-256 of the weights written
{_listing(provenance.files)}
"""


def _listing(files: Mapping[str, str]) -> str:
    return "\n".join(f"- `{name}`: `{digest}`" for name, digest in files.items())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
