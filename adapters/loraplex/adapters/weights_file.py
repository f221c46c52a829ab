"""The tensors of an adapter's safetensors file, read with care: the file comes from anybody.

Knows nothing about what the tensors mean.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loraplex.adapters.digest import DTYPE_NAMES
from loraplex.adapters.errors import AdapterFormatError, FieldViolation
from loraplex.adapters.folder import WEIGHTS_FILE

# The header of an adapter is some kilobytes of JSON; safetensors itself would parse up to 100 MB of it.
MAX_HEADER_BYTES = 16 << 20


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return copies of all tensors in `path`: what happens to the file afterwards does not reach them.

    Raises:
        AdapterFormatError: the file is damaged, claims too large a header, or holds a type or value that is no number.
        OSError: if it cannot be read.
    """
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
    ] or [
        FieldViolation(key, "holds NaN or infinite values; the training has diverged")
        for key, tensor in tensors.items()
        if not bool(torch.isfinite(tensor).all())
    ]
    if violations:
        raise AdapterFormatError(f"{WEIGHTS_FILE} cannot be used", violations)
    # safe_open maps the file; a clone makes the tensors independent of it.
    return {key: tensor.clone() for key, tensor in tensors.items()}
