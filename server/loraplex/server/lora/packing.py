"""From an adapter as it was bound to the base to what the packed layers use.

Knows nothing about slots or segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraplex.adapters.binding import BoundAdapter, ModuleWeights
from loraplex.server.lora.buffer import Buffer
from loraplex.server.lora.weights import LinearSite, PackedAdapter, SliceWeights

# Per site, the modules that an adapter changes there, each with the start and end of its slice.
Placed = Sequence[Sequence[tuple[ModuleWeights, int, int]]]


def pack_adapter(
    bound: BoundAdapter, sites: Sequence[LinearSite], dtype: torch.dtype, device: torch.device
) -> PackedAdapter:
    """Copy `bound` into one block of memory on `device`, arranged by site, scaling folded into B.

    The fold happens in float32, before the one rounding to `dtype`.

    Raises:
        ValueError: if a module of the adapter belongs to no site (it would silently have no effect), or if its
            shapes do not fit the site.
    """
    placed = _place(bound, sites)
    nbytes = _nbytes(placed, dtype)
    memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    rank = max((weights.rank for weights in bound.modules.values()), default=0)
    return PackedAdapter(bound.digest, _pack(placed, dtype, Buffer(memory)), nbytes, rank, memory)


def packed_nbytes(bound: BoundAdapter, sites: Sequence[LinearSite], dtype: torch.dtype) -> int:
    """Return the `nbytes` that `pack_adapter` would need, without copying anything.

    Raises:
        ValueError: as `pack_adapter` does.
    """
    return _nbytes(_place(bound, sites), dtype)


def _place(bound: BoundAdapter, sites: Sequence[LinearSite]) -> Placed:
    """Return per site the adapter's (weights, start, end) by start."""
    known = {name for site in sites for name in site.targets}
    stray = sorted(set(bound.modules) - known)
    if stray:
        raise ValueError(f"adapter {bound.digest} has weights for modules that the model does not have: {stray[:20]}")
    placed = []
    for site in sites:
        here = [(bound.modules[name], *span) for name, span in site.targets.items() if name in bound.modules]
        for weights, start, end in here:
            expected = ((weights.rank, site.in_features), (end - start, weights.rank))
            if (tuple(weights.a.shape), tuple(weights.b.shape)) != expected:
                raise ValueError(
                    f"adapter {bound.digest} at {site.name}[{start}:{end}]: A {tuple(weights.a.shape)} and "
                    f"B {tuple(weights.b.shape)} instead of {expected[0]} and {expected[1]}"
                )
        placed.append(sorted(here, key=lambda entry: entry[1]))
    return placed


def _nbytes(placed: Placed, dtype: torch.dtype) -> int:
    counted = Buffer()
    _pack(placed, dtype, counted)
    return counted.nbytes


def _pack(placed: Placed, dtype: torch.dtype, buffer: Buffer) -> tuple[tuple[SliceWeights, ...], ...]:
    return tuple(tuple(_slice(*entry, dtype, buffer) for entry in modules) for modules in placed)


def _slice(weights: ModuleWeights, start: int, end: int, dtype: torch.dtype, buffer: Buffer) -> SliceWeights:
    rank, in_features = weights.a.shape
    a = buffer.put((rank, in_features), dtype, lambda: weights.a.float())
    b_t = buffer.put((rank, end - start), dtype, lambda: (weights.b.float() * weights.scaling).T)
    return SliceWeights(a, b_t, start, end)
