"""From an adapter as it was bound to the base to what the packed layers use.

Knows nothing about slots or segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraplex.adapters.binding import BoundAdapter
from loraplex.server.lora.base import BaseParameters
from loraplex.server.lora.buffer import Buffer
from loraplex.server.lora.copies import without_copies
from loraplex.server.lora.embedding_packing import EmbeddingPacker
from loraplex.server.lora.norm_packing import changed_norms
from loraplex.server.lora.site_packing import SitePacker
from loraplex.server.lora.weights import LinearSite, PackedAdapter
from loraplex.server.native.pages import zeros_on_huge_pages


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

    Scalings, and DoRA's factors, are folded into B in float32, before the one rounding to `dtype`. Copies of the base's
    own embedding and lm_head are left out. `base` may be left out for plain LoRA. From `pinned` memory (of the CPU) a
    GPU copies beside its other work.

    Raises:
        ValueError: if a part of the adapter has no place in the model (it would silently have no effect), if its shapes
            do not fit there, or if it is no plain LoRA and there is no `base`.
    """
    packing = _Packing(bound, sites, dtype, base)
    return packing.into(packed_memory(packing.nbytes, device, pinned=pinned))


def packed_nbytes(
    bound: BoundAdapter, sites: Sequence[LinearSite], dtype: torch.dtype, base: BaseParameters | None = None
) -> int:
    """Return the `nbytes` that `pack_adapter` would need, without copying anything.

    Raises:
        ValueError: as `pack_adapter` does.
    """
    return _Packing(bound, sites, dtype, base).nbytes


def packed_memory(nbytes: int, device: torch.device, *, pinned: bool) -> torch.Tensor:
    """Return (nbytes,) uint8 zeros for an adapter: on huge pages for a CPU to read, or pinned for a GPU."""
    if device.type == "cpu" and not pinned:
        return zeros_on_huge_pages(nbytes)
    return torch.zeros(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)


class _Packing:
    """One adapter on its way into memory: every part has its place, its size is known."""

    def __init__(
        self, bound: BoundAdapter, sites: Sequence[LinearSite], dtype: torch.dtype, base: BaseParameters | None
    ) -> None:
        bound = bound if base is None else without_copies(bound, base)
        self._bound = bound
        self._sites = [SitePacker(bound, index, site, dtype, base) for index, site in enumerate(sites)]
        self._embedding = None if base is None else EmbeddingPacker(bound, dtype, base)
        self._norms = {} if base is None else changed_norms(bound, base)
        self._refuse_strays()
        self.nbytes = self._fill(None).nbytes

    def into(self, memory: torch.Tensor) -> PackedAdapter:
        """Copy everything into `memory`, (nbytes,) uint8."""
        return self._fill(memory)

    def _fill(self, memory: torch.Tensor | None) -> PackedAdapter:
        buffer = Buffer(memory)
        sites = [site.pack(buffer) for site in self._sites]
        embedding = None if self._embedding is None else self._embedding.pack(buffer)
        norms = {place: norm.pack(buffer) for place, norm in self._norms.items()}
        return PackedAdapter(
            digest=self._bound.digest,
            sites=tuple(slices for slices, _ in sites),
            nbytes=buffer.nbytes,
            rank=max((weights.rank for weights in self._bound.modules.values()), default=0),
            memory=memory,
            changes={index: change for index, (_, change) in enumerate(sites) if change is not None},
            embedding=embedding,
            norms=norms,
        )

    def _refuse_strays(self) -> None:
        bound = self._bound
        given = {("modules", name) for name in bound.modules} | {("parameters", name) for name in bound.parameters}
        given |= {("token_rows", name) for name in bound.token_rows}
        given |= {("embedding", "")} if bound.embedding else set()
        packers = [*self._sites, *self._norms.values(), *((self._embedding,) if self._embedding else ())]
        stray = given.difference(*(packer.taken for packer in packers))
        if stray:
            named = ", ".join(sorted(f"{kind} {name}".rstrip() for kind, name in stray)[:20])
            raise ValueError(f"adapter {bound.digest} has weights for what the model does not have: {named}")
