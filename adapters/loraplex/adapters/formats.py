"""An adapter folder -> canonical tensors per target module, as PEFT's `save_pretrained` writes it.

Reads safetensors only: nothing is unpickled, nothing is executed, no file outside the folder is opened. Everything that
is wrong with the tensors is collected before it is reported. Knows nothing about base models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loraplex.adapters.digest import DTYPE_NAMES, adapter_digest
from loraplex.adapters.errors import AdapterFormatError, FieldViolation
from loraplex.adapters.folder import CONFIG_FILE, WEIGHTS_FILE, read_chat_template, read_inside, require_weights
from loraplex.adapters.spec import AdapterSpec, parse_config

# The header of an adapter is some kilobytes of JSON; safetensors itself would parse up to 100 MB of it.
MAX_HEADER_BYTES = 16 << 20
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_UNSUPPORTED = {
    "lora_embedding_": "LoRA on embeddings is not supported yet; train without embed_tokens in target_modules",
    "lora_magnitude_vector": "is a DoRA magnitude; DoRA is not supported yet",
    "lora_B.bias": "is a bias on B, which is not supported yet",
    "modules_to_save": "is a fully trained module, which is not supported yet",
    "base_layer": "is a weight of the base model; save the adapter with save_embedding_layers=False",
}


@dataclass(frozen=True)
class LoraPair:
    """A (r, in_features) and B (out_features, r) of one module, in the source's dtypes on the CPU, and their keys."""

    a: torch.Tensor
    b: torch.Tensor
    a_key: str
    b_key: str


@dataclass(frozen=True)
class Adapter:
    """An adapter as its author saved it, keyed by full module path; not yet bound to a base model."""

    digest: str
    spec: AdapterSpec
    pairs: Mapping[str, LoraPair]
    chat_template: str | None = None


def read_adapter(folder: Path) -> Adapter:
    """Read and check the adapter in `folder`.

    The tensors are copies: what happens to the files afterwards does not reach them.

    Raises:
        AdapterFormatError: with every problem found in the file that is wrong.
        OSError: if a file cannot be read.
    """
    spec, config = parse_config(read_inside(folder, CONFIG_FILE))
    template = read_chat_template(folder)
    tensors = _load_tensors(require_weights(folder))
    violations: list[FieldViolation] = []
    pairs = _pair(tensors, violations)
    for module, pair in pairs.items():
        _check_rank(spec, module, pair, violations)
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            violations.append(FieldViolation(key, "holds NaN or infinite values; the training has diverged"))
    if violations:
        raise AdapterFormatError(f"{WEIGHTS_FILE} cannot be used", violations)
    return Adapter(adapter_digest(config, tensors, template), spec, pairs, template)


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise AdapterFormatError.of(WEIGHTS_FILE, f"claims a header of {header_bytes} bytes, so it is no adapter")
    try:
        with safe_open(str(path), framework="pt") as weights:
            tensors: dict[str, torch.Tensor] = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterFormatError.of(
            WEIGHTS_FILE, f"is damaged or incomplete ({error}); save or copy the adapter again"
        ) from error
    violations = [
        FieldViolation(key, f"is {tensor.dtype}; only float32, float16 and bfloat16 are supported")
        for key, tensor in tensors.items()
        if tensor.dtype not in DTYPE_NAMES
    ]
    if violations:
        raise AdapterFormatError(f"{WEIGHTS_FILE} cannot be used", violations)
    # safe_open maps the file; a clone makes the tensors independent of it.
    return {key: tensor.clone() for key, tensor in tensors.items()}


def _pair(tensors: Mapping[str, torch.Tensor], violations: list[FieldViolation]) -> dict[str, LoraPair]:
    """Match A and B of each module; whatever is neither, or lacks its other half, is a violation."""
    keys: dict[str, dict[str, str]] = {}
    for key in sorted(tensors):
        match = _KEY.fullmatch(key)
        if match is None:
            reasons = (reason for part, reason in _UNSUPPORTED.items() if part in key)
            violations.append(FieldViolation(key, next(reasons, "is not a LoRA matrix that is known here")))
            continue
        sides = keys.setdefault(match["module"].removeprefix(_PREFIX), {})
        if match["side"] in sides:
            violations.append(FieldViolation(key, f"is the same matrix as {sides[match['side']]}"))
        sides.setdefault(match["side"], key)
    for sides in keys.values():
        if len(sides) == 1:
            ((side, key),) = sides.items()
            violations.append(FieldViolation(key, f"has no matching lora_{'B' if side == 'A' else 'A'}"))
    if not tensors:
        violations.append(FieldViolation(WEIGHTS_FILE, "holds no tensors"))
    return {
        module: LoraPair(tensors[sides["A"]], tensors[sides["B"]], sides["A"], sides["B"])
        for module, sides in keys.items()
        if len(sides) == 2
    }


def _check_rank(spec: AdapterSpec, module: str, pair: LoraPair, violations: list[FieldViolation]) -> None:
    rank = spec.rank_of(module)
    for key, tensor, axis in ((pair.a_key, pair.a, 0), (pair.b_key, pair.b, 1)):
        if tensor.dim() != 2:
            violations.append(FieldViolation(key, f"has shape {tuple(tensor.shape)}, not two dimensions"))
        elif tensor.shape[axis] != rank:
            described = f"has rank {tensor.shape[axis]} (shape {tuple(tensor.shape)})"
            violations.append(FieldViolation(key, f"{described}, but adapter_config.json gives the module rank {rank}"))
