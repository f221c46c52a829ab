"""The model of a GPU's step against other sources, and what is printed and written of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from loraplex.bench.charts import draw_gpu
from loraplex.bench.gpu.__main__ import NO_GPU, main
from loraplex.bench.gpu.cards import CARDS
from loraplex.bench.gpu.document import card_of, table
from loraplex.bench.gpu.nf4 import dequantize, quantize
from loraplex.bench.gpu.random_model import config_values
from loraplex.bench.gpu.step_model import (
    DIVIDED_OUTPUTS,
    LAYER_LAUNCHES,
    SHAPES,
    TARGET_STEPS,
    DecoderShape,
    StepKind,
    model_document,
    step_work,
)
from loraplex.bench.gpu.targets import TARGETS
from loraplex.bench.performance_page import PERFORMANCE_PARTS, fill
from loraplex.server.models.activations import make_activation
from loraplex.server.models.four_bit import FourBitMatrix
from loraplex.server.models.norms import RmsNorm
from loraplex.server.models.rotary import TorchRotation
from tests.unit.command import Run, ok

LLAMA, H100 = SHAPES["llama-3.1-8b"], CARDS["h100"]
PAGE = Path(__file__).parents[2] / "docs" / "PERFORMANCE.md"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=lambda shape: shape.name)
def test_weights_are_those_that_transformers_builds(shape: DecoderShape) -> None:
    family = "qwen3" if shape.architecture.startswith("Qwen3") else "llama"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config_values(shape, 4096)))
    linears = {name: m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    head = linears.pop("lm_head")
    assert shape.layer_weights == sum(weight.numel() for weight in linears.values())
    assert head.shape == (shape.vocab, shape.hidden)
    adapter = sum(16 * sum(weight.shape) for weight in linears.values())
    assert shape.adapter_bytes(16) == 2 * adapter


def test_bytes_are_those_that_were_counted_by_hand() -> None:
    """PEERS' figures for an H100: NF4 4.65 to 4.98 GB, bfloat16 15.0, 32 all-linear adapters of rank 16 2.7."""
    work = step_work(LLAMA, TARGET_STEPS["32 rows, 32 adapters of rank 16"])
    assert work.weights == pytest.approx(4.98e9, rel=0.01)
    assert work.adapters == pytest.approx(2.7e9, rel=0.01)
    assert work.cache == 32 * 512 * 2 * 2 * 32 * 1024
    assert step_work(LLAMA, StepKind(1, weights="bfloat16")).weights == pytest.approx(15.0e9, rel=0.01)
    assert step_work(LLAMA, StepKind(1)).bound_ms(H100) == pytest.approx(1.66, rel=0.02)


def test_many_rows_are_bound_by_products() -> None:
    few, many = step_work(LLAMA, StepKind(8, context=1)), step_work(LLAMA, StepKind(4096, context=1))
    assert few.bound_ms(H100) == pytest.approx(1e3 * few.nbytes / H100.reached_bytes_s)
    assert many.bound_ms(H100) == pytest.approx(1e3 * many.flop / H100.flop_s)


def test_adapters_cost_launches_only_where_they_may_act() -> None:
    base, few, every = (
        step_work(LLAMA, TARGET_STEPS[name]).launches
        for name in ("32 rows", "32 rows, 32 adapters of rank 8 on q and v", "32 rows, 32 adapters of rank 16")
    )
    assert (few - base, every - base) == (2 * 32, 2 * 4 * 32)


