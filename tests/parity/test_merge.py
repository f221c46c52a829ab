"""Merged folders against PEFT's `merge_and_unload`, on tiny random Llama and GPT-2 models."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from loraplex.adapters.binding import bind
from loraplex.adapters.bnb import import_bitsandbytes
from loraplex.adapters.formats import read_adapter
from loraplex.adapters.merge_plan import MergeBase
from loraplex.adapters.model_folder import ModelFolder
from loraplex.adapters.quantized_values import round_trip
from tests.parity.merge_models import (
    GPT2_TARGETS,
    LLAMA_TARGETS,
    assert_same_weights,
    family_targets,
    load,
    logits,
    make_adapter,
    make_base,
    merge_adapter,
)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {r"layers\.1\..*": 4, "c_fc": 3}, "alpha_pattern": {"q_proj": 3, "h.0.attn.c_attn": 5}},
    ],
)
def test_merged_weights_are_pefts(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base", family)
    adapter = make_adapter(base, tmp_path / "adapter", family_targets(family), **options)
    result = merge_adapter(base, adapter, tmp_path / "merged")
    expected = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    merged = load(result.output)
    assert_same_weights(merged, expected, 1e-5)
    assert (logits(merged) - logits(load(base))).abs().max() > 1e-2
    assert result.parameters == (14 if family == "llama" else 8)
    assert result.dtype == torch.float32
    assert result.base is MergeBase.FULL_PRECISION


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_lm_head_leaves_the_embedding_alone(tmp_path: Path, family: str, tied: bool) -> None:
    base = make_base(tmp_path / "base", family, tied=tied)
    adapter = make_adapter(base, tmp_path / "adapter", [*family_targets(family), "lm_head"])
    result = merge_adapter(base, adapter, tmp_path / "merged")
    # PEFT's merge would change a tied embedding too; the unmerged model is what a server computes.
    unmerged = PeftModel.from_pretrained(load(base), adapter).eval()
    merged = load(result.output)
    assert (logits(merged) - logits(unmerged)).abs().max() < 1e-4
    assert json.loads((result.output / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(merged.get_input_embeddings().weight, load(base).get_input_embeddings().weight)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_merging_into_the_dequantized_base(tmp_path: Path, family: str, quantization: str) -> None:
    base = make_base(tmp_path / "base", family, dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", family_targets(family)[1:2])
    result = merge_adapter(base, adapter, tmp_path / "merged", base=MergeBase.DEQUANTIZED, quantization=quantization)
    assert result.dtype == torch.float32
    functional = import_bitsandbytes().functional
    plain = load(base)
    for name, parameter in plain.named_parameters():
        if parameter.dim() == 2 and (".layers." in name or ".h." in name):
            weight = (parameter.data.t() if family == "gpt2" else parameter.data).contiguous()
            if quantization == "int8":
                rows = weight.abs().amax(dim=1, keepdim=True)
                weight = torch.round(weight * (127.0 / rows)) * rows / 127.0
            else:
                packed, state = functional.quantize_4bit(weight, quant_type=quantization, compress_statistics=True)
                weight = functional.dequantize_4bit(packed, state)
            assert not torch.equal(weight, parameter.data)
            parameter.data = weight.t() if family == "gpt2" else weight
    expected = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    assert_same_weights(load(result.output), expected, 1e-5)


def test_a_quantized_lm_head_is_not_part_of_the_dequantized_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", tied=False)
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])
    result = merge_adapter(base, adapter, tmp_path / "m", base=MergeBase.DEQUANTIZED, quantization="nf4")
    ours, theirs = load_file(result.output / "model.safetensors"), load_file(base / "model.safetensors")
    untouched = [name for name in ours if ".layers." not in name or "norm" in name]
    assert len(untouched) == 7
    assert all(torch.equal(ours[name], theirs[name]) for name in untouched)


def test_dtypes_are_the_bases_unless_told_otherwise(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])
    kept = merge_adapter(base, adapter, tmp_path / "kept")
    half = merge_adapter(base, adapter, tmp_path / "half", dtype=torch.float16)
    for result, dtype in ((kept, torch.bfloat16), (half, torch.float16)):
        assert result.dtype == dtype
        assert {t.dtype for t in load_file(result.output / "model.safetensors").values()} == {dtype}
        config = json.loads((result.output / "config.json").read_text())
        assert config["dtype"] == str(dtype).removeprefix("torch.")
        assert "torch_dtype" not in config
    expected = PeftModel.from_pretrained(load(base), adapter).merge_and_unload().to(torch.bfloat16)
    assert_same_weights(load(kept.output, torch.bfloat16), expected, 1e-6)


def test_scale_and_a_bound_adapter(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj", "down_proj"])
    bound = bind(read_adapter(adapter), ModelFolder.open(base).base_model())
    result = merge_adapter(base, bound, tmp_path / "merged", scale=0.5)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 6}))
    expected = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    assert_same_weights(load(result.output), expected, 1e-5)
    assert result.adapter_digests == (bound.digest,)


@pytest.mark.parametrize("sharded", [True, False])
def test_shards_are_as_large_as_asked(tmp_path: Path, sharded: bool) -> None:
    base = make_base(tmp_path / "base", "llama", max_shard_size="60KB" if sharded else "5GB")
    adapter = make_adapter(base, tmp_path / "adapter", [*LLAMA_TARGETS, "lm_head"])
    seen: list[tuple[str, int, int]] = []
    output, limit = tmp_path / "merged", 100_000
    result = merge_adapter(base, adapter, output, max_shard_bytes=limit, progress=lambda *step: seen.append(step))
    names = sorted(path.name for path in output.glob("*.safetensors"))
    count = len(names)
    assert names == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] == sorted(result.files)
    sizes = [sum(tensor.nbytes for tensor in load_file(output / name).values()) for name in names]
    assert count > 1
    assert all(size <= limit for size in sizes)
    # As full as the order of the tensors allows: no two neighbours would fit in one.
    assert all(left + right > limit for left, right in itertools.pairwise(sizes))
    unmerged = PeftModel.from_pretrained(load(base), adapter).eval()
    assert (logits(load(output)) - logits(unmerged)).abs().max() < 1e-4
    index = json.loads((output / "model.safetensors.index.json").read_text())
    written = [step[1:] for step in seen if step[0] == "merging"]
    assert written == [(i + 1, len(index["weight_map"])) for i in range(len(index["weight_map"]))]
    assert index["metadata"]["total_size"] == result.size_bytes == sum(sizes)
    whole = merge_adapter(base, adapter, tmp_path / "whole")
    assert set(whole.files) == {"model.safetensors"}


def test_checkpoints_without_the_prefix(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    adapter = make_adapter(base, tmp_path / "adapter", [*GPT2_TARGETS, "lm_head"])
    unmerged = PeftModel.from_pretrained(load(base), adapter).eval()
    weights = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    result = merge_adapter(base, adapter, tmp_path / "merged")
    assert (logits(load(result.output)) - logits(unmerged)).abs().max() < 1e-4


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": "base's", "eos_token": "x"}))
    (base / "tokenizer.json").write_text("{}")
    (base / "modeling_evil.py").write_text("raise SystemExit")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])
    first = merge_adapter(base, adapter, tmp_path / "first")
    assert json.loads((first.output / "tokenizer_config.json").read_text())["chat_template"] == "base's"
    (adapter / "chat_template.jinja").write_text("the adapter's")
    second = merge_adapter(base, adapter, tmp_path / "second")
    assert (second.output / "chat_template.jinja").read_text() == "the adapter's"
    assert json.loads((second.output / "tokenizer_config.json").read_text()) == {"eos_token": "x"}
    assert sorted(path.name for path in second.output.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    card = (second.output / "README.md").read_text()
    assert second.adapter_digests[0] in card
    assert second.files["model.safetensors"] in card
    assert "quantization_config" not in (second.output / "config.json").read_text()
    again = merge_adapter(base, adapter, tmp_path / "again")
    assert again.files == second.files


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_a_second_round_trip_of_bf16_and_fp32_agrees(quantization: str) -> None:
    weight = torch.randn(48, 80, generator=torch.Generator().manual_seed(3)).bfloat16()
    once = round_trip(weight, quantization)
    assert once.dtype == torch.float32
    assert torch.equal(once, round_trip(weight.float(), quantization))
    assert torch.equal(round_trip(weight.t().contiguous().t(), quantization), once)
    relative = (once - weight.float()).norm() / weight.float().norm()
    assert relative < (0.02 if quantization == "int8" else 0.2)
    with pytest.raises(ValueError, match="quantization must be one of"):
        round_trip(weight, "none")
