"""Weights in panels: the way back is exact, and products are those of the dequantized weights, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from loraplex.server.models import panel_linear, panels
from loraplex.server.models.four_bit import FourBitMatrix
from loraplex.server.models.int8 import Int8Matrix
from loraplex.server.models.integer_product import integer_products_available
from loraplex.server.models.panel_linear import (
    FourBitPanelLinear,
    Int8PanelLinear,
    PanelLinear,
    RoundedPanelLinear,
    agrees_with_dequantized,
    fits_panels,
)

needs_vnni = pytest.mark.skipif(not integer_products_available(), reason="this CPU has no AVX512-VNNI")

MAKERS: dict[str, Callable[[torch.Tensor], PanelLinear]] = {
    "nf4": lambda weight: FourBitPanelLinear(FourBitMatrix.quantize(weight, "nf4")),
    "fp4": lambda weight: FourBitPanelLinear(FourBitMatrix.quantize(weight, "fp4")),
    "int8": lambda weight: Int8PanelLinear(Int8Matrix.quantize(weight)),
    "int16": RoundedPanelLinear,
}
# The largest integers that activations and the values of 4-bit codes become; each is off by half of one at most.
STEPS = {"nf4": (8191, 4095), "fp4": (8191, 4095), "int8": (32767, None), "int16": (8191, None)}
# Several blocks with a part at the end, several panels with a part at the end, and less than one of each.
SHAPES = [(96, 576), (33, 1536), (7, 64), (1, 97), (50, 5)]


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_integers_come_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes = torch.randint(-127, 128, shape).to(dtype)
    packed = panels.pack(codes)
    assert packed.shape[0] == -(-shape[0] // panels.OUTPUTS)
    assert torch.equal(panels.unpack(packed, shape), codes)


@pytest.mark.parametrize("rows", [1, 16, 33])
def test_four_bit_codes_and_scales_come_back(rows: int) -> None:
    codes, scales = torch.randint(0, 256, (rows, 96), dtype=torch.uint8), torch.rand(rows, 3)
    assert torch.equal(panels.unpack_four_bit(panels.pack_four_bit(codes), rows), codes)
    assert torch.equal(panels.unpack_scales(panels.pack_scales(scales), rows), scales)


def make(kind: str, shape: tuple[int, int]) -> PanelLinear:
    if kind in ("nf4", "fp4"):
        shape = (shape[0], -(-shape[1] // 64) * 64)
    return MAKERS[kind](torch.randn(shape))


def largest_error(kind: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return how far rounding can move each result, (rows, out)."""
    of_x, of_weights = STEPS[kind]
    bound = x.abs().amax(dim=1).unsqueeze(1) / (2 * of_x) * weight.abs().sum(dim=1)
    if of_weights is not None:
        bound = bound + x.abs().sum(dim=1).unsqueeze(1) / (2 * of_weights) * weight.abs().amax(dim=1)
    return 1.001 * bound


@needs_vnni
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MAKERS)
def test_products_are_those_of_the_dequantized_weights(kind: str, shape: tuple[int, int]) -> None:
    linear = make(kind, shape)
    weight = linear.dequantize().double()
    for rows in (1, 2, 3, 7, 11, 16, 17, 40):
        x = torch.randn(rows, linear.in_features) * torch.logspace(-3, 3, rows).unsqueeze(1)
        y, expected = linear(x), F.linear(x.double(), weight)
        assert y.dtype == torch.float32
        assert bool(((y - expected).abs() <= largest_error(kind, x.double(), weight) + 1e-6 * expected.abs()).all())


@needs_vnni
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_row_has_the_same_bits_in_any_batch(kind: str, threads: int) -> None:
    linear, x = make(kind, (200, 576)), torch.randn(130, 576)
    torch.set_num_threads(1)
    whole = linear(x)
    torch.set_num_threads(threads)
    assert torch.equal(linear(x), whole)
    for rows in (1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 33, 129):
        assert torch.equal(linear(x[1 : 1 + rows]), whole[1 : 1 + rows])
    x[5, 17] = 1000
    stormy = linear(x)
    assert not torch.equal(stormy[5], whole[5])
    assert torch.equal(stormy[6:], whole[6:])