class Calls(TorchFunctionMode):
    """Keeps what torch is asked to compute; looking at a tensor, and views of it, launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in ("__get__", "chunk"):
            self.made.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_layers_launches_are_those_of_its_parts() -> None:
    """What is fused one day is counted as one then. test_triton_attention counts the kernels of attention."""
    products, attention = 4, 3
    norm, gate = RmsNorm(torch.ones(64), 1e-6), make_activation("silu", torch.device("cuda"), gated=True)
    rotation = TorchRotation(*torch.randn(2, 2, 1, 16))
    x, delta, heads = torch.randn(2, 64), torch.randn(2, 64), torch.randn(2, 3, 16)
    with Calls() as calls:
        norm.add(x, delta)
        norm.add(x, delta)
        rotation.apply(heads)
        gate(x)
    assert len(calls.made) + products + attention == LAYER_LAUNCHES, calls.made


@pytest.mark.parametrize("outputs", [64, 8448, 8449, 28672])
def test_the_sums_of_narrow_4_bit_products_are_divided(outputs: int) -> None:
    pytest.importorskip("triton")
    from loraplex.server.models.triton_four_bit import HALF, OUTPUTS, PackedFourBit

    codes = torch.empty(-(-outputs // OUTPUTS), 32, OUTPUTS, HALF, dtype=torch.uint8, device="meta")
    splits, _ = PackedFourBit(codes, torch.empty(0), (outputs, 4096)).splits
    assert (splits > 1) == (outputs <= DIVIDED_OUTPUTS)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L4", "l4"),
        ("something else", "h100"),
    ],
)
def test_a_drivers_name_means_a_card(name: str, card: str) -> None:
    assert card_of(name) is CARDS[card]


def test_nf4_is_bitsandbytes_own() -> None:
    weight = torch.randn(96, 128)
    found, expected = quantize(weight), FourBitMatrix.quantize(weight, "nf4")
    assert torch.equal(found.codes, expected.codes)
    assert torch.allclose(found.absmax, expected.absmax, rtol=0.02), "theirs are quantized themselves"
    scaled = FourBitMatrix("nf4", 64, expected.shape, found.codes, found.absmax)
    assert torch.equal(dequantize(found), scaled.dequantize())
    with pytest.raises(ValueError, match="multiple of 64"):
        quantize(weight[:, :100])


def test_without_a_gpu_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for what in ("check", "bench"):
        monkeypatch.setattr("sys.argv", ["gpu", what])
        assert main() == NO_GPU
        assert "there is no GPU here" in capsys.readouterr().err


def document() -> dict[str, Any]:
    figures = {target.key: target.value for target in TARGETS}
    return figures | {
        "commit": "abc",
        "command": "make gpu-bench",
        "device": "NVIDIA H100 80GB HBM3",
        "model": LLAMA.name,
        "nf4_product": "TritonFourBitLinear",
        "steps_ms": {"1 row": 3.0, "32 rows": 4.0},
        "modelled": model_document(LLAMA, H100),
    }


def test_the_page_tells_measured_from_modelled(tmp_path: Path) -> None:
    page = PAGE.read_text()
    assert fill(page, {"gpu-model": model_document(LLAMA, H100)}, PERFORMANCE_PARTS) == page, "run fill_performance.py"
    filled = fill(page, {"gpu": document()}, PERFORMANCE_PARTS)
    assert "| step, 1 row, base NF4 | <= 3.2 ms | 2.60 | 3.20 ms |" in filled
    assert "`make gpu-bench` at abc on NVIDIA H100 80GB HBM3" in filled
    draw_gpu(document(), tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    missed = document() | {"over_peft": 2.0}
    lines = list(table(missed))
    assert len(lines) == 2 + len(TARGETS)
    assert [line.endswith("missed") for line in lines].count(True) == 1


def test_a_plan_for_a_card(run: Run) -> None:
    options = ("--sequences", 32, "--context", 512, "--adapters", 8, "--device", "h100", "--length", 8)
    shown = ok(run("plan", "smollm2-135m", *options))
    weights = (106_168_320 * 0.5625 + 28_311_552 * 2) / 1e9
    for text in ("modelled, not measured", f"{weights:.2f} GB", "32 rows, 8 adapters of rank 16, NF4", "3.02 TB/s"):
        assert text in shown
    assert run("plan", "smollm2-135m", "--device", "h1000").exit_code == 2
    assert run("plan", "gpt2", "--device", "h100").exit_code == 2
