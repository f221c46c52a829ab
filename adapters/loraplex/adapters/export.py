"""What belongs into a Hugging Face folder beside the weights: config, tokenizer, index and a model card."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraplex.adapters.blend import Blend
from loraplex.adapters.compare import Comparison
from loraplex.adapters.folder import TEMPLATE_FILE, TOKENIZER_CONFIG
from loraplex.adapters.merge_plan import MergePlan, Target
from loraplex.adapters.model_folder import INDEX_FILE, SINGLE_FILE, ModelFolder

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
    """How the weights came about: `changed` parameters; `files` maps each weight file to its SHA-256."""

    blend: Blend
    target: Target
    dtype: torch.dtype
    changed: int
    files: Mapping[str, str]


def write_companions(model: ModelFolder, folder: Path, plan: MergePlan, provenance: Provenance) -> None:
    """Write config, tokenizer and index into `folder`, which holds the weights.

    The adapters' chat template takes the place of the base's if they have one and agree on it.

    Raises:
        OSError: if a file cannot be read or written.
    """
    for name in COPIED_FILES:
        if (model.path / name).is_file():
            shutil.copyfile(model.path / name, folder / name)
    templates = {part.adapter.chat_template for part in provenance.blend.parts}
    template = templates.pop() if len(templates) == 1 else None
    if template is not None:
        (folder / TEMPLATE_FILE).write_bytes(template.encode())
        _drop_template(folder / TOKENIZER_CONFIG)
    _write_json(folder / "config.json", _config(model, plan, provenance))
    if tuple(plan.shards) != (SINGLE_FILE,):
        weight_map = {
            tensor.name: file
            for file, outputs in plan.shards.items()
            for output in outputs
            for tensor in output.tensors
        }
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / INDEX_FILE, index)


def _config(model: ModelFolder, plan: MergePlan, provenance: Provenance) -> dict[str, Any]:
    left_out = ("torch_dtype", "dtype", "quantization_config")
    config = {key: value for key, value in model.config.items() if key not in left_out}
    config["dtype"] = str(provenance.dtype).removeprefix("torch.")
    if plan.unties:
        config["tie_word_embeddings"] = False
    if provenance.target.quantize:
        config["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": provenance.target.quantize,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": config["dtype"],
            "llm_int8_skip_modules": ["lm_head"],
        }
    return config


def write_card(model: ModelFolder, folder: Path, provenance: Provenance, comparison: Comparison) -> None:
    """Write the model card: what was merged into what, the digests, and the measured difference.

    Raises:
        OSError: if a file cannot be read or written.
    """
    base_files = {name: _sha256(model.path / name) for name in ("config.json", *model.files)}
    rows = [
        *(
            ("adapter", f"`{part.adapter.digest}`, its own scaling times {part.weight:g}")
            for part in provenance.blend.parts
        ),
        *([("method", provenance.blend.mixing.describe())] if len(provenance.blend.parts) > 1 else []),
        ("base", model.path.name),
        ("merged into", f"{_started(model, provenance.target)} (`{provenance.target.base}`)"),
        ("parameters changed", str(provenance.changed)),
        ("dtype", str(provenance.dtype).removeprefix("torch.")),
        *([("quantized again", f"{provenance.target.quantize}, bitsandbytes")] if provenance.target.quantize else []),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    (folder / "README.md").write_text(f"""---
library_name: transformers
tags:
- merged
- lora
---
# {model.path.name} with LoRA merged in

Written by `loraplex merge`. It loads like any other model, without PEFT.

| | |
|---|---|
{table}

Every changed weight is W plus the adapters' updates, computed in float32 and rounded once.

## Difference from base and adapters apart
Read again after writing and computed in float32, over {comparison.positions} positions: largest logit difference
{comparison.max_logit_difference:.3g}, same most likely token at {comparison.top1_agreement:.2%}, mean KL divergence
{comparison.mean_kl:.3g} nats.

## SHA-256 of the base's files
{_listing(base_files)}

## SHA-256 of the weights written
{_listing(provenance.files)}
""")


def _started(model: ModelFolder, target: Target) -> str:
    if model.quantization:
        return f"the values of the base's weights, which are stored as {model.quantization} (bitsandbytes)"
    if target.quantization:
        return f"the base's weights after quantization to {target.quantization} and back (bitsandbytes)"
    return "the base's own weights"


def _drop_template(path: Path) -> None:
    if path.is_file():
        content = json.loads(path.read_bytes())
        if isinstance(content, dict) and content.pop("chat_template", None) is not None:
            _write_json(path, content)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _listing(files: Mapping[str, str]) -> str:
    return "\n".join(f"- `{name}`: `{digest}`" for name, digest in files.items())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
