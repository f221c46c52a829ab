"""Merged models that are quantized again, and merges into checkpoints that are quantized already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from loraplex.adapters.bnb import import_bitsandbytes
from loraplex.adapters.errors import PreconditionError
from loraplex.adapters.merge import MergeResult
from loraplex.adapters.merge_plan import MergeBase
from loraplex.adapters.model_folder import ModelFolder
from loraplex.adapters.quantized_values import round_trip
from loraplex.server.models.loader import load_model
from tests.parity.merge_models import family_targets, logits, make_adapter, make_base, merge_adapter

METHODS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def into_dequantized(model: Path, adapter: Path, output: Path, kind: str) -> MergeResult:
    return merge_adapter(model, adapter, output, base=MergeBase.DEQUANTIZED, quantization=kind)


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Return our loader's weights of each module, (out, in) float32."""
    model = load_model(str(folder), dtype="float32")
    return {
        path: linear.dequantize()[start:end]
        for site, linear in zip(model.decoder.sites, model.decoder.linears, strict=True)
        for path, (start, end) in site.targets.items()
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nf4_is_what_bitsandbytes_makes_of_the_merged_weights(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path / "base", family)
    adapter = make_adapter(base, tmp_path / "adapter", family_targets(family))
    plain = merge_adapter(base, adapter, tmp_path / "plain")
    result = merge_adapter(base, adapter, tmp_path / "nf4", quantize="nf4", max_shard_bytes=1 << 16)
    assert result.size_bytes < plain.size_bytes / 2
    assert len(result.files) > 1
    assert 0 < result.comparison.mean_kl < 0.1
    import_bitsandbytes()
    theirs = AutoModelForCausalLM.from_pretrained(result.output, dtype=torch.float32, device_map="cpu")
    quantized = [name for name, module in theirs.named_modules() if type(module).__name__ == "Linear4bit"]
    assert len(quantized) == (14 if family == "llama" else 8)
    config = BitsAndBytesConfig(**METHODS["nf4"], llm_int8_skip_modules=["lm_head"])
    expected = AutoModelForCausalLM.from_pretrained(
        plain.output, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    assert torch.equal(logits(theirs), logits(expected))
    # And our own loader, without transformers.
    assert load_model(str(result.output)).quantization == "nf4"
    values = dequantized(plain.output)
    for path, weight in dequantized(result.output).items():
        assert torch.equal(weight, values[path] if path == "lm_head" else round_trip(values[path], "nf4")), path
    assert "| quantized again | nf4, bitsandbytes |" in (result.output / "README.md").read_text()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", METHODS)
def test_merging_into_a_quantized_checkpoint(tmp_path: Path, family: str, kind: str) -> None:
    base = make_base(tmp_path / "base", family)
    adapter = make_adapter(base, tmp_path / "adapter", family_targets(family))
    import_bitsandbytes()
    config = BitsAndBytesConfig(**METHODS[kind])
    AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).save_pretrained(tmp_path / "quantized")
    with pytest.raises(PreconditionError, match="already quantized"):
        merge_adapter(tmp_path / "quantized", adapter, tmp_path / "merged")
    other = "fp4" if kind == "int8" else "int8"
    with pytest.raises(PreconditionError, match=f"is quantized to {kind}, not to"):
        into_dequantized(tmp_path / "quantized", adapter, tmp_path / "merged", other)
    merged = into_dequantized(tmp_path / "quantized", adapter, tmp_path / "merged", kind)
    assert "quantization_config" not in json.loads((merged.output / "config.json").read_text())
    before, after = dequantized(tmp_path / "quantized"), dequantized(merged.output)
    plain = merge_adapter(base, adapter, tmp_path / "plain")
    added, originals = dequantized(plain.output), dequantized(base)
    for name, weight in after.items():
        torch.testing.assert_close(weight - before[name], added[name] - originals[name], atol=1e-5, rtol=0)
    assert any(not torch.equal(before[name], originals[name]) for name in before)


def test_rows_that_are_not_whole_blocks(tmp_path: Path) -> None:
    """Where bitsandbytes takes wrong scales on a CPU with AVX512, the stored values are still what quantizing gives."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=1, **sizes))
    model.save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", ["q_proj", "down_proj"])
    nf4 = merge_adapter(tmp_path / "base", adapter, tmp_path / "nf4", quantize="nf4")
    plain = merge_adapter(tmp_path / "base", adapter, tmp_path / "plain")
    read, weights = dequantized(nf4.output), dequantized(plain.output)
    for name, weight in weights.items():
        expected = weight if name == "lm_head" else round_trip(weight, "nf4")
        assert torch.equal(read[name], expected)
        if name != "lm_head":
            assert torch.equal(ModelFolder.open(nf4.output).read(f"{name}.weight"), expected)


def test_damaged_quantized_checkpoints_are_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])
    folder = merge_adapter(base, adapter, tmp_path / "nf4", quantize="nf4").output
    whole = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"

    def refused(match: str, **changes: torch.Tensor | None) -> None:
        tensors = {**whole, **{f"{name}{part}": tensor for part, tensor in changes.items()}}
        save_file({key: t for key, t in tensors.items() if t is not None}, folder / "model.safetensors")
        with pytest.raises(PreconditionError, match=match):
            into_dequantized(folder, adapter, tmp_path / "merged", "nf4")

    refused(f"{name} in .* damaged 4-bit weight", **{".absmax": whole[f"{name}.absmax"][:-1].clone()})
    refused("not its weight", **{"": None})
    state = ".quant_state.bitsandbytes__nf4"
    refused("is damaged", **{state: torch.tensor(list(b"{}"), dtype=torch.uint8)})