@needs_vnni
@pytest.mark.parametrize("kind", MAKERS)
def test_what_lies_beside_an_outlier_is_not_lost(kind: str) -> None:
    """With 8 bits for the row's largest value, the others would be rounded to 0.8 and the error be 15 %."""
    linear, x = make(kind, (64, 576)), torch.randn(4, 576)
    x[:, 100] = 100
    weight = linear.dequantize()
    calm = x.clone()
    calm[:, 100] = 0
    y = linear(x).double() - F.linear((x - calm).double(), weight.double())
    assert relative_error(y, F.linear(calm.double(), weight.double())) < 5e-3


@needs_vnni
@pytest.mark.parametrize("kind", MAKERS)
def test_zeros_and_what_is_not_a_number(kind: str) -> None:
    weight = torch.randn(20, 128)
    weight[3] = 0
    linear, x = MAKERS[kind](weight), torch.randn(5, 128)
    x[1], x[2, 7], x[3, 9] = 0, torch.nan, torch.inf
    y = linear(x)
    assert not y[1].any()
    assert not y[[0, 4], 3].any()
    assert torch.isfinite(y[[0, 4]]).all()
    assert not torch.isfinite(y[2:4]).any()


@needs_vnni
@pytest.mark.parametrize("kind", MAKERS)
def test_shapes_dtypes_and_memory(kind: str) -> None:
    linear = make(kind, (96, 576))
    y = linear(torch.randn(2, 3, 576, dtype=torch.bfloat16))
    assert (y.shape, y.dtype) == ((2, 3, 96), torch.bfloat16)
    assert linear(torch.randn(0, 576)).shape == (0, 96)
    x = torch.randn(576, 5)
    assert torch.equal(linear(x.t()), linear(x.t().contiguous()))
    bits = {"nf4": 4.5, "fp4": 4.5, "int8": 8.06, "int16": 16.5}[kind]
    assert linear.nbytes == pytest.approx(96 * 576 * bits / 8, rel=0.01)


@needs_vnni
def test_what_quantized_weights_stand_for_does_not_change() -> None:
    weight = torch.randn(33, 192)
    eight, four = Int8Matrix.quantize(weight), FourBitMatrix.quantize(weight, "nf4")
    assert torch.equal(Int8PanelLinear(eight).dequantize(), eight.dequantize())
    assert torch.equal(FourBitPanelLinear(four).dequantize(), four.dequantize())
    four = FourBitMatrix.quantize(torch.randn(33, 256), "nf4")
    blocks = FourBitMatrix("nf4", 128, (33, 256), four.codes.view(66, -1), four.absmax[::2].contiguous())
    linear, x = FourBitPanelLinear(blocks), torch.randn(4, 256)
    assert torch.equal(linear.dequantize(), blocks.dequantize())
    assert relative_error(linear(x), F.linear(x, blocks.dequantize())) < 1e-3


@needs_vnni
def test_rounded_weights_are_close() -> None:
    weight = torch.randn(300, 130).to(torch.bfloat16)
    weight[4] = 0
    rounded = RoundedPanelLinear(weight).dequantize()
    assert relative_error(rounded, weight) < 3e-4
    assert not rounded[4].any()


def test_panels_take_blocks_of_64_within_a_row() -> None:
    assert fits_panels(FourBitMatrix.quantize(torch.randn(33, 128), "nf4"))
    assert not fits_panels(FourBitMatrix.quantize(torch.randn(64, 96), "nf4"))
    codes, absmax = torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4)
    assert not fits_panels(FourBitMatrix("nf4", 32, (2, 64), codes, absmax))


@needs_vnni
def test_a_product_that_errs_is_found_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert all(agrees_with_dequantized(kind) for kind in ("nf4", "fp4", "int8", "int16"))
    assert not caplog.records
    honest = PanelLinear.__call__
    monkeypatch.setattr(panel_linear.PanelLinear, "__call__", lambda linear, x: 1.01 * honest(linear, x))
    assert not agrees_with_dequantized("int8")
    assert "not used" in caplog.text


def test_code_for_another_cpu_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    integer_products_available.cache_clear()
    try:
        assert not integer_products_available()
    finally:
        integer_products_available.cache_clear()
