"""Checkpoints that bitsandbytes quantized load as they are: their weights stand for what transformers makes of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from loraplex.adapters.bnb import import_bitsandbytes
from loraplex.server.errors import ModelLoadError
from loraplex.server.models.loader import load_model
from tests.parity.tiny_models import TINY_MODELS

METHODS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "o_proj"]},
}
NAMES = ("llama-biases", "phi3-partial-rotary", "gpt2-tied")


def quantized_checkpoint(name: str, kind: str, folder: Path) -> PreTrainedModel:
    """Write a quantized tiny model to `folder`, and return it as transformers has it."""
    import_bitsandbytes()
    (tiny,) = (tiny for tiny in TINY_MODELS if tiny.name == name)
    # Wide enough for whole blocks of 64 weights in the rows of most modules. With AVX512, of all: there bitsandbytes,
    # and with it transformers, takes wrong scales for the others.
    wide = 128 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 96
    width = {"n_embd": 64} if tiny.model_type == "gpt2" else {"hidden_size": 64, "intermediate_size": wide}
    plain = folder.parent / "plain"
    dataclasses.replace(tiny, settings={**tiny.settings, **width}).save(plain)
    quantized = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=BitsAndBytesConfig(**METHODS[kind]), dtype=torch.float32, device_map="cpu"
    )
    quantized.save_pretrained(folder)
    return quantized


def their_weight(module: torch.nn.Module, conv1d: bool) -> torch.Tensor:
    """Return what a module's weight stands for, (out, in) float32."""
    weight = module.weight
    assert isinstance(weight, torch.nn.Parameter)
    if isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear:
        restored: torch.Tensor = dequantize_bnb_weight(weight, getattr(module, "state", None))
        return restored.float()
    plain = weight.detach().float()  # left unquantized
    return plain.T if conv1d else plain


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_transformers(name: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    theirs = quantized_checkpoint(name, kind, folder)
    model = load_model(str(folder), dtype="float32")
    assert model.quantization == kind
    for site, linear in zip(model.decoder.sites, model.decoder.linears, strict=True):
        for path, (start, end) in site.targets.items():
            expected = their_weight(theirs.get_submodule(path), model.base.conv1d and path != "lm_head")
            torch.testing.assert_close(linear.dequantize()[start:end], expected, rtol=1e-6, atol=1e-7)


def test_another_quantization_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    quantized_checkpoint("llama-biases", "nf4", folder)
    assert load_model(str(folder), quantization="nf4").quantization == "nf4"
    with pytest.raises(ModelLoadError, match="already quantized to nf4, which cannot become int8"):
        load_model(str(folder), quantization="int8")


def test_damaged_quantized_weights_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    quantized_checkpoint("llama-biases", "nf4", folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight.absmax"
    save_file({**tensors, name: tensors[name][:-1].clone()}, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"model\.layers\.1\.mlp\.down_proj: damaged 4-bit weight"):
        load_model(str(folder))


def test_quantized_weights_of_another_size_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    quantized_checkpoint("llama-biases", "int8", folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    shorter = {f"{name}.{part}": tensors[f"{name}.{part}"][:-1].clone() for part in ("weight", "SCB")}
    save_file({**tensors, **shorter}, folder / "model.safetensors")
    inputs, outputs = config["intermediate_size"], config["hidden_size"] - 1
    with pytest.raises(ModelLoadError, match=rf"{name} are for {inputs} inputs and {outputs} outputs"):
        load_model(str(folder))
