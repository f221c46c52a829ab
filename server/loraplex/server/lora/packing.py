"""From an adapter as it was bound to the base to what the packed layers use.

Knows nothing about slots or segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex.adapters.binding import BoundAdapter
from loraplex.server.lora.base import BaseParameters
from loraplex.server.lora.buffer import Buffer
from loraplex.server.lora.changes import SiteChanges
from loraplex.server.lora.site_packing import SitePacker
from loraplex.server.lora.weights import LinearSite, PackedAdapter, SliceWeights


def pack_adapter(
    bound: BoundAdapter,
    sites: Sequence[LinearSite],
    dtype: torch.dtype,
    device: torch.device,
    base: BaseParameters | None = None,
    *,
    pinned: bool = False,
) -> PackedAdapter:
    """Copy `bound` into one block of memory on `device`, arranged by site.

    Scalings, and DoRA's factors, are folded into B in float32, before the one rounding to `dtype`. `base` may be left
    out for plain LoRA. From `pinned` memory (of the CPU) a GPU copies beside its other work.

    Raises:
        ValueError: if a part of the adapter has no place in the model (it would silently have no effect), if its shapes
            do not fit there, or if it is no plain LoRA and there is no `base`.
    """
    packing = _Packing(bound, sites, dtype, base)
    memory = torch.zeros(packing.nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)
    return packing.into(memory)


def packed_nbytes(
    bound: BoundAdapter, sites: Sequence[LinearSite], dtype: torch.dtype, base: BaseParameters | None = None
) -> int:
    """Return the `nbytes` that `pack_adapter` would need, without copying anything.

    Raises:
        ValueError: as `pack_adapter` does.
    """
    return _Packing(bound, sites, dtype, base).nbytes


class _Packing:
    """One adapter on its way into memory: every part has its place, its size is known."""

    def __init__(
        self, bound: BoundAdapter, sites: Sequence[LinearSite], dtype: torch.dtype, base: BaseParameters | None
    ) -> None:
        self._bound = bound
        self._sites = [SitePacker(bound, index, site, dtype, base) for index, site in enumerate(sites)]
        self._refuse_strays()
        counted = Buffer()
        self._fill(counted)
        self.nbytes = counted.nbytes

    def into(self, memory: torch.Tensor) -> PackedAdapter:
        """Copy everything into `memory`, (nbytes,) uint8."""
        parts = self._fill(Buffer(memory))
        rank = max((weights.rank for weights in self._bound.modules.values()), default=0)
        return PackedAdapter(self._bound.digest, parts.sites, self.nbytes, rank, memory, parts.changes)

    def _fill(self, buffer: Buffer) -> _Parts:
        packed = [site.pack(buffer) for site in self._sites]
        changes = {index: change for index, (_, change) in enumerate(packed) if change is not None}
        return _Parts(tuple(slices for slices, _ in packed), changes)

    def _refuse_strays(self) -> None:
        bound, known = self._bound, {name for site in self._sites for name in site.names}
        given = {f"{name} (A and B)": name for name in bound.modules}
        given |= {name: name for name in (*bound.parameters, *bound.token_rows)}
        stray = sorted(shown for shown, name in given.items() if name not in known)
        if stray:
            raise ValueError(f"adapter {bound.digest} has weights for what the model does not have: {stray[:20]}")


@dataclass(frozen=True)
class _Parts:
    """What lies in a buffer."""

    sites: tuple[tuple[SliceWeights, ...], ...]
    changes: dict[int, SiteChanges]
