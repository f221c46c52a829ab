"""An adapter's weights as the serving model's packed layers need them.

The model packs several Hugging Face modules into one matrix product (q, k, v; gate, up); a site is such a product, and
an adapter's modules are slices of its output. Knows nothing about slots or segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from loraplex.adapters.binding import BoundAdapter, ModuleWeights

ALIGNMENT_BYTES = 64
TABLE_FIELDS = 5


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
    """An adapter ready to be used: for each site of the model, in the model's order, the slices that it changes.

    `nbytes` is the memory that holds them, `rank` the largest rank among them (0 for an adapter without weights).

    `table` and `extents` say the same to code that reads the weights by address:
        table: (sites, max slices, 5) int64: address of a, address of b_t, rank, start, width; rank 0 is no slice.
        extents: (sites, 2) int64: in_features and the largest end; zeros where the site is untouched.
    """

    digest: str
    sites: tuple[tuple[SliceWeights, ...], ...]
    nbytes: int
    rank: int
    table: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)
    extents: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Derive `table` and `extents` from `sites`."""
        table = np.zeros((len(self.sites), max(map(len, self.sites), default=0), TABLE_FIELDS), dtype=np.int64)
        extents = np.zeros((len(self.sites), 2), dtype=np.int64)
        for index, slices in enumerate(self.sites):
            for position, s in enumerate(slices):
                table[index, position] = (s.a.data_ptr(), s.b_t.data_ptr(), s.rank, s.start, s.end - s.start)
                extents[index] = (s.a.shape[1], max(extents[index, 1], s.end))
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "extents", extents)

    @property
    def dtype(self) -> torch.dtype:
        """Of all matrices; float32 for an adapter without any."""
        return next((s.a.dtype for slices in self.sites for s in slices), torch.float32)


def pack_adapter(
    bound: BoundAdapter, sites: Sequence[LinearSite], dtype: torch.dtype, device: torch.device
) -> PackedAdapter:
    """Copy `bound` into one buffer of `dtype` on `device`, arranged by site, scaling folded into B.

    The fold happens in float32, before the one rounding to `dtype`. All slices are views of the buffer.

    Raises:
        ValueError: if a module of the adapter belongs to no site (it would silently have no effect), or if its
            shapes do not fit the site.
    """
    placed = _place(bound, sites)
    flat = torch.zeros(_total_elements(placed, dtype), dtype=dtype, device=device)
    offset = 0
    packed: list[tuple[SliceWeights, ...]] = []
    for modules in placed:
        slices = []
        for weights, start, end in modules:
            a = flat[offset : offset + weights.a.numel()].view(weights.a.shape)
            offset += _aligned(weights.a.numel(), dtype)
            b_t = flat[offset : offset + weights.b.numel()].view(weights.b.shape[1], weights.b.shape[0])
            offset += _aligned(weights.b.numel(), dtype)
            a.copy_(weights.a.to(torch.float32))
            b_t.copy_((weights.b.to(torch.float32) * weights.scaling).T)
            slices.append(SliceWeights(a, b_t, start, end))
        packed.append(tuple(slices))
    rank = max((weights.rank for weights in bound.modules.values()), default=0)
    return PackedAdapter(bound.digest, tuple(packed), flat.nbytes, rank)


def packed_nbytes(bound: BoundAdapter, sites: Sequence[LinearSite], dtype: torch.dtype) -> int:
    """Return the `nbytes` that `pack_adapter` would need, without copying anything.

    Raises:
        ValueError: as `pack_adapter` does.
    """
    return _total_elements(_place(bound, sites), dtype) * dtype.itemsize


def _place(bound: BoundAdapter, sites: Sequence[LinearSite]) -> list[list[tuple[ModuleWeights, int, int]]]:
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


def _total_elements(placed: Sequence[Sequence[tuple[ModuleWeights, int, int]]], dtype: torch.dtype) -> int:
    return sum(_aligned(w.a.numel(), dtype) + _aligned(w.b.numel(), dtype) for site in placed for w, _, _ in site)


def _aligned(elements: int, dtype: torch.dtype) -> int:
    """Round up so that every matrix starts on a cache line."""
    unit = ALIGNMENT_BYTES // dtype.itemsize
    return -(-elements // unit) * unit
