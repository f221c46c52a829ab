"""Leaves out of an adapter what is the base's own.

PEFT saves the base's embedding and lm_head beside every LoRA on them. Kept as weights of the adapter's own they would
take more memory than everything else it has, and a matrix product of their own in every step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from loraplex.adapters.base_model import HEAD_WEIGHT
from loraplex.adapters.binding import BoundAdapter
from loraplex.server.lora.base import BaseParameters

_CHUNK_ELEMENTS = 2**22
"""Converted at a time: a whole lm_head of a large model in another dtype would take gigabytes for a moment."""


def without_copies(bound: BoundAdapter, base: BaseParameters) -> BoundAdapter:
    """Return `bound` without those of its embedding and lm_head whose values in the activations' dtype are the base's.

    The base's are those that its products were made of: what serves may hold lm_head rounded.
    """
    copies = {
        name
        for name in (base.embedding, HEAD_WEIGHT)
        if name in bound.parameters and _is_copy(name, bound.parameters[name], base)
    }
    kept = {name: value for name, value in bound.parameters.items() if name not in copies}
    return replace(bound, parameters=kept) if copies else bound


def matrix_digest(matrix: torch.Tensor, dtype: torch.dtype) -> str:
    """Return the SHA-256 of a matrix's shape and of its values in `dtype`, in hexadecimal digits."""
    digest = hashlib.sha256(f"{tuple(matrix.shape)} {dtype}".encode())
    for rows in _chunks(matrix):
        digest.update(rows.to("cpu", dtype).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_copy(name: str, value: torch.Tensor, base: BaseParameters) -> bool:
    if name == base.embedding or base.tied:
        return base.table is not None and _are_equal(value, base.table, base.activations)
    return bool(base.head_digest) and matrix_digest(value, base.activations) == base.head_digest


def _are_equal(value: torch.Tensor, own: torch.Tensor, dtype: torch.dtype) -> bool:
    if own.shape != value.shape:
        return False
    pairs = zip(_chunks(value), _chunks(own), strict=True)
    return all(torch.equal(ours.to(theirs.device, dtype), theirs.to(dtype)) for ours, theirs in pairs)


def _chunks(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    step = max(1, _CHUNK_ELEMENTS // matrix.shape[1])
    yield from (matrix[first : first + step] for first in range(0, len(matrix), step))
