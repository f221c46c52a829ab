"""Packs adapters for one model; those of a known layout without looking for every module's place again.

Thread-safe. Knows nothing about files, slots or segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from loraplex.adapters.binding import BoundAdapter
from loraplex.server.lora.base import BaseParameters
from loraplex.server.lora.finite import refuse_not_finite
from loraplex.server.lora.packing import pack_adapter, packed_memory
from loraplex.server.lora.weights import LinearSite, PackedAdapter, SliceWeights

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class _Slice:
    """One module's place: `a` (rank, inputs) and `b_t` (rank, end - start) from these elements of the memory on."""

    module: str
    rank: int
    inputs: int
    start: int
    end: int
    a: int
    b_t: int

    def fill(self, bound: BoundAdapter, elements: torch.Tensor) -> SliceWeights:
        weights, width = bound.modules[self.module], self.end - self.start
        a = elements.as_strided((self.rank, self.inputs), (self.inputs, 1), self.a).copy_(weights.a)
        b_t = elements.as_strided((self.rank, width), (width, 1), self.b_t)
        # In float32, before the one rounding to the dtype of the memory.
        b_t.copy_((weights.b.float() * weights.scaling).T)
        return SliceWeights(a, b_t, self.start, self.end)


@dataclass(frozen=True)
class _Plan:
    """Where everything of a layout goes."""

    sites: tuple[tuple[_Slice, ...], ...]
    nbytes: int
    rank: int

    @classmethod
    def of(cls, packed: PackedAdapter, sites: Sequence[LinearSite]) -> _Plan:
        """Read it off a packed adapter, which is plain LoRA."""
        return cls(tuple(map(_slices, packed.sites, sites)), packed.nbytes, packed.rank)

    def pack(self, bound: BoundAdapter, dtype: torch.dtype, pinned: bool) -> PackedAdapter:
        memory = packed_memory(self.nbytes, _HOST, pinned=pinned)
        elements = memory.view(dtype)
        sites = tuple(tuple(each.fill(bound, elements) for each in slices) for slices in self.sites)
        return PackedAdapter(bound.digest, sites, self.nbytes, self.rank, memory)


class Packer:
    """Packs into the host's memory."""

    def __init__(self, sites: Sequence[LinearSite], dtype: torch.dtype, base: BaseParameters, *, pinned: bool) -> None:
        """Pack for the model with these `sites` and this `base`; `pinned` is for a GPU to copy from."""
        self._sites, self._dtype, self._base, self._pinned = sites, dtype, base, pinned
        self._plans: WeakKeyDictionary[object, _Plan] = WeakKeyDictionary()

    def pack(self, bound: BoundAdapter) -> PackedAdapter:
        """Return what `pack_adapter` would, once all its numbers are known to be finite.

        Raises:
            ValueError: as `pack_adapter` does.
            PreconditionError: if it has numbers that are not finite.
        """
        packed = self._pack(bound)
        refuse_not_finite(packed, self._sites)
        return packed

    def _pack(self, bound: BoundAdapter) -> PackedAdapter:
        plan = self._plans.get(bound.layout) if bound.layout is not None else None
        if plan is not None:
            return plan.pack(bound, self._dtype, self._pinned)
        packed = pack_adapter(bound, self._sites, self._dtype, _HOST, self._base, pinned=self._pinned)
        if bound.layout is not None:
            self._plans[bound.layout] = _Plan.of(packed, self._sites)
        return packed


def _slices(slices: Sequence[SliceWeights], site: LinearSite) -> tuple[_Slice, ...]:
    names = {span: name for name, span in site.targets.items()}
    return tuple(
        _Slice(
            names[each.start, each.end],
            each.rank,
            each.a.shape[1],
            each.start,
            each.end,
            int(each.a.storage_offset()),
            int(each.b_t.storage_offset()),
        )
        for each in slices
    )
