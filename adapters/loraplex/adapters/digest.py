"""The digest that names an adapter version: SHA-256 over a canonical form of what the adapter's author saved.

Canonical form, version 1. Every number is an unsigned 64-bit little-endian integer; `text` is UTF-8; a `field` is the
number of its bytes followed by the bytes.

1. field: the text `loraplex-adapter-v1`.
2. field: the config as JSON text: keys sorted at every level, no white space, nothing escaped that JSON lets stand;
   keys whose value is null left out at the top level; `target_modules`, `exclude_modules` and `modules_to_save` sorted
   where they are lists (PEFT writes them from sets, in any order); `rank_pattern` and `alpha_pattern` as lists of
   [pattern, value] pairs in the order of the file, because there the first match counts.
3. number: how many tensors there are. Then for each tensor, sorted by name: field: its name in the file as text;
   field: its dtype as safetensors writes it (`F32`, `F16`, `BF16`); number: how many dimensions; number for each
   dimension; field: its values, row-major, little-endian, in the source's dtype with nothing folded in.
4. number: 1 if there is a chat template, else 0; if there is: field: the template as text.

So the digest does not depend on the order of tensors or keys, on the metadata of the safetensors file, or on where
the adapter came from, and it changes with any value of the config, any bit of a tensor, any character of the template.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

FORMAT = "loraplex-adapter-v1"
PREFIX = "sha256:"
DTYPE_NAMES: Mapping[torch.dtype, str] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DIGEST = re.compile(re.escape(PREFIX) + "[0-9a-f]{64}")
_UNORDERED = frozenset({"target_modules", "exclude_modules", "modules_to_save"})
_ORDERED = frozenset({"rank_pattern", "alpha_pattern"})


def adapter_digest(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], chat_template: str | None = None
) -> str:
    """Return `sha256:<64 hex digits>` of the canonical form.

    `tensors` are contiguous CPU tensors under the names of the source file.

    Raises:
        KeyError: for a tensor whose dtype is not in `DTYPE_NAMES`.
    """
    return digest_of(canonical_form(config, tensors, chat_template))


def digest_of(form: Iterable[bytes | torch.Tensor]) -> str:
    """Return the digest of a canonical form."""
    hasher = hashlib.sha256()
    for piece in form:
        hasher.update(piece if isinstance(piece, bytes) else piece.reshape(-1).view(torch.uint8).numpy().data)
    return PREFIX + hasher.hexdigest()


def canonical_form(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], chat_template: str | None = None
) -> Iterator[bytes | torch.Tensor]:
    """Yield the canonical form in pieces; a tensor stands for its values.

    Raises:
        KeyError: for a tensor whose dtype is not in `DTYPE_NAMES`.
    """
    yield from (_field(FORMAT.encode()), _field(canonical_config(config).encode()), _number(len(tensors)))
    for name in sorted(tensors):
        tensor = tensors[name]
        yield _field(name.encode()) + _field(DTYPE_NAMES[tensor.dtype].encode()) + _number(tensor.dim())
        yield b"".join(map(_number, tensor.shape)) + _number(tensor.nbytes)
        yield tensor
    yield _number(chat_template is not None)
    if chat_template is not None:
        yield _field(chat_template.encode())


def _number(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _field(data: bytes) -> bytes:
    return _number(len(data)) + data


def is_digest(text: str) -> bool:
    """Whether `text` has the form of a digest."""
    return _DIGEST.fullmatch(text) is not None


def canonical_config(config: Mapping[str, Any]) -> str:
    """Return the JSON text of step 2 of the canonical form."""
    canonical: dict[str, Any] = {}
    for key, value in config.items():
        if key in _UNORDERED and isinstance(value, list):
            canonical[key] = sorted(value)
        elif key in _ORDERED and isinstance(value, dict):
            canonical[key] = [[pattern, v] for pattern, v in value.items()]
        elif value is not None:
            canonical[key] = value
    return json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
