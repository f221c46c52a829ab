"""Quantized weights are bitsandbytes' own, to the bit, and products with them are what they stand for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from loraplex.adapters.bnb import import_bitsandbytes
from loraplex.server.models.four_bit import FourBitMatrix
from loraplex.server.models.four_bit_fused import FusedFourBitLinear, fused_available, repack
from loraplex.server.models.int8 import DynamicInt8Linear, Int8Matrix, dynamic_int8_available
from loraplex.server.models.linear import Linear, StackedLinear
from loraplex.server.models.panel_linear import PanelLinear, RoundedPanelLinear, panels_available
from loraplex.server.models.quantization import from_prequantized, make_head, make_linear

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXECUTIONS = ("packed", "dequantized")
# Rows of a step in the middle of the model's range, an odd one, a vocabulary, blocks across rows, and parts of blocks.
SHAPES = [(192, 576), (1, 64), (49152, 64), (33, 96), (7, 50), (1, 97), (5, 3)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def bnb():
    return import_bitsandbytes()


def bitsandbytes_module(bnb, weight: torch.Tensor, quantization: str):
    """Return bitsandbytes' own module with `weight`, quantized as it does that."""
    out_features, in_features = weight.shape
    if quantization == "int8":
        module = bnb.nn.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False, threshold=0.0)
        module.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        module = bnb.nn.Linear4bit(in_features, out_features, bias=False, quant_type=quantization)
        module.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type=quantization, module=module)
    return module.to("cpu")


def bitsandbytes_values(bnb, module) -> torch.Tensor:
    """Return what the module's weights stand for, in float32."""
    if isinstance(module, bnb.nn.Linear8bitLt):
        return bnb.functional.int8_vectorwise_dequant(module.weight.CB, module.weight.SCB)
    # Spelled out: bitsandbytes' own takes wrong scales for odd shapes on CPUs with AVX512, and compiles C++ for others.
    state, packed = module.weight.quant_state, module.weight.data.reshape(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 0xF], dim=1).view(-1)[: state.shape.numel()]
    scales = state.absmax
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    scales = scales.repeat_interleave(state.blocksize)[: len(codes)]
    return (state.code[codes.long()] * scales).view(state.shape)


