"""An adapter's weights as the serving model's packed layers need them.

The model packs several Hugging Face modules into one matrix product (q, k, v; gate, up); a site is such a product, and
an adapter's modules are slices of its output. Knows nothing about slots or segments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from loraplex.server.lora.buffer import moved
from loraplex.server.lora.changes import EmbeddingChanges, ReplacedNorm, SiteChanges

TABLE_FIELDS = 7


@dataclass(frozen=True)
class LinearSite:
    """One packed matrix product of the model, named like "layers.3.qkv".

    `targets` maps each Hugging Face module path inside it to its (start, end) in the packed output.
    """

    name: str
    in_features: int
    out_features: int
    targets: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class SliceWeights:
    """One module's LoRA matrices inside a site; adds `(x a^T) b_t` to the site's output columns start:end.

    Shape: `a` (r, in_features) and `b_t` (r, end - start), both contiguous, so that the first product runs along rows
    of `a` and the second along rows of `b_t`. The adapter's scaling is folded into `b_t`.
    """

    a: torch.Tensor
    b_t: torch.Tensor
    start: int
    end: int

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter ready to be used: for each site of the model, in the model's order, the slices that it adds to.

    `changes` is what it does to sites beyond that, by the site's index; `norms` are those that take the place of the
    base's, by their place in the decoder. None of that, and no `embedding`, in plain LoRA.
    `memory` is one block that holds them, (nbytes,) uint8; `nbytes` its size; `rank` the largest rank among them (0 for
    an adapter without weights).

    `table` and `extents` say the same to code that reads the weights by address:
        table: (sites, max slices, 7) int64: address of a, address of b_t, rank, start, width, and the addresses of the
            slice's factors and of its bias on B, 0 where it has none; rank 0 is no slice.
        beyond_table: what remains of `changes` where the table is used.
        extents: (sites, 2) int64: in_features and the largest end; zeros where the site is untouched.
    """

    digest: str
    sites: tuple[tuple[SliceWeights, ...], ...]
    nbytes: int
    rank: int
    memory: torch.Tensor | None = field(default=None, repr=False, compare=False)
    changes: Mapping[int, SiteChanges] = field(default_factory=dict)
    embedding: EmbeddingChanges | None = None
    norms: Mapping[str, ReplacedNorm] = field(default_factory=dict)
    table: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)
    beyond_table: Mapping[int, SiteChanges] = field(init=False, repr=False, compare=False)
    extents: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Derive `table` and `extents` from `sites` and `changes`."""
        table = np.zeros((len(self.sites), max(map(len, self.sites), default=0), TABLE_FIELDS), dtype=np.int64)
        extents = np.zeros((len(self.sites), 2), dtype=np.int64)
        for index, slices in enumerate(self.sites):
            for position, s in enumerate(slices):
                row = (s.a.data_ptr(), s.b_t.data_ptr(), s.rank, s.start, s.end - s.start)
                table[index, position] = (*row, *self._vectors_at(index, s.start))
                extents[index] = (s.a.shape[1], max(extents[index, 1], s.end))
        for index, site in self.changes.items():
            extents[index] = (site.in_features, site.out_features)
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "extents", extents)
        rest = {index: site.beyond_slices for index, site in self.changes.items()}
        beyond = {index: site for index, site in rest.items() if site is not None}
        object.__setattr__(self, "beyond_table", beyond)

    def _vectors_at(self, site: int, start: int) -> tuple[int, int]:
        changes = self.changes.get(site)
        vectors = (None, None) if changes is None else (changes.factors, changes.scaled_bias)
        factors, bias = (0 if v is None else v.data_ptr() + v.itemsize * start for v in vectors)
        return factors, bias

    @property
    def holds_one_scale(self) -> bool:
        """Whether its factors hold for scale 1 only (DoRA)."""
        return any(site.factors is not None for site in self.changes.values())

    @property
    def dtype(self) -> torch.dtype:
        """Of all matrices; float32 for an adapter without any."""
        return next((s.a.dtype for slices in self.sites for s in slices), torch.float32)

    def to(self, device: torch.device) -> PackedAdapter:
        """Return the adapter with its memory on `device`: itself if it is there already.

        From pinned memory the copy takes its turn in the device's work, and nobody waits for it.
        """
        memory = self.memory if self.memory is None else self.memory.to(device, non_blocking=True)
        if memory is None or memory is self.memory:
            return self
        sites = tuple(
            tuple(replace(s, a=moved(s.a, memory), b_t=moved(s.b_t, memory)) for s in slices) for slices in self.sites
        )
        return replace(
            self,
            sites=sites,
            memory=memory,
            changes={index: site.moved(memory) for index, site in self.changes.items()},
            embedding=None if self.embedding is None else self.embedding.moved(memory),
            norms={place: norm.moved(memory) for place, norm in self.norms.items()},
        )
