"""What docs/lora.md says of a LoRA layer, of the adapters that a training run begins with, and of our merge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraplex.adapters.merge import AdapterSource, merge_adapters
from loraplex.adapters.training.frozen_base import load_base
from loraplex.adapters.training.lora_model import add_adapter, count_parameters
from loraplex.adapters.training.saved_adapter import save_adapter
from loraplex.adapters.training.train_config import TrainConfig
from tests.parity.training_setup import save_base, tiny_run

IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def make(config: TrainConfig, *, trained: bool = False) -> Any:
    """An adapter as a run begins with it, or with numbers in B as if it had been trained."""
    model = add_adapter(load_base(config, torch.device("cpu")), config, [], Path(config.output_dir))
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def layers(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_fresh_adapter_changes_nothing(base: Path, tmp_path: Path, quantization: str) -> None:
    model = make(tiny_run(base, tmp_path, quantization=quantization))
    with model.disable_adapter():
        expected = logits(model)
    assert torch.equal(logits(model), expected)


def test_a_begins_uniform_and_b_with_zeros(base: Path, tmp_path: Path) -> None:
    model = make(tiny_run(base, tmp_path, rank=32, quantization="none"))
    for layer in layers(model).values():
        a, b = layer.lora_A.default.weight.detach(), layer.lora_B.default.weight
        assert not b.any()
        # Kaiming-uniform with a = sqrt(5): the bound is sqrt(6 / ((1 + 5) k)).
        bound = 1 / math.sqrt(a.shape[1])
        assert 0.95 * bound < a.abs().max() <= bound
        assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize(("rslora", "alpha"), [(False, None), (False, 3.0), (True, 8.0)])
def test_the_layer_is_the_formula(base: Path, tmp_path: Path, rslora: bool, alpha: float | None) -> None:
    rank = 4
    model = make(tiny_run(base, tmp_path, rank=rank, alpha=alpha, use_rslora=rslora, quantization="none"), trained=True)
    expected_alpha = 2 * rank if alpha is None else alpha
    scaling = expected_alpha / (math.sqrt(rank) if rslora else rank)
    for layer in layers(model).values():
        w0, a, b = layer.base_layer.weight, layer.lora_A.default.weight, layer.lora_B.default.weight
        x = torch.randn(5, w0.shape[1], generator=torch.Generator().manual_seed(2))
        # Written out in float64, product by product, as h = W0 x + s B (A x).
        exact = x.double() @ w0.double().T + scaling * ((x.double() @ a.double().T) @ b.double().T)
        torch.testing.assert_close(layer(x).double(), exact, rtol=1e-4, atol=1e-4)


def test_the_number_of_parameters_is_r_times_d_plus_k(base: Path, tmp_path: Path) -> None:
    config = tiny_run(base, tmp_path, rank=4, rank_pattern={"v_proj": 6}, quantization="none")
    model = make(config)
    expected = dense = 0
    for name, layer in layers(model).items():
        d, k = layer.base_layer.weight.shape
        rank = 6 if name.endswith("v_proj") else 4
        expected += rank * (d + k)
        dense += d * k
    count = count_parameters(model)
    assert count.trainable == expected
    # Each layer's share is r (d + k) / (d k); at rank 4 of these small matrices about an eighth.
    assert expected / dense == pytest.approx(0.13, abs=0.03)


def test_merged_equals_unmerged(base: Path, tmp_path: Path) -> None:
    config = tiny_run(base, tmp_path, quantization="none")
    model = make(config, trained=True)
    unmerged = logits(model)
    save_adapter(model, config, tmp_path / "adapter", tmp_path / "initial")
    merge_adapters(base, [AdapterSource(tmp_path / "adapter")], tmp_path / "merged")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(ours), unmerged, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model.merge_and_unload()), unmerged, rtol=1e-4, atol=1e-4)
    # The adapter is more than noise: without it the logits are others.
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert (logits(plain) - unmerged).abs().max() > 0.1
