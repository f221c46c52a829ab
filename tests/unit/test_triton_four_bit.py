"""The Triton product with 4-bit weights against the product with what bitsandbytes says they stand for.

In Triton's interpreter where there is no GPU; the whole product of sizes is marked long.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex.server.models.four_bit import FourBitMatrix
from loraplex.server.models.four_bit_gpu import GpuFourBitLinear
from loraplex.server.models.quantization import gpu_four_bit
from loraplex.server.models.quantized_linear import OnTheFlyLinear
from loraplex.server.models.triton_four_bit import (
    DEFAULT_ROWS,
    HALF,
    OUTPUTS,
    PackedFourBit,
    RowRange,
    TritonFourBitLinear,
    choose_rows,
    fits,
)
from tests.triton_interpreter import DEVICE

KINDS = ["nf4", "fp4"]
# Relative to the largest result, which is rounded to bfloat16: it may be to the other neighbour.
TOLERANCE = 2**-8


def quantized(out_features: int, in_features: int, kind: str, seed: int = 0) -> FourBitMatrix:
    generator = torch.Generator().manual_seed(seed)
    return FourBitMatrix.quantize(torch.randn(out_features, in_features, generator=generator).to(DEVICE), kind)


def linear(matrix: FourBitMatrix, rows: RowRange = DEFAULT_ROWS) -> TritonFourBitLinear:
    return TritonFourBitLinear(matrix, OnTheFlyLinear(matrix, torch.bfloat16), rows)


def inputs(rows: int, in_features: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)


def assert_right(matrix: FourBitMatrix, rows: int) -> None:
    x = inputs(rows, matrix.shape[1])
    # The weights rounded as bitsandbytes rounds them, the sums exact.
    expected = x.double() @ matrix.dequantize(torch.bfloat16).double().t()
    actual = linear(matrix).fused(x)
    assert actual.dtype is torch.bfloat16
    assert (actual.double() - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("out_features", "in_features", "rows"), [(64, 128, 1), (160, 576, 5), (70, 64, 16), (8, 192, 17), (64, 640, 70)]
)
def test_products(out_features: int, in_features: int, rows: int, kind: str) -> None:
    assert_right(quantized(out_features, in_features, kind), rows)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 32, 33, 64, 65, 130])
@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (64, 4096), (1000, 320)])
def test_products_of_every_size(shape: tuple[int, int], rows: int, kind: str) -> None:
    assert_right(quantized(*shape, kind), rows)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(out_features=st.integers(1, 150), blocks=st.integers(1, 7), rows=st.integers(1, 40), kind=st.sampled_from(KINDS))
def test_any_size(out_features: int, blocks: int, rows: int, kind: str) -> None:
    assert_right(quantized(out_features, 64 * blocks, kind), rows)


def test_larger_blocks_have_their_scale_repeated() -> None:
    small = quantized(8, 256, "nf4")
    matrix = FourBitMatrix("nf4", 128, (8, 256), small.codes.reshape(-1, 64), small.absmax[::2].contiguous())
    assert fits(matrix)
    assert_right(matrix, 5)


def test_only_shapes_with_whole_blocks_fit() -> None:
    assert fits(quantized(3, 192, "nf4"))
    assert not fits(quantized(64, 96, "nf4"))
    small = quantized(8, 256, "nf4")
    assert not fits(FourBitMatrix("nf4", 32, (8, 128), small.codes.view(-1, 16)[:32], small.absmax[:32]))


def test_every_tile_belongs_to_one_split() -> None:
    for out_features, in_features in ((64, 64), (64, 14336), (4096, 4096), (28672, 4096), (576, 1536)):
        blocks, chunks = -(-out_features // OUTPUTS), -(-in_features // (2 * HALF))
        codes = torch.empty(blocks, chunks, OUTPUTS, HALF, dtype=torch.uint8, device="meta")
        splits, each = PackedFourBit(codes, torch.empty(0), (out_features, in_features)).splits
        assert (splits - 1) * each < chunks <= splits * each


def test_a_row_is_the_same_to_the_bit_with_others_and_again() -> None:
    matrix = quantized(96, 1024, "nf4")
    ours, x = linear(matrix), inputs(9, 1024)
    assert ours._packed.splits[0] > 1
    together = ours.fused(x)
    assert torch.equal(ours.fused(x), together)
    for row in range(9):
        assert torch.equal(ours.fused(x[row : row + 1])[0], together[row])


def test_nan_stays_in_its_row() -> None:
    x = inputs(6, 128)
    x[2, 5] = float("nan")
    y = linear(quantized(64, 128, "nf4")).fused(x)
    assert y.isnan().all(1).tolist() == [False, False, True, False, False, False]


class Counting(OnTheFlyLinear):
    """Counts its calls."""

    calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().__call__(x)


def test_row_counts_outside_the_range_and_other_activations_go_to_the_other_product() -> None:
    matrix = quantized(64, 128, "nf4")
    other = Counting(matrix, torch.float32)
    ours = TritonFourBitLinear(matrix, other, RowRange(3, 6))
    for rows, fused in ((1, False), (2, False), (3, True), (6, True), (7, False)):
        before = other.calls
        y = ours(inputs(rows, 128).view(1, rows, 128))
        assert y.shape == (1, rows, 64)
        assert (other.calls == before) == fused
    ours(inputs(4, 128).float())
    assert other.calls == 4
    assert torch.equal(ours.dequantize(), matrix.dequantize())
    assert ours.nbytes > matrix.nbytes


def test_rows_of_x_may_lie_apart() -> None:
    wide = inputs(5, 200)
    ours = linear(quantized(64, 128, "nf4"))
    assert torch.equal(ours.fused(wide[:, 8:136]), ours.fused(wide[:, 8:136].contiguous()))


def test_rows_may_lie_more_than_2_to_the_31_numbers_apart() -> None:
    """Most of this memory is never touched, hence never there."""
    x = torch.empty_strided((3, 128), (2**30 + 64, 1), dtype=torch.bfloat16, device=DEVICE)
    x.copy_(inputs(3, 128))
    ours = linear(quantized(64, 128, "nf4"))
    assert torch.equal(ours.fused(x), ours.fused(x.contiguous()))


def test_the_rows_are_chosen_by_measurement() -> None:
    counts = (1, 2, 4, 8, 16, 32, 64)
    chosen = choose_rows(counts, lambda rows: 3 + rows / 100, lambda rows: {1: 1, 2: 1, 8: 2, 64: 3}.get(rows, 5.0))
    assert chosen == RowRange(16, 32)
    assert choose_rows(counts, lambda rows: 1.0, lambda rows: 2.0) == RowRange(1, 64)
    never = choose_rows(counts, lambda rows: 2.0, lambda rows: 1.0)
    assert not any(rows in never for rows in counts)


def test_it_stands_beside_bitsandbytes_kernels_where_it_can() -> None:
    whole, parted = quantized(64, 128, "nf4"), quantized(8, 64, "nf4")
    assert type(gpu_four_bit(whole, torch.bfloat16)) is TritonFourBitLinear
    assert type(gpu_four_bit(whole, torch.float32)) is GpuFourBitLinear
    small = FourBitMatrix("nf4", 32, (8, 64), parted.codes.view(-1, 16), parted.absmax.repeat_interleave(2))
    assert type(gpu_four_bit(small, torch.bfloat16)) is GpuFourBitLinear
