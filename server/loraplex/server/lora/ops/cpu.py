"""The LoRA operator for CPUs: a compiled kernel for short segments, torch's matrix products for long ones."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.server.lora.ops import cpu_kernel as kernel
from loraplex.server.lora.ops.reference import add_segment
from loraplex.server.lora.segments import Segment
from loraplex.server.lora.weights import PackedAdapter
from loraplex.server.native.team import Kernel

# Tokens of a segment up to which the kernel is used, by dtype of the weights: torch would first widen bfloat16.
MAX_KERNEL_TOKENS = {torch.float32: 16, torch.bfloat16: 32}

_CALL = struct.Struct(f"{kernel.CALL_FIELDS}q{kernel.COUNTER_BYTES}x")
_NOTHING = (0, 0)


@dataclass(frozen=True)
class _Prepared:
    """One step's segments. `kept` owns the memory that `arguments` points into, adapters included.

    `extents` is per site the (in_features, smallest out_features) that the adapters need, (0, 0) where there is nothing
    to do; `end` is the end of the last segment; `run` is None where no segment is short.
    """

    run: Kernel | None
    arguments: memoryview
    address: int
    threads: int
    kept: tuple[Any, ...]
    long: tuple[tuple[Segment, PackedAdapter], ...]
    extents: tuple[tuple[int, int], ...]
    end: int


class CpuLoraOps:
    """Implements `LoraOps`; see there for semantics and shapes. The weights of one call are of one dtype.

    Stateless, hence thread-safe; but what `prepare` returns serves one thread at a time.
    """

    def prepare(self, segments: Sequence[Segment], slots: Mapping[int, PackedAdapter]) -> _Prepared:
        """Divide the segments between kernel and torch and lay out what the kernel reads.

        Raises:
            KeyError: if a segment names a slot that is not in `slots`.
            ValueError: if adapters differ in dtype, or it is neither float32 nor bfloat16.
        """
        chosen = [(segment, slots[segment.slot]) for segment in segments if segment.end > segment.start]
        adapters = tuple({id(adapter): adapter for _, adapter in chosen}.values())
        dtypes = {adapter.dtype for adapter in adapters if adapter.rank}
        if len(dtypes) > 1:
            raise ValueError(f"the adapters of one call are of one dtype, not {dtypes}")
        limit = MAX_KERNEL_TOKENS.get(dtype := next(iter(dtypes), torch.float32), 0)
        short = [(segment, adapter) for segment, adapter in chosen if segment.end - segment.start <= limit]
        # The most work first, so that no thread begins it when the others are done.
        short.sort(key=lambda entry: (entry[0].start - entry[0].end) * entry[1].rank)
        threads = torch.get_num_threads()
        arguments, kept = _lay_out(short, threads)
        return _Prepared(
            run=kernel.lora_add_kernel(dtype) if short else None,
            arguments=arguments.data,
            address=arguments.ctypes.data,
            threads=threads,
            kept=(kept, adapters),
            long=tuple(entry for entry in chosen if entry[0].end - entry[0].start > limit),
            extents=_extents(adapters),
            end=max((segment.end for segment in segments), default=0),
        )

    def add(self, y: torch.Tensor, x: torch.Tensor, site: int, prepared: Any) -> None:
        """Add every segment's part to `y` in place."""
        step: _Prepared = prepared
        in_features, out_features = step.extents[site] if step.extents else _NOTHING
        if not in_features:
            return
        _check(y, x, in_features, out_features, step.end)
        if x.dtype is not torch.float32:
            x = x.float()
        if step.run is not None:
            is_bf16 = y.dtype is torch.bfloat16
            _CALL.pack_into(
                step.arguments, 0, y.data_ptr(), y.stride(0), is_bf16, x.data_ptr(), x.stride(0), in_features, site
            )
            step.run(step.address, step.threads)
        for segment, adapter in step.long:
            add_segment(y, x, segment, adapter, site)


def warm_up(weights: torch.dtype) -> None:
    """Compile the kernel for weights of this dtype, or load it from disk; thread-safe.

    Raises:
        ValueError: if the dtype is neither float32 nor bfloat16.
    """
    kernel.lora_add_kernel(weights)


def _lay_out(
    short: Sequence[tuple[Segment, PackedAdapter]], threads: int
) -> tuple[npt.NDArray[np.int64], tuple[npt.NDArray[Any], ...]]:
    """Return the kernel's argument block, and the arrays that it points into."""
    rows, hidden_floats = [], 0
    for segment, adapter in short:
        tokens, slices = segment.end - segment.start, adapter.table.shape[1]
        stride = tokens * adapter.rank
        rows.append((segment.start, tokens, adapter.table.ctypes.data, slices, hidden_floats, stride))
        hidden_floats += slices * stride
    table = np.array(rows, dtype=np.int64).reshape(-1, kernel.SEGMENT_FIELDS)
    scales = np.array([segment.scale for segment, _ in short], dtype=np.float32)
    hidden = np.empty(hidden_floats, dtype=np.float32)
    sums = np.empty((threads, kernel.SUMS_PER_THREAD), dtype=np.float32)
    # Whole segments where there are enough of them: one long walk through an adapter's memory.
    parts = 0 if threads == 1 or len(short) >= 2 * threads else 2 * threads
    arguments = np.zeros(kernel.NUM_ARGUMENTS, dtype=np.int64)
    arguments[kernel.STEP_FIELDS :] = (
        *(table.ctypes.data, scales.ctypes.data, len(short), max((row[3] for row in rows), default=0), parts),
        *(hidden.ctypes.data, sums.ctypes.data),
    )
    return arguments, (table, scales, hidden, sums)


def _extents(adapters: Sequence[PackedAdapter]) -> tuple[tuple[int, int], ...]:
    """Return per site the largest (in_features, end) of any adapter."""
    if not adapters:
        return ()
    return tuple(map(tuple, np.maximum.reduce([adapter.extents for adapter in adapters]).tolist()))


def _check(y: torch.Tensor, x: torch.Tensor, in_features: int, out_features: int, end: int) -> None:
    """Refuse what the kernel would read or write wrongly.

    Raises:
        ValueError: saying what does not fit.
    """
    tokens, width = y.shape
    if x.shape != (tokens, in_features) or width < out_features or tokens < end:
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit segments up to {end} of adapters from {in_features} "
            f"to {out_features} features"
        )
    if x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(f"the features of x and y must be contiguous, not strided by {x.stride(1)} and {y.stride(1)}")
    if y.dtype is not torch.float32 and y.dtype is not torch.bfloat16:
        raise ValueError(f"y is float32 or bfloat16, not {y.dtype}")
