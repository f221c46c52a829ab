"""The LoRA operator for CPUs: a compiled kernel for short segments, torch's matrix products for long ones.

Of what few adapters do beside A and B (`SiteChanges`) the kernel does what belongs to a slice, DoRA's factors and the
bias on B; the rest is left to torch. A step without such adapters asks once a site.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.server.lora.changes import SiteChanges
from loraplex.server.lora.ops import cpu_kernel as kernel
from loraplex.server.lora.ops.interface import adapters_of, check_fit, largest_extents
from loraplex.server.lora.ops.site_changes import add_biases, change_output
from loraplex.server.lora.segments import Segment
from loraplex.server.lora.weights import PackedAdapter, SliceWeights
from loraplex.server.native.low_rank import STEP, TOKENS
from loraplex.server.native.program import StepArguments
from loraplex.server.native.team import Kernel

# Tokens times rank of a segment up to which the kernel does the work: nearly any decode step, for recorded ones cannot
# call torch. Measured over 30 layers, one thread: rank 64 with 64 tokens 30 ms against 34 by torch's matrix products,
# rank 256 with 256 tokens 434 against 414.
MAX_KERNEL_WORK = 65536
# The same sum over all segments from which on a second thread pays for being called.
MIN_PARALLEL_WORK = 24
# Tokens of a segment that are worth reading its weights for once more, in another thread.
MIN_TOKENS_APART = 8

_CALL = struct.Struct(f"{kernel.CALL_FIELDS}q{kernel.COUNTER_BYTES}x")
_NOTHING = (0, 0)

# By site, the segments in which adapters change it, and how.
SiteRanges = tuple[tuple[tuple[Segment, SiteChanges], ...], ...]


@dataclass(frozen=True)
class _Prepared:
    """One step's segments. `kept` owns the memory that `arguments` points into, adapters included.

    `extents` is per site the (in_features, smallest out_features) that the adapters need, (0, 0) where there is nothing
    to do; `end` is the end of the last segment; `run` is None where no segment is short. `changes` is by site, and ends
    with the last site that has any.
    """

    run: Kernel | None
    arguments: npt.NDArray[np.int64]
    address: int
    threads: int
    kept: tuple[Any, ...]
    long: tuple[tuple[Segment, PackedAdapter], ...]
    extents: tuple[tuple[int, int], ...]
    end: int
    changes: SiteRanges


class CpuLoraOps:
    """Implements `LoraOps`; see there for semantics and shapes. The weights of one call are of one dtype.

    Stateless, hence thread-safe; but what `prepare` returns serves one thread at a time.
    """

    def prepare(self, segments: Sequence[Segment], slots: Mapping[int, PackedAdapter]) -> _Prepared:
        """Divide the segments between kernel and torch and lay out what the kernel reads.

        Raises:
            KeyError: if a segment names a slot that is not in `slots`.
            ValueError: if adapters differ in dtype, it is neither float32 nor bfloat16, or one does not hold for its
                segment's scale.
        """
        chosen = adapters_of(segments, slots)
        adapters = tuple({id(adapter): adapter for _, adapter in chosen}.values())
        dtypes = {adapter.dtype for adapter in adapters if adapter.rank}
        if len(dtypes) > 1:
            raise ValueError(f"the adapters of one call are of one dtype, not {dtypes}")
        low_rank = [entry for entry in chosen if entry[1].rank]
        short = [entry for entry in low_rank if _is_short(*entry)]
        threads = torch.get_num_threads()
        if sum((segment.end - segment.start) * adapter.rank for segment, adapter in short) < MIN_PARALLEL_WORK:
            threads = 1
        arguments, kept = _lay_out(_divide(short, threads), threads)
        return _Prepared(
            run=kernel.lora_add_kernel(next(iter(dtypes), torch.float32)) if short else None,
            arguments=arguments,
            address=arguments.ctypes.data,
            threads=threads,
            kept=(kept, adapters),
            long=tuple(entry for entry in low_rank if not _is_short(*entry)),
            extents=tuple(map(tuple, largest_extents(adapters).tolist())) if adapters else (),
            end=max((segment.end for segment in segments), default=0),
            changes=_changes(chosen),
        )

    def add(self, y: torch.Tensor, x: torch.Tensor, site: int, prepared: Any) -> None:
        """Do every segment's part to `y` in place."""
        step: _Prepared = prepared
        in_features, out_features = step.extents[site] if step.extents else _NOTHING
        if not in_features:
            return
        check_fit(y, x, in_features, out_features, step.end)
        if y.dtype is not torch.float32 and y.dtype is not torch.bfloat16:
            raise ValueError(f"y is float32 or bfloat16, not {y.dtype}")
        changes = step.changes[site] if site < len(step.changes) else ()
        for segment, change in changes:
            change_output(y, x, segment, change)
        if x.dtype is not torch.float32:
            x = x.float()
        if step.run is not None:
            is_bf16 = y.dtype is torch.bfloat16
            _CALL.pack_into(
                step.arguments.data, 0, y.data_ptr(), y.stride(0), is_bf16, x.data_ptr(), x.stride(0), in_features, site
            )
            step.run(step.address, step.threads)
        for segment, adapter in step.long:
            _add_long(y, x, segment, adapter.sites[site])
        for segment, change in changes:
            add_biases(y, segment, change)

    def step_arguments(self, prepared: Any) -> StepArguments | None:
        """Return what recorded calls of `add` need to do this step's work; None if a kernel alone cannot do it."""
        step: _Prepared = prepared
        if step.run is None or step.long or step.changes:
            return None
        return StepArguments(step.run, kernel.STEP_FIELDS, step.arguments[kernel.STEP_FIELDS :], step)

    def touched(self, prepared: Any) -> Hashable:
        """Return what tells whether two steps call the same kernel at the same sites."""
        step: _Prepared = prepared
        return step.run, tuple(in_features for in_features, _ in step.extents)


