"""Linear products: layouts, choices and refusals, without bitsandbytes' own modules to compare with (tests/parity)."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from loraplex.server.errors import ModelLoadError
from loraplex.server.models.four_bit import FourBitMatrix
from loraplex.server.models.four_bit_fused import FusedFourBitLinear, agrees_with_dequantized, fits, repack, unpack
from loraplex.server.models.int8 import DynamicInt8Linear, Int8Matrix, dynamic_agrees_with_dequantized
from loraplex.server.models.linear import DenseLinear, StackedLinear
from loraplex.server.models.quantization import choose_weight_execution, from_prequantized, make_linear
from loraplex.server.models.quantize_kernel import quantize_blocks
from loraplex.server.models.weight_execution import available_memory

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected.double()).abs().max() / expected.double().abs().max())


def packed_product(x, packed, shape, scales, values, blocksize):
    """Multiply as bitsandbytes' AVX512-BF16 kernel reads memory (csrc/cpu_ops.cpp, tinygemm_kernel_nn)."""
    (out_features, in_features), memory = shape, packed.reshape(-1)
    weight = torch.empty(shape)
    for block in range(out_features // 32):
        for k in range(in_features // 2):
            at = (block * in_features // 2 + k) * 32
            row = memory[at : at + 32]
            for column in range(16):
                for parity in range(2):
                    byte = int(row[2 * column + parity])
                    weight[32 * block + column, 2 * k + parity] = values[byte & 0xF]
                    weight[32 * block + 16 + column, 2 * k + parity] = values[byte >> 4]
    flat = scales.reshape(-1).float()
    for block in range(in_features // blocksize):
        rows = flat[block * out_features : (block + 1) * out_features]
        weight[:, block * blocksize : (block + 1) * blocksize] *= rows.unsqueeze(1)
    return (x.float() @ weight.t()).to(x.dtype)


@pytest.mark.parametrize("shape", [(960, 576), (1, 64), (33, 97), (49152, 32)])
@pytest.mark.parametrize("rows", [0, 1, 2, 16, 65])
def test_float32_is_torchs_product(shape: tuple[int, int], rows: int) -> None:
    weight, x = torch.randn(shape), torch.randn(rows, shape[1])
    linear = make_linear([weight], "none", torch.float32, CPU)
    y = linear(x)
    assert y.shape == (rows, shape[0])
    assert rows == 0 or relative_error(y, F.linear(x, weight)) < 1e-5
    assert torch.equal(linear.dequantize(), weight)
    assert linear.nbytes == weight.nbytes


def check_same_rows(some: torch.Tensor, whole: torch.Tensor) -> None:
    """Compare to the bit on the CPUs where that was tried; oneDNN and MKL may order sums otherwise elsewhere."""
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert torch.equal(some, whole)
    assert relative_error(some, whole) < 1e-5


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "quantization", "execution"),
    [
        ((960, 576), "none", "auto"),
        ((64, 1536), "none", "auto"),
        ((33, 97), "none", "auto"),
        ((1, 64), "none", "auto"),
        ((960, 576), "nf4", "packed"),
        ((64, 1536), "nf4", "packed"),
        ((33, 97), "int8", "dequantized"),
    ],
)
def test_float32_rows_are_the_same_in_any_batch(
    shape: tuple[int, int], quantization: str, execution: str, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        linear = make_linear([torch.randn(shape)], quantization, torch.float32, CPU, execution)
        x = torch.randn(130, shape[1])
        whole = linear(x)
        for rows in (1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 31, 129):
            check_same_rows(linear(x[1 : 1 + rows]), whole[1 : 1 + rows])
    finally:
        torch.set_num_threads(before)


def test_float32_sums_with_one_large_product_are_as_accurate_as_torchs() -> None:
    weight, x = torch.randn(64, 1536), torch.randn(32, 1536)
    x[:, 7] = 3000
    exact = F.linear(x.double(), weight.double())
    error = (make_linear([weight], "none", torch.float32, CPU)(x) - exact).norm()
    assert error < 1.5 * (F.linear(x, weight) - exact).norm()


def test_leading_dimensions_and_dtype_of_activations_are_kept() -> None:
    weights = [torch.randn(32, 64), torch.randn(64, 64)]
    for dtype in (torch.float32, torch.bfloat16):
        for quantization in ("none", "nf4", "int8"):
            for execution in ("packed", "dequantized"):
                linear = make_linear(weights, quantization, dtype, CPU, execution)
                y = linear(torch.randn(2, 3, 64, dtype=dtype))
                assert (y.shape, y.dtype) == ((2, 3, 96), dtype)
                assert linear(torch.randn(0, 64, dtype=dtype)).shape == (0, 96)
                assert (linear.in_features, linear.out_features) == (64, 96)


def test_projections_lie_side_by_side_in_the_output() -> None:
    weights, x = [torch.randn(n, 64) for n in (32, 8, 8)], torch.randn(5, 64)
    y = make_linear(weights, "none", torch.float32, CPU)(x)
    torch.testing.assert_close(y, torch.cat([F.linear(x, weight) for weight in weights], dim=1))


def test_a_weight_is_shared_only_where_it_fills_its_memory() -> None:
    table = torch.randn(48, 64).to(torch.bfloat16)
    tied = make_linear([table], "none", torch.bfloat16, CPU)
    assert isinstance(tied, DenseLinear)
    table[0, 0] = 7
    assert tied.dequantize()[0, 0] == 7
    file = torch.randn(100, 64).to(torch.bfloat16)
    part = make_linear([file[:48]], "none", torch.bfloat16, CPU)
    file.zero_()
    assert part.dequantize().abs().max() > 0


def test_what_dequantize_returns_is_the_callers() -> None:
    for quantization in ("none", "nf4", "int8"):
        for dtype in (torch.float32, torch.bfloat16):
            linear = make_linear([torch.randn(32, 64)], quantization, dtype, CPU)
            values = linear.dequantize()
            linear.dequantize().zero_()
            assert torch.equal(linear.dequantize(), values)


def test_bitsandbytes_is_not_imported_for_unquantized_weights() -> None:
    code = """
import sys, torch
from loraplex.server.models.quantization import make_linear
make_linear([torch.randn(8, 8)], "none", torch.float32, torch.device("cpu"))(torch.randn(2, 8))
sys.exit("bitsandbytes" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("options", [{"quantization": "int4"}, {"quantization": "nf4", "weight_execution": "fast"}])
def test_unknown_options_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(ModelLoadError, match=r"int4|fast"):
        make_linear([torch.randn(8, 64)], dtype=torch.float32, device=CPU, **options)


def test_auto_execution_copies_where_the_copy_fits_in_half_of_the_free_memory() -> None:
    def choose(requested: str, quantization: str, weights: int) -> str:
        return choose_weight_execution(requested, quantization, torch.float32, CPU, weights, available=8 * GIB)

    assert choose("auto", "nf4", GIB) == "dequantized"
    assert choose("auto", "nf4", GIB + 1) == "packed"
    assert choose("auto", "int8", GIB // 2) == "dequantized"
    assert choose("auto", "none", 1) == "packed"
    assert choose("packed", "nf4", 1) == "packed"
    assert choose("dequantized", "nf4", 100 * GIB) == "dequantized"


def test_auto_execution_on_a_gpu_uses_its_kernels() -> None:
    gpu = torch.device("cuda")
    assert choose_weight_execution("auto", "nf4", torch.float32, gpu, 1, available=0) == "packed"
    assert choose_weight_execution("auto", "int8", torch.float16, gpu, 1, available=0) == "packed"


def test_available_memory_is_the_smaller_of_machine_and_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemFree: 10 kB\nMemAvailable:    5000 kB\n")
    group = tmp_path / "cgroup"
    assert available_memory(meminfo, group) == 5000 * 1024
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1024\n")
    assert available_memory(meminfo, group) == 5000 * 1024
    (group / "memory.max").write_text(f"{3000 * 1024}\n")
    assert available_memory(meminfo, group) == 2999 * 1024
    assert available_memory(tmp_path / "absent", tmp_path / "absent") > 0


def test_blocks_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        quantize_blocks(torch.randn(3, 6), torch.linspace(-1, 1, 16))


def test_quantizing_in_threads_changes_nothing() -> None:
    weights, values = torch.randn(3 * 16384 + 5, 64), torch.linspace(-1, 1, 16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = quantize_blocks(weights, values)
        torch.set_num_threads(3)
        together = quantize_blocks(weights, values)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_repacking_is_undone_by_unpacking() -> None:
    codes = torch.randint(0, 256, (96, 64), dtype=torch.uint8)
    assert not torch.equal(repack(codes).view(96, 64), codes)
    assert torch.equal(unpack(repack(codes)), codes)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_fused_layout_holds_what_the_kernel_reads(kind: str) -> None:
    matrix = FourBitMatrix.quantize(torch.randn(64, 128), kind)
    linear, weight = FusedFourBitLinear(matrix, packed_product), matrix.dequantize()
    x = torch.randn(3, 128).to(torch.bfloat16)
    assert relative_error(linear(x), x.float() @ weight.t()) < 0.02
    assert linear(x[:0]).shape == (0, 64)
    assert torch.equal(linear.dequantize(), weight)
    assert linear.nbytes < 64 * 128


def test_the_fused_kernel_is_offered_only_the_shapes_it_takes() -> None:
    assert fits(FourBitMatrix.quantize(torch.randn(64, 128), "nf4"))
    assert not fits(FourBitMatrix.quantize(torch.randn(33, 128), "nf4"))
    assert not fits(FourBitMatrix.quantize(torch.randn(64, 96), "nf4"))


def test_a_fused_kernel_that_errs_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    def unscaled(x, packed, shape, scales, values, blocksize):
        return packed_product(x, packed, shape, torch.ones_like(scales), values, blocksize)

    def undefined(x, packed, shape, scales, values, blocksize):
        return torch.full((len(x), shape[0]), float("nan"))

    def missing(x, packed, shape, scales, values, blocksize):
        raise RuntimeError("no such kernel")

    with caplog.at_level(logging.WARNING):
        assert agrees_with_dequantized("nf4", packed_product)
        assert not caplog.records
        for broken in (unscaled, undefined, missing):
            caplog.clear()
            assert not agrees_with_dequantized("nf4", broken)
            assert "dequantized instead" in caplog.text


def test_integer_products_pass_their_own_check(caplog: pytest.LogCaptureFixture) -> None:
    assert dynamic_agrees_with_dequantized()
    assert not caplog.records


def test_int8_rows_of_zeros_stay_zero() -> None:
    weight = torch.randn(4, 64)
    weight[2] = 0
    matrix = Int8Matrix.quantize(weight)
    assert not matrix.dequantize()[2].any()
    x = torch.randn(3, 64)
    x[1] = 0
    y = DynamicInt8Linear(matrix)(x)
    assert torch.isfinite(y).all()
    assert not y[:, 2].any()
    assert not y[1].any()


def test_int8_refuses_weights_beyond_float16() -> None:
    weight = torch.randn(4, 64)
    weight[1, 1] = 1e6
    with pytest.raises(ModelLoadError, match="float16"):
        make_linear([weight], "int8", torch.float32, CPU)


def test_damaged_checkpoints_are_refused() -> None:
    codes, scale = torch.zeros(4, 64, dtype=torch.int8), torch.ones(4)
    state = {"weight": torch.zeros(128, 1, dtype=torch.uint8), "weight.quant_state.bitsandbytes__nf4": codes[0]}
    for tensors in (
        {"weight": codes},
        {},
        {"SCB": scale},
        {"weight": codes, "SCB": scale[:3]},
        {"weight": codes, "SCB": scale, "weight_format": torch.tensor(2, dtype=torch.uint8)},
        state,
    ):
        with pytest.raises(ModelLoadError):
            from_prequantized([tensors], torch.float32, CPU)


def test_modules_of_different_kinds_are_stacked() -> None:
    plain = torch.randn(4, 64)
    codes, scale = torch.randint(-127, 128, (8, 64), dtype=torch.int8), torch.rand(8)
    linear = from_prequantized([{"weight": plain}, {"weight": codes, "SCB": scale}], torch.float32, CPU)
    assert isinstance(linear, StackedLinear)
    weight = torch.cat([plain, codes * scale.unsqueeze(1) / 127])
    torch.testing.assert_close(linear.dequantize(), weight)
    x = torch.randn(5, 64)
    torch.testing.assert_close(linear(x), F.linear(x, weight), rtol=1e-5, atol=1e-4)
