"""The layers' weight matrices, quantized or not: from tensors to `Linear`.

bitsandbytes defines what quantized weights stand for, and it is imported only where there are some.

| quantization | CPU, float32            | CPU, bfloat16                   | GPU                               |
|--------------|-------------------------|---------------------------------|-----------------------------------|
| none         | oneDNN's blocked layout | torch                           | torch                             |
| nf4, fp4     | exact: dequantized      | panels, fused kernel, or exact  | bitsandbytes' kernels, and ours   |
| int8         | exact: dequantized      | panels, 2 x 8 bits, or exact    | 8-bit activations; float32: exact |

"Panels" are the products of 16-bit integers of `panel_linear`, on CPUs with AVX512-VNNI; "fused kernel" and "2 x 8
bits" are what is left where those fail their check. lm_head has no quantization, but beside panels it is rounded to 13
bits; see `make_head`. On a GPU our own kernel is for a busy server's decode steps; see `triton_four_bit`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from loraplex.server.errors import ModelLoadError
from loraplex.server.models import four_bit, int8
from loraplex.server.models.compute_dtype import activation_dtype
from loraplex.server.models.four_bit import FourBitMatrix
from loraplex.server.models.four_bit_fused import FusedFourBitLinear, fits, fused_available
from loraplex.server.models.four_bit_gpu import GpuFourBitLinear
from loraplex.server.models.int8 import DynamicInt8Linear, Int8Matrix
from loraplex.server.models.linear import Linear, StackedLinear, dense_linear, product_dtype
from loraplex.server.models.panel_linear import (
    FourBitPanelLinear,
    Int8PanelLinear,
    RoundedPanelLinear,
    fits_panels,
    panels_available,
)
from loraplex.server.models.quantized_linear import DequantizedLinear, OnTheFlyLinear, QuantizedMatrix
from loraplex.server.models.weight_execution import QUANTIZATIONS, choose_weight_execution, has_kernel

__all__ = [
    "QUANTIZATIONS",
    "Linear",
    "choose_weight_execution",
    "from_prequantized",
    "make_head",
    "make_linear",
]


def make_linear(
    weights: Sequence[torch.Tensor],
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    weight_execution: str = "auto",
) -> Linear:
    """Return one product for the `weights` of several projections of the same input, their outputs side by side.

    Each projection is quantized by itself, as bitsandbytes would quantize its module, and then joined to the others.
    A single unquantized weight that already has `dtype` on `device` and fills its memory is used without a copy.

    Args:
        weights: (out_i, in) each, in any float dtype.
        quantization: "none", "nf4", "fp4" or "int8".
        dtype: of activations; also of unquantized weights.
        device: where the product runs.
        weight_execution: see `choose_weight_execution`. "auto" decides for these weights alone; whoever makes many
            products decides once for all of them.

    Raises:
        ModelLoadError: for an unknown quantization or execution, or weights that cannot be quantized so.
    """
    size = sum(weight.numel() for weight in weights)
    execution = choose_weight_execution(weight_execution, quantization, dtype, device, size)
    if quantization == "none":
        return dense_linear(_stacked(weights, dtype, device))
    moved = (weight.to(device) for weight in weights)
    if quantization == "int8":
        return _int8_linear([Int8Matrix.quantize(weight) for weight in moved], dtype, execution)
    return _four_bit_linear([FourBitMatrix.quantize(weight, quantization) for weight in moved], dtype, execution)


def make_head(
    weight: torch.Tensor, quantization: str, dtype: torch.dtype, device: torch.device, weight_execution: str
) -> Linear:
    """Return the product with lm_head's unquantized `weight` (vocab, in); the logits are in the activations' dtype.

    In bfloat16, logits of 16 to 32 lie 0.125 apart, and the best two would often be equal. Beside quantized layers in
    panels, lm_head is in panels too, rounded to 13 bits a weight: a mean KL of 2e-6 nats. Otherwise it is exact.

    Args:
        weight: in any float dtype.
        quantization: of the layers.
        dtype: that products are computed in.
        device: where the product runs.
        weight_execution: "packed" or "dequantized", as for the layers.
    """
    rounded = quantization != "none" and weight_execution == "packed" and dtype == torch.bfloat16
    if rounded and device.type == "cpu" and panels_available("int16"):
        return RoundedPanelLinear(weight)
    return dense_linear(_stacked([weight], activation_dtype(dtype, device), device))


def from_prequantized(
    modules: Sequence[Mapping[str, torch.Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    weight_execution: str = "auto",
) -> Linear:
    """Return one product for several modules of a checkpoint that bitsandbytes quantized, their outputs side by side.

    Args:
        modules: the tensors of each module by their names within it: "weight", "weight.absmax", "weight.quant_map",
            "weight.nested_absmax", "weight.nested_quant_map" and "weight.quant_state.bitsandbytes__nf4" (or fp4); or
            "weight", "SCB" and "weight_format"; or an unquantized "weight" alone. Others ("bias") are left alone.
        dtype: of activations.
        device: where the product runs.
        weight_execution: see `make_linear`.

    Raises:
        ModelLoadError: if the tensors are not what bitsandbytes writes.
    """
    if all(four_bit.is_four_bit(module) for module in modules):
        matrices = [FourBitMatrix.from_checkpoint(module, device) for module in modules]
        size = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
        kind = matrices[0].kind
        return _four_bit_linear(matrices, dtype, choose_weight_execution(weight_execution, kind, dtype, device, size))
    if all(int8.is_int8(module) for module in modules):
        codes = [Int8Matrix.from_checkpoint(module, device) for module in modules]
        size = sum(matrix.codes.numel() for matrix in codes)
        return _int8_linear(codes, dtype, choose_weight_execution(weight_execution, "int8", dtype, device, size))
    if len(modules) > 1:
        return StackedLinear([from_prequantized([module], dtype, device, weight_execution) for module in modules])
    weight = modules[0].get("weight")
    if weight is None or not weight.is_floating_point():
        raise ModelLoadError("a quantized weight without the tensors that say how")
    return make_linear([weight], "none", dtype, device)


def _four_bit_linear(matrices: Sequence[FourBitMatrix], dtype: torch.dtype, execution: str) -> Linear:
    linears = [_one_four_bit(matrix, dtype, execution) for matrix in four_bit.join(matrices)]
    return linears[0] if len(linears) == 1 else StackedLinear(linears)


def _one_four_bit(matrix: FourBitMatrix, dtype: torch.dtype, execution: str) -> Linear:
    device = matrix.codes.device
    if execution == "packed" and has_kernel(matrix.kind, dtype, device):
        if device.type != "cpu" and matrix.rows_are_whole:
            return gpu_four_bit(matrix, dtype)
        if device.type == "cpu" and panels_available(matrix.kind) and fits_panels(matrix):
            return FourBitPanelLinear(matrix)
        if device.type == "cpu" and fused_available(matrix.kind) and fits(matrix):
            return FusedFourBitLinear(matrix)
    return _dequantizing(matrix, dtype, device, execution)


def gpu_four_bit(matrix: FourBitMatrix, dtype: torch.dtype) -> Linear:
    """Return the product for activations of `dtype` on a GPU, by bitsandbytes' kernels, and ours.

    Ours are for bfloat16 and some numbers of rows; they take a second copy of the codes. `matrix.rows_are_whole`.
    """
    linear = GpuFourBitLinear(matrix)
    if dtype != torch.bfloat16:
        return linear
    # Imported here: only a GPU needs Triton.
    from loraplex.server.models import triton_four_bit

    return triton_four_bit.TritonFourBitLinear(matrix, linear) if triton_four_bit.fits(matrix) else linear


def _int8_linear(matrices: Sequence[Int8Matrix], dtype: torch.dtype, execution: str) -> Linear:
    matrix = int8.join(matrices)
    device = matrix.codes.device
    if execution == "packed" and has_kernel("int8", dtype, device):
        if device.type == "cpu" and panels_available("int8"):
            return Int8PanelLinear(matrix)
        return DynamicInt8Linear(matrix)
    return _dequantizing(matrix, dtype, device, execution)


def _dequantizing(matrix: QuantizedMatrix, dtype: torch.dtype, device: torch.device, execution: str) -> Linear:
    compute = product_dtype(dtype, device)
    return DequantizedLinear(matrix, compute) if execution == "dequantized" else OnTheFlyLinear(matrix, compute)


def _stacked(weights: Sequence[torch.Tensor], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if len(weights) == 1:
        weight = weights[0].to(device, dtype).contiguous()
        # A part of something larger (a mapped checkpoint file) would keep all of it in memory.
        return weight if weight.untyped_storage().nbytes() == weight.nbytes else weight.clone()
    stacked = torch.empty(sum(len(weight) for weight in weights), weights[0].shape[1], dtype=dtype, device=device)
    first = 0
    for weight in weights:
        stacked[first : first + len(weight)] = weight
        first += len(weight)
    return stacked
