"""Refuses packed adapters with numbers that no request could use: a single NaN makes all logits of its rows NaN.

What was stored is checked when it is registered. What packing makes of it can still be infinite, in a narrower dtype or
times a large scaling, or NaN: DoRA divides by the norm of W + s B A, which is 0 for a row of zeros, and so does PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from loraplex.server.errors import PreconditionError
from loraplex.server.lora.weights import LinearSite, PackedAdapter

_NO_NORM = "has an output whose row of W + s B A has norm 0, or none that is finite, and DoRA divides by it"


def refuse_not_finite(packed: PackedAdapter, sites: Sequence[LinearSite]) -> None:
    """Check all numbers of an adapter that was packed for the model with these `sites`.

    Raises:
        PreconditionError: naming the first module with a NaN or infinite number, and why it has one.
    """
    plain = not (packed.changes or packed.embedding or packed.norms)
    if plain and packed.memory is not None and _is_finite(packed.memory.view(packed.dtype)):
        return  # one block of one dtype, the gaps zeros
    for module, reason, tensor in _numbers(packed, sites):
        if not _is_finite(tensor):
            raise PreconditionError(f"adapter {packed.digest} cannot be used: {module} {reason}")


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _numbers(packed: PackedAdapter, sites: Sequence[LinearSite]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield (module, what it would mean if they were not finite, numbers); factors come before the B they are in."""
    beyond = "has values that are not finite in {}; a larger --adapter-dtype may hold them".format
    for index, slices in enumerate(packed.sites):
        change = packed.changes.get(index)
        for name, (start, end) in sites[index].targets.items():
            if change is not None and change.factors is not None:
                yield name, _NO_NORM, change.factors[start:end]
            if change is not None and change.scaled_bias is not None:
                yield name, "has a bias on B that is not finite once it is scaled", change.scaled_bias[start:end]
            if change is not None and change.bias is not None:
                yield name, "has a bias that is not finite", change.bias[start:end]
            for each in (s for s in slices if s.start == start and s.end == end):
                yield name, f"(A) {beyond(each.a.dtype)}", each.a
                yield name, f"(B with its scaling) {beyond(each.b_t.dtype)}", each.b_t
        for columns in () if change is None else change.columns:
            yield sites[index].name, f"(a trained weight) {beyond(columns.weight.dtype)}", columns.weight
        for rows in () if change is None else change.rows:
            yield sites[index].name, f"(token rows) {beyond(rows.rows.dtype)}", rows.rows
    yield from _beside_sites(packed)


def _beside_sites(packed: PackedAdapter) -> Iterator[tuple[str, str, torch.Tensor]]:
    reason = "has values that are not finite in the dtype that it is used in"
    embedding = packed.embedding
    if embedding is not None:
        rows, lora = embedding.rows, embedding.lora
        parts = [embedding.table, embedding.positions, None if rows is None else rows.rows]
        parts += [] if lora is None else [lora.a_t, lora.b_t]
        yield from (("the embedding", reason, part) for part in parts if part is not None)
    for place, norm in packed.norms.items():
        yield from ((place, reason, tensor) for tensor in norm.tensors)
