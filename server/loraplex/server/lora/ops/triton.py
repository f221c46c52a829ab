"""The LoRA operator for GPUs: two Triton kernels a site, shrink and expand, over all segments of the step.

What an adapter needs to be found by the kernels lies on the device beside it: `PackedAdapter.table`, copied once. A
step adds a few records that say which tokens use which table (`triton_plan`): one small copy, and nothing is read back,
so that the host never waits for the device. What few adapters do beyond A, B, DoRA's factors and a bias on B is done by
torch around the kernels.

For steps that are captured once and replayed, `reserve` makes a plan of fixed size in memory that stays where it is,
and `refill` fills it with another step's records before the replay.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from triton import language as tl

from loraplex.server.lora.changes import SiteChanges
from loraplex.server.lora.ops import triton_kernel as kernel
from loraplex.server.lora.ops.interface import adapters_of, check_fit, largest_extents
from loraplex.server.lora.ops.site_changes import add_biases, change_output
from loraplex.server.lora.ops.triton_plan import (
    TILE_SHAPES,
    KindRecords,
    LoraLimits,
    Reserved,
    TableInfo,
    TileLimits,
    TileShape,
    cut,
    offsets,
    record_size,
    write_records,
)
from loraplex.server.lora.segments import Segment
from loraplex.server.lora.weights import PackedAdapter

# Numbers, of columns of y and of float32 of workspace: what the compiler is told for loads of 16 bytes.
_ALIGNMENT = 16
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
_NO_EXTENT = (0, 0)


@dataclass(frozen=True)
class _Resident:
    """An adapter's table on the device, int64, and what the records say of it."""

    table: torch.Tensor
    info: TableInfo
    aligned: bool


@dataclass
class LoraPlan:
    """One step's work for all sites. `records` stays where it is; the rest changes with `TritonLoraOps.refill`.

    `extents` is per site the (in_features, smallest out_features) that the adapters need, (0, 0) where there is nothing
    to do; `end` is the end of the last segment; `changes` are the segments whose adapters need more than the kernels;
    `kept` keeps adapters and their tables alive; where the plan is reserved, the slots do.
    """

    limits: LoraLimits
    records: torch.Tensor
    dtype: torch.dtype | None = None
    extents: tuple[tuple[int, int], ...] = ()
    end: int = 0
    changes: tuple[tuple[Segment, Mapping[int, SiteChanges]], ...] = ()
    kept: tuple[object, ...] = ()
    reserved_tokens: int | None = None

    @property
    def reserved(self) -> bool:
        """Whether it was made for captured steps."""
        return self.reserved_tokens is not None