def random_weights(shapes: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [(0.05 * torch.randn(shape)).to(dtype) for shape in shapes]


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_joined_four_bit_codes_are_those_of_each_module(bnb, kind: str, dtype: torch.dtype) -> None:
    weights = random_weights([(960, 576), (320, 576), (320, 576)], dtype)
    weights[0][3] = 0
    modules = [bitsandbytes_module(bnb, weight, kind) for weight in weights]
    matrices = [FourBitMatrix.quantize(weight, kind) for weight in weights]
    for matrix, module in zip(matrices, modules, strict=True):
        assert torch.equal(matrix.codes.view(-1), module.weight.data.view(-1))
        state = module.weight.quant_state
        nested = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(matrix.absmax, nested)
    linear = make_linear(weights, kind, torch.float32, CPU)
    assert not isinstance(linear, StackedLinear)
    assert torch.equal(linear.dequantize(), torch.cat([bitsandbytes_values(bnb, module) for module in modules]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_joined_int8_codes_are_those_of_each_module(bnb, dtype: torch.dtype) -> None:
    weights = random_weights([(960, 576), (320, 576), (7, 576)], dtype)
    modules = [bitsandbytes_module(bnb, weight, "int8") for weight in weights]
    for weight, module in zip(weights, modules, strict=True):
        matrix = Int8Matrix.quantize(weight)
        assert torch.equal(matrix.codes, module.weight.CB)
        assert torch.equal(matrix.scale, module.weight.SCB)
    linear = make_linear(weights, "int8", torch.float32, CPU)
    assert torch.equal(linear.dequantize(), torch.cat([bitsandbytes_values(bnb, module) for module in modules]))


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(bnb, shape: tuple[int, int], quantization: str, execution: str) -> None:
    weights = random_weights([shape, (2, shape[1])])
    linear = make_linear(weights, quantization, torch.float32, CPU, execution)
    expected = [bitsandbytes_values(bnb, bitsandbytes_module(bnb, weight, quantization)) for weight in weights]
    values = linear.dequantize()
    assert torch.equal(values, torch.cat(expected))
    for rows in (1, 16):
        x = torch.randn(rows, shape[1])
        assert relative_error(linear(x), F.linear(x.double(), values.double())) < 1e-5
    assert torch.equal(linear.dequantize(), values)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_an_outlier_in_a_neighbours_row_changes_nothing(quantization: str, execution: str) -> None:
    linear = make_linear(random_weights([(96, 576)]), quantization, torch.float32, CPU, execution)
    check_neighbours(linear, torch.float32)


def test_an_outlier_in_a_neighbours_row_changes_nothing_for_quantized_activations() -> None:
    check_neighbours(DynamicInt8Linear(Int8Matrix.quantize(*random_weights([(96, 576)]))), torch.bfloat16)


def check_neighbours(linear: Linear, dtype: torch.dtype) -> None:
    x = torch.randn(16, 576).to(dtype)
    calm = linear(x)
    x[5, 17] = 1000
    stormy = linear(x)
    assert not torch.equal(calm[5], stormy[5])
    assert torch.equal(calm[:5], stormy[:5])
    assert torch.equal(calm[6:], stormy[6:])


def test_quantized_activations_stay_within_their_bound() -> None:
    """The stated bound: 2 % of the result's norm for random rows, against exact products with the same weights."""
    matrix = Int8Matrix.quantize(*random_weights([(960, 576)], torch.bfloat16))
    x = torch.randn(64, 576).to(torch.bfloat16)
    exact = F.linear(x.float(), matrix.dequantize())
    assert relative_error(DynamicInt8Linear(matrix)(x), exact) < 0.02


def test_the_fused_layout_is_bitsandbytes_own(bnb) -> None:
    weight = random_weights([(96, 192)])[0]
    packed, state = bnb.functional._convert_weight_packed_for_cpu(
        *bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    )
    matrix = FourBitMatrix.quantize(weight, "nf4")
    assert torch.equal(repack(matrix.codes.view(96, -1)).view(-1), packed.view(-1))
    assert torch.equal(matrix.absmax.view(96, -1).t().to(torch.bfloat16), state.absmax)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(960, 576), (32, 64), (49152, 64)])
def test_the_fused_kernel_on_cpus_that_have_it(bnb, kind: str, shape: tuple[int, int]) -> None:
    if not bnb.functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16")
    assert fused_available(kind), "bitsandbytes' fused kernel is there, but failed its check"
    linear = FusedFourBitLinear(FourBitMatrix.quantize(random_weights([shape])[0], kind))
    values = linear.dequantize()
    for rows in (1, 4, 33):
        x = torch.randn(rows, shape[1]).to(torch.bfloat16)
        y = linear(x)
        assert relative_error(y, F.linear(x.float(), values)) < 0.01
        assert torch.equal(linear(x[:1]), y[:1])
    assert torch.equal(linear.dequantize(), values)


def test_integer_products_on_cpus_that_have_them() -> None:
    if not torch.cpu._is_vnni_supported() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this CPU has no AVX512-VNNI")
    assert dynamic_int8_available(), "the CPU has VNNI, but torch's integer product failed its check"
    for kind in ("nf4", "fp4", "int8"):
        assert panels_available(kind), "the CPU has VNNI, but the integer product failed its check"
        linear = make_linear(random_weights([(960, 576)]), kind, torch.bfloat16, CPU, "packed")
        assert isinstance(linear, PanelLinear)
    weight = random_weights([(96, 64)])[0]
    assert isinstance(make_head(weight, "nf4", torch.bfloat16, CPU, "packed"), RoundedPanelLinear)
    for quantization, dtype in (("none", torch.bfloat16), ("nf4", torch.float32)):
        assert torch.equal(make_head(weight, quantization, dtype, CPU, "packed").dequantize(), weight)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "nf4 without nested scales", "fp4 stored as bfloat16", "int8"])
def test_checkpoints_that_transformers_quantized_and_saved(quantization: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=99, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    known: dict[str, dict[str, Any]] = {
        "nf4": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "nf4 without nested scales": {"bnb_4bit_quant_type": "nf4"},
        "fp4 stored as bfloat16": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
        "int8": {},
    }
    bits = {"load_in_8bit": True} if quantization == "int8" else {"load_in_4bit": True}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=BitsAndBytesConfig(**bits, **known[quantization]), device_map="cpu"
    )
    model.save_pretrained(tmp_path / "quantized")
    tensors = load_file(tmp_path / "quantized" / "model.safetensors")

    for names, layer in (
        (("q_proj", "k_proj", "v_proj"), "model.layers.0.self_attn."),
        (("down_proj",), "model.layers.0.mlp."),
    ):
        modules = [
            {
                name.removeprefix(f"{layer}{module}."): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{layer}{module}.")
            }
            for module in names
        ]
        linear = from_prequantized(modules, torch.float32, CPU)
        expected = [dequantized(model.get_submodule(f"{layer}{module}")) for module in names]
        assert torch.equal(linear.dequantize(), torch.cat(expected))
        x = torch.randn(3, linear.in_features)
        assert relative_error(linear(x), F.linear(x, torch.cat(expected))) < 1e-5
    head = from_prequantized([{"weight": tensors["lm_head.weight"]}], torch.float32, CPU)
    assert torch.equal(head.dequantize(), tensors["lm_head.weight"].float())


def dequantized(module) -> torch.Tensor:
    return bitsandbytes_values(import_bitsandbytes(), module)
