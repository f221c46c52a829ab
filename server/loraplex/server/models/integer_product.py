"""Matrix products of 16-bit integers on CPUs with AVX512-VNNI: weights in panels, activations rounded for each call.

Each block of a row's inputs is rounded to as many steps as sums of its products have room for in 32 bits, between 8,000
and 32,000 for the kinds of weights here: what bfloat16 or 8-bit activations would lose is kept.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Mapping

import torch

from loraplex.server.models.panels import INPUTS, OUTPUTS
from loraplex.server.native.shares import MOST_SHARES
from loraplex.server.native.workspace import empty, team_size

_FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")
_LARGEST_INT16, _LARGEST_INT32 = 2**15 - 1, 2**31 - 1
# Products for fewer weights than this are done before a second thread is awake.
_PARALLEL_WORK = 1 << 16
_TILE_ROWS = 16
# Units that each thread should find where there is more than one tile, so that none waits long for the others.
_UNITS_PER_THREAD = 4

_FIELDS = struct.Struct("12qd8q")


class IntegerProduct:
    """Multiplies with one matrix.

    Semantics: y[t, n] = sum over k of x[t, k] * w[n, k] * scales[n, k // block] * unit, where w are the stored integers
    or, for 4-bit codes, those that `table` has for them. No row of y depends on another row of x, not in one bit.
    Several threads may use one object.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        shape: tuple[int, int],
        block: int,
        unit: float,
        largest: int,
        table: torch.Tensor | None = None,
    ) -> None:
        """Take packed weights, which are not copied.

        Args:
            codes: what `panels.pack` (int8, int16) or `panels.pack_four_bit` (uint8) returned.
            scales: what `panels.pack_scales` returned for scales (out, blocks), or for (out, 1): one for all blocks.
            shape: (out, in).
            block: inputs that share a scale; a multiple of 16.
            unit: what 1 times a scale of 1 stands for.
            largest: the largest absolute value of the integers.
            table: (16,) int16, the integers of 4-bit codes.
        """
        # Imported here: a GPU needs no Numba.
        from loraplex.server.models import integer_kernel as kernel

        assert block % INPUTS == 0, "blocks are made of whole registers"
        out_features, in_features = shape
        steps = min(_LARGEST_INT16, _LARGEST_INT32 // (largest * min(block, -(-in_features // INPUTS) * INPUTS)))
        self.codes, self.scales = codes, scales
        self._shape, self._blocks = shape, -(-in_features // block)
        self._row_bytes = -(-in_features // INPUTS) * INPUTS * 2
        self._panels = len(codes)
        self._table = None if table is None else table.to(torch.int16).repeat(2)
        self._scratch_bytes = kernel.WIDENED + self._row_bytes // 2 * kernel.WIDENED_BYTES
        scale_bytes = scales.itemsize * OUTPUTS
        self._constants = (
            *(in_features, out_features, block, steps, unit / steps, codes.data_ptr(), codes[0].nbytes),
            *(scales.data_ptr(), scales[0].nbytes, scale_bytes if scales.shape[1] > 1 else 0),
            *(0 if self._table is None else self._table.data_ptr(), self._scratch_bytes),
        )
        self._block = ctypes.c_int64 * kernel.NUM_ARGUMENTS
        self._kernel = kernel.integer_kernel(codes.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return y (T, out) float32 for x (T, in) float32, contiguous."""
        rows, (out_features, in_features) = x.shape[0], self._shape
        y = empty(rows, out_features, dtype=torch.float32)
        if rows == 0:
            return y
        threads = team_size(rows * out_features * in_features >= _PARALLEL_WORK)
        tiles = -(-rows // _TILE_ROWS)
        parts = min(tiles, -(-_UNITS_PER_THREAD * threads // self._panels))
        tiles_per_unit = -(-tiles // parts)
        x_bytes, x_scale_bytes = tiles * _TILE_ROWS * self._row_bytes, tiles * _TILE_ROWS * self._blocks * 4
        scratch = empty(x_bytes + x_scale_bytes + threads * self._scratch_bytes, dtype=torch.uint8)
        address, block = scratch.data_ptr(), self._block()
        _FIELDS.pack_into(
            block,
            0,
            *(x.data_ptr(), y.data_ptr(), rows, address, address + x_bytes, address + x_bytes + x_scale_bytes),
            *(self._panels * -(-tiles // tiles_per_unit), tiles_per_unit),
            *self._constants,
            min(threads, MOST_SHARES),
        )
        self._kernel(ctypes.addressof(block), threads)
        return y


@functools.cache
def integer_products_available() -> bool:
    """Whether this CPU has the instructions, and Numba compiles for this CPU."""
    if any(name in os.environ for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_DISABLE_JIT")):
        return False
    import llvmlite.binding

    try:
        found: Mapping[str, bool] = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:  # not every system tells
        return False
    return all(found.get(feature, False) for feature in _FEATURES)