class TritonLoraOps:
    """Implements `StaticLoraOps`; see there for semantics and shapes. The weights of one call are of one dtype.

    All on one stream: a plan, and the adapters in it, may be freed as soon as the last `add` was enqueued there.
    """

    def __init__(self, device: torch.device, reserved: Reserved | None = None) -> None:
        """Start without tables; kernels are compiled when they first meet their dtypes and sizes.

        Raises:
            ValueError: if there is no kernel for the dtype of `reserved`, which `reserve` is for.
        """
        self._device = device
        self._reserved = reserved or Reserved()
        _check_dtype(self._reserved.dtype)
        self._residents: dict[int, _Resident] = {}

    def prepare(self, segments: Sequence[Segment], slots: Mapping[int, PackedAdapter]) -> LoraPlan:
        """Enqueue the copy of the step's records, as large as this step needs.

        Raises:
            KeyError: if a segment names a slot that is not in `slots`.
            ValueError: if adapters differ in dtype, it is neither float32 nor bfloat16, or one does not hold for its
                segment's scale.
        """
        chosen = adapters_of(segments, slots)
        kinds, limits = self._lay_out(chosen)
        plan = LoraPlan(limits, torch.empty(record_size(limits.kinds), dtype=torch.int64, device=self._device))
        self._fill(plan, chosen, kinds)
        return plan

    def reserve(self, tokens: int, segments: int, sites: frozenset[int] | None = None) -> LoraPlan:
        """Return an empty plan of fixed size; see `StaticLoraOps`. For adapters as `Reserved` says."""
        limits = self._reserved.limits(tokens, segments, sites)
        records = torch.empty(record_size(limits.kinds), dtype=torch.int64, device=self._device)
        plan = LoraPlan(limits, records, self._reserved.dtype, reserved_tokens=tokens)
        self._copy(tuple(map(KindRecords, TILE_SHAPES)), plan)
        return plan

    def refill(self, prepared: Any, segments: Sequence[Segment], slots: Mapping[int, PackedAdapter]) -> bool:
        """Enqueue the copy of another step's records into a reserved plan; see `StaticLoraOps`."""
        plan: LoraPlan = prepared
        assert plan.reserved_tokens is not None, "made by reserve"
        chosen = adapters_of(segments, slots)
        if any(segment.end > plan.reserved_tokens for segment, _ in chosen):
            raise ValueError(f"segments {segments} do not fit in the {plan.reserved_tokens} tokens that were reserved")
        kinds, needed = self._lay_out(chosen)
        if not plan.limits.holds(needed) or _dtype_of(chosen) not in (None, plan.dtype):
            return False
        self._fill(plan, chosen, kinds)
        return True

    def add(self, y: torch.Tensor, x: torch.Tensor, site: int, prepared: Any) -> None:
        """Do every segment's part to `y` in place."""
        plan: LoraPlan = prepared
        if plan.limits.sites is not None and site not in plan.limits.sites:
            return
        in_features, out_features = plan.extents[site] if plan.extents else _NO_EXTENT
        check_fit(y, x, in_features or x.shape[1], out_features, plan.end)
        for name, tensor in (("x", x), ("y", y)):
            if tensor.dtype not in _DTYPES:
                raise ValueError(f"{name} is float32 or bfloat16, not {tensor.dtype}")
        for segment, changes in plan.changes:
            if site in changes:
                change_output(y, x, segment, changes[site])
        if plan.dtype is not None:
            self._launch(y, x, site, plan, plan.dtype)
        for segment, changes in plan.changes:
            if site in changes:
                add_biases(y, segment, changes[site])

    def _launch(self, y: torch.Tensor, x: torch.Tensor, site: int, plan: LoraPlan, dtype: torch.dtype) -> None:
        """Shrink and expand every kind of tile that the plan has room for."""
        limits = plan.limits
        for shape, kind, (tiles, units, end) in zip(TILE_SHAPES, limits.kinds, offsets(limits.kinds), strict=True):
            if kind.units:
                records = plan.records[tiles:units], plan.records[units:end]
                _launch_kind(y, x, site, *records, shape, kind, limits, _DTYPES[dtype], plan.reserved)

    def _lay_out(self, chosen: Sequence[tuple[Segment, PackedAdapter]]) -> tuple[tuple[KindRecords, ...], LoraLimits]:
        residents = [self._resident(adapter) for _, adapter in chosen]
        kinds = cut([(segment, resident.info) for (segment, _), resident in zip(chosen, residents, strict=True)])
        adapters = [adapter for _, adapter in chosen]
        limits = LoraLimits(
            kinds=tuple(kind.limits for kind in kinds),
            slices=max((resident.info.slices for resident in residents), default=0),
            sites=frozenset(np.flatnonzero(largest_extents(adapters)[:, 0]).tolist()) if adapters else frozenset(),
            aligned=all(resident.aligned for resident in residents),
            plain=not any(adapter.beyond_table for adapter in adapters),
        )
        _dtype_of(chosen)
        return kinds, limits

    def _fill(
        self, plan: LoraPlan, chosen: Sequence[tuple[Segment, PackedAdapter]], kinds: Sequence[KindRecords]
    ) -> None:
        adapters = [adapter for _, adapter in chosen]
        self._copy(kinds, plan)
        plan.dtype = plan.dtype if plan.reserved else _dtype_of(chosen)
        plan.extents = tuple(map(tuple, largest_extents(adapters).tolist())) if adapters else ()
        plan.end = max((segment.end for segment, _ in chosen), default=0)
        plan.changes = tuple((segment, adapter.beyond_table) for segment, adapter in chosen if adapter.beyond_table)
        # A replayed plan stays for good: what it kept would outlive the slots. They keep it until the step is launched,
        # and whatever takes its memory waits for that step.
        plan.kept = () if plan.reserved else (*adapters, *(self._resident(adapter).table for adapter in adapters))

    def _copy(self, kinds: Sequence[KindRecords], plan: LoraPlan) -> None:
        # Pinned memory anew in every step: torch gives a block out again only after the copy from it is done.
        host = torch.empty(plan.records.shape, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        write_records(kinds, plan.limits.kinds, host.numpy())
        plan.records.copy_(host, non_blocking=True)

    def _resident(self, adapter: PackedAdapter) -> _Resident:
        """Return an adapter's table on the device, which is copied there when the adapter is first met."""
        found = self._residents.get(id(adapter))
        if found is None:
            host = torch.from_numpy(adapter.table)
            if self._device.type == "cuda":
                host = host.pin_memory()
            table = host.to(self._device, non_blocking=True)
            columns = adapter.table[:, :, 3:5]
            found = _Resident(
                table,
                TableInfo(table.data_ptr(), table.shape[1], int(adapter.table[:, :, 2].max(initial=0))),
                aligned=not (columns % _ALIGNMENT).any(),
            )
            self._residents[id(adapter)] = found
            weakref.finalize(adapter, self._residents.pop, id(adapter), None)
        return found


def _launch_kind(
    y: torch.Tensor,
    x: torch.Tensor,
    site: int,
    tiles: torch.Tensor,
    units: torch.Tensor,
    shape: TileShape,
    kind: TileLimits,
    limits: LoraLimits,
    weights: Any,
    reserved: bool,
) -> None:
    """Launch both kernels for one kind of tile; the grid follows from the limits and the shapes of x and y alone."""
    in_features, out_features = x.shape[1], y.shape[1]
    splits, chunk = shape.splits(in_features)
    hidden_size = -(-kind.hidden // _ALIGNMENT) * _ALIGNMENT
    hidden = torch.empty(splits * hidden_size, dtype=torch.float32, device=x.device)
    shrink_warps, expand_warps = shape.warps
    # A reserved plan has room for the largest ranks: most of its units are empty, and one program a tile does.
    programs = kind.tiles if reserved else kind.units
    kernel.shrink_kernel[(programs, limits.slices, splits)](
        x,
        x.stride(0),
        tiles,
        units,
        hidden,
        hidden_size,
        site,
        in_features,
        CHUNK=chunk,
        BLOCK_T=shape.tokens,
        BLOCK_R=shape.ranks,
        BLOCK_K=shape.inner,
        WEIGHTS=weights,
        num_warps=shrink_warps,
        num_stages=shape.stages,
    )
    kernel.expand_kernel[(kind.tiles, -(-out_features // shape.columns))](
        y,
        y.stride(0),
        tiles,
        hidden,
        hidden_size,
        site,
        out_features,
        SPLITS=splits,
        BLOCK_T=shape.tokens,
        BLOCK_R=shape.ranks,
        BLOCK_N=shape.columns,
        WEIGHTS=weights,
        ALIGNED=limits.aligned,
        num_warps=expand_warps,
        num_stages=1,  # most adapters have one block of ranks: there is no loop to fill a pipeline
    )


def _dtype_of(chosen: Sequence[tuple[Segment, PackedAdapter]]) -> torch.dtype | None:
    """Return the dtype of the adapters' matrices, None where there are none.

    Raises:
        ValueError: if there are two, or it is not one that the kernels know.
    """
    dtypes = {adapter.dtype for _, adapter in chosen if adapter.rank}
    if len(dtypes) > 1:
        raise ValueError(f"the adapters of one call are of one dtype, not {dtypes}")
    for dtype in dtypes:
        _check_dtype(dtype)
        return dtype
    return None


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"LoRA weights are float32 or bfloat16, not {dtype}")