def warm_up(weights: torch.dtype) -> None:
    """Compile the kernel for weights of this dtype, or load it from disk; thread-safe.

    Raises:
        ValueError: if the dtype is neither float32 nor bfloat16.
    """
    kernel.lora_add_kernel(weights)


def _is_short(segment: Segment, adapter: PackedAdapter) -> bool:
    tokens = segment.end - segment.start
    return tokens * adapter.rank <= MAX_KERNEL_WORK


def _add_long(y: torch.Tensor, x: torch.Tensor, segment: Segment, slices: Sequence[SliceWeights]) -> None:
    """Add one segment's part to `y` in place by matrix products in float32; `x` is float32."""
    tokens = slice(segment.start, segment.end)
    for part in slices:
        hidden = x[tokens] @ part.a.float().T
        columns = y[tokens, part.start : part.end]
        if y.dtype is torch.float32:
            columns.addmm_(hidden, part.b_t.float(), alpha=segment.scale)
        else:
            columns.copy_(torch.addmm(columns.float(), hidden, part.b_t.float(), alpha=segment.scale))


def _divide(short: Sequence[tuple[Segment, PackedAdapter]], threads: int) -> list[tuple[Segment, PackedAdapter]]:
    """Cut segments into units of the kernel, and smaller if there are too few of them for the threads."""
    tokens = sum(segment.end - segment.start for segment, _ in short)
    most = kernel.MAX_TOKENS
    if len(short) < threads:
        most = min(most, max(MIN_TOKENS_APART, -(-tokens // (TOKENS * threads)) * TOKENS))
    divided = [
        (replace(segment, start=start, end=min(segment.end, start + most)), adapter)
        for segment, adapter in short
        for start in range(segment.start, segment.end, most)
    ]
    # The most work first, so that no thread begins it when the others are done.
    divided.sort(key=lambda entry: (entry[0].start - entry[0].end) * entry[1].rank)
    return divided


def _lay_out(
    short: Sequence[tuple[Segment, PackedAdapter]], threads: int
) -> tuple[npt.NDArray[np.int64], tuple[npt.NDArray[Any], ...]]:
    """Return the kernel's argument block, and the arrays that it points into."""
    rows = [(s.start, s.end - s.start, a.table.ctypes.data, a.table.shape[1]) for s, a in short]
    table = np.array(rows, dtype=np.int64).reshape(-1, kernel.SEGMENT_FIELDS)
    scales = np.array([segment.scale for segment, _ in short], dtype=np.float32)
    floats = max(((s.end - s.start) * _token_floats(a) for s, a in short), default=0)
    # For all threads: a recorded step runs on all.
    scratch = np.empty((torch.get_num_threads(), kernel.SUMS + floats), dtype=np.float32)
    slices = max((row[3] for row in rows), default=1)
    # Whole segments where there are enough of them: one long walk through an adapter's memory.
    units, slices_per_unit = (1, slices) if threads == 1 or len(short) >= 2 * threads else (slices, 1)
    arguments = np.zeros(kernel.NUM_ARGUMENTS, dtype=np.int64)
    arguments[kernel.STEP_FIELDS :] = (
        *(table.ctypes.data, scales.ctypes.data, len(short), units, slices_per_unit),
        *(scratch.ctypes.data, scratch.strides[0]),
    )
    return arguments, (table, scales, scratch)


def _token_floats(adapter: PackedAdapter) -> int:
    """Return the scratch that the kernel needs for one token."""
    most_inputs = int(adapter.extents[:, 0].max(initial=0))
    return -(-most_inputs // STEP) * STEP + adapter.rank


def _changes(chosen: Sequence[tuple[Segment, PackedAdapter]]) -> SiteRanges:
    """Return per site the segments in which torch has something to do, and what: not what the kernel does itself."""
    ranges = []
    for segment, adapter in chosen:
        changes = adapter.beyond_table if _is_short(segment, adapter) else adapter.changes
        if changes:
            ranges.append((segment, changes))
    if not ranges:
        return ()
    sites = range(1 + max(max(changes) for _, changes in ranges))
    return tuple(tuple((segment, changes[site]) for segment, changes in ranges if site in changes) for site in sites)
