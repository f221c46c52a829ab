"""8-bit weights as bitsandbytes stores them (LLM.int8()): codes from -127 to 127, one scale for each output.

The weights stand for codes * scale / 127, and the product is defined with these values and unquantized activations.
Where activations are quantized too, each row goes by its own largest value. One step of 8 bits for a whole row loses
what lies beside an outlier (SmolLM2: a mean KL of 0.08 nats), so CPUs with VNNI get a second 8 bits for what the first
ones leave over: 20 % slower at 16 rows, and 3e-6 nats. GPUs do with one. LLM.int8()'s outlier columns are left out (its
threshold is 0): which columns count as outliers would depend on all rows of a batch, so that a request's neighbours
would change its result.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from loraplex.adapters.bnb import import_bitsandbytes
from loraplex.server.errors import ModelLoadError
from loraplex.server.models.quantized_linear import QuantizedLinear

_log = logging.getLogger(__name__)

_CHUNK_WEIGHTS = 1 << 18  # quantized at a time: 1 MiB in float32, so that it stays in a cache
SMALLEST_SCALE = 1e-30
"""Zeros are divided by this; by anything much smaller they would become 0 * inf."""
_INVERSE_127 = 7.874015718698502e-3  # the constant of bitsandbytes' int8_vectorwise_dequant
_FLOAT16_MAX = 65504.0
# A result in bfloat16 is off by 0.2 %; beyond this something else is wrong.
_TOLERANCE = 0.01
_FINER = 254  # steps of the second 8 bits in one of the first, which is off by half a step at most


@dataclass(frozen=True)
class Int8Matrix:
    """A weight matrix (out, in).

    Attributes:
        codes: (out, in) int8.
        scale: (out,) float32, the largest absolute value of each row; bitsandbytes calls it SCB.
    """

    codes: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> Int8Matrix:
        """Quantize `weight` (out, in) where it lies, to what `bitsandbytes.nn.Linear8bitLt` makes of it.

        Raises:
            ModelLoadError: if a weight is beyond the range of float16, through which bitsandbytes takes all weights.
        """
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
        step = max(1, _CHUNK_WEIGHTS // weight.shape[1])
        for first in range(0, weight.shape[0], step):
            rows = weight[first : first + step].to(torch.float16).float()
            largest = torch.amax(rows.abs(), dim=1)
            # A row of zeros keeps codes of zero instead of 0 / 0.
            factor = 127.0 / largest.clamp(min=SMALLEST_SCALE)
            codes[first : first + step] = rows.mul_(factor.unsqueeze(1)).round_()
            scale[first : first + step] = largest
        if not bool(torch.isfinite(scale).all()):
            raise ModelLoadError("int8 quantization takes weights through float16; some are beyond its range")
        return cls(codes, scale)

    @classmethod
    def from_checkpoint(cls, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Int8Matrix:
        """Take the tensors of one quantized module: "weight", "SCB" and perhaps "weight_format".

        Raises:
            ModelLoadError: if they are not what bitsandbytes writes today.
        """
        codes, scale, layout = tensors.get("weight"), tensors["SCB"], tensors.get("weight_format")
        if codes is None or codes.dtype != torch.int8 or scale.shape != codes.shape[:1]:
            raise ModelLoadError("damaged int8 weight: not one scale for each row of 8-bit codes")
        if layout is not None and int(layout) != 0:
            raise ModelLoadError("the int8 weight lies in a GPU's own layout; only the row-wise one is supported")
        return cls(codes.to(device).contiguous(), scale.to(device, torch.float32))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory that it takes, in bytes."""
        return self.codes.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the values that it stands for, (out, in), rounded to `dtype`; exact in float32."""
        return self.codes.float().mul_(self.scale.unsqueeze(1)).mul_(_INVERSE_127).to(dtype)


def is_int8(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a module's tensors in a checkpoint are 8-bit weights of bitsandbytes."""
    return "SCB" in tensors


def join(matrices: Sequence[Int8Matrix]) -> Int8Matrix:
    """Return one matrix with the rows of all."""
    if len(matrices) == 1:
        return matrices[0]
    return Int8Matrix(torch.cat([m.codes for m in matrices]), torch.cat([m.scale for m in matrices]))


class DynamicInt8Linear(QuantizedLinear):
    """Quantizes each row of the activations by its own largest value and multiplies integers; see the module."""

    def __init__(self, matrix: Int8Matrix) -> None:
        """Take a matrix on a GPU, or on a CPU with VNNI."""
        super().__init__(matrix)
        self._int8 = matrix
        self._product = _gpu_product if matrix.codes.is_cuda else _cpu_product

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T; see `Linear`."""
        rows = x.reshape(-1, self.in_features)
        if len(rows) == 0:
            return x.new_empty(*x.shape[:-1], self.out_features)
        return self._product(rows, self._int8).view(*x.shape[:-1], self.out_features)


def _gpu_product(x: torch.Tensor, matrix: Int8Matrix) -> torch.Tensor:
    import_bitsandbytes()
    ops = torch.ops.bitsandbytes
    # bitsandbytes quantizes float16 only; bfloat16 and float32 reach further.
    half = x if x.dtype == torch.float16 else x.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).to(torch.float16)
    codes, largest, _ = ops.int8_vectorwise_quant.default(half, 0.0)
    y: torch.Tensor = ops.int8_scaled_mm.default(codes, matrix.codes, largest, matrix.scale, dtype=x.dtype)
    return y


def _cpu_product(x: torch.Tensor, matrix: Int8Matrix) -> torch.Tensor:
    rows, count = x.float(), len(x)
    largest = torch.amax(rows.abs(), dim=1, keepdim=True).clamp_(min=SMALLEST_SCALE)
    steps = rows * (127.0 / largest)
    coarse = steps.round()
    fine = steps.sub_(coarse).mul_(_FINER).round_()
    # In one product, which reads the weights once.
    sums = torch._int_mm(torch.cat([coarse, fine]).to(torch.int8), matrix.codes.t()).float()
    total = sums[:count].add_(sums[count:], alpha=1 / _FINER)
    return total.mul_(largest * _INVERSE_127).mul_(matrix.scale * _INVERSE_127).to(x.dtype)


@functools.cache
def dynamic_int8_available() -> bool:
    """Whether this CPU multiplies 8-bit integers fast, and rightly (tried once a process)."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.cpu._is_vnni_supported():
        return False
    return dynamic_agrees_with_dequantized()


def dynamic_agrees_with_dequantized() -> bool:
    """Try the integer product on one small random matrix; log a warning where it errs."""
    generator = torch.Generator().manual_seed(0)
    matrix = Int8Matrix.quantize(torch.randn(96, 192, generator=generator))
    x = torch.randn(7, 192, generator=generator).to(torch.bfloat16)
    expected = x.float() @ matrix.dequantize().t()
    try:
        error = float((DynamicInt8Linear(matrix)(x).float() - expected).norm() / expected.norm())
    except (RuntimeError, NotImplementedError) as failure:
        _log.warning("the 8-bit integer product failed (%s): weights are dequantized instead", failure)
        return False
    if not math.isfinite(error) or error > _TOLERANCE:
        _log.warning("the 8-bit integer product is off by %.1f %% here: weights are dequantized instead", 100 * error)
        return False
    return True
