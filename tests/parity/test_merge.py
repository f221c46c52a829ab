"""Merged folders against PEFT's `merge_and_unload`, on tiny random Llama and GPT-2 models."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loraplex.adapters import merge
from loraplex.adapters.binding import BoundAdapter, ModuleWeights, bind
from loraplex.adapters.bnb import import_bitsandbytes
from loraplex.adapters.errors import (
    AdapterFormatError,
    AlreadyExistsError,
    InvalidRequestError,
    PreconditionError,
    ResourceExhaustedError,
)
from loraplex.adapters.formats import read_adapter
from loraplex.adapters.merge import AdapterSource, MergeOptions, MergeResult, Progress, merge_adapters
from loraplex.adapters.merge_methods import MergeMethod, Mixing
from loraplex.adapters.merge_plan import MergeBase
from loraplex.adapters.model_folder import ModelFolder
from loraplex.adapters.quantized_values import round_trip

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_TARGETS = ["c_attn", "c_proj", "c_fc"]
IDS = torch.arange(24).reshape(2, 12)


def make_base(folder: Path, family: str, *, tied: bool = True, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
    torch.manual_seed(0)
    model: Any
    if family == "llama":
        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_key_value_heads": 2,
        }
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=96, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=tied, **sizes)
        )
    else:
        shape: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=96, tie_word_embeddings=tied, **shape))
    # Norms and biases away from their initial ones and zeros, so that losing one is seen.
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, **save)
    return folder


def make_adapter(base: Path, folder: Path, targets: Sequence[str], **options: Any) -> Path:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=8, lora_alpha=12, target_modules=list(targets), task_type="CAUSAL_LM", **options),
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found.float()


def merge_adapter(
    model: Path,
    adapter: Path | BoundAdapter,
    output: Path,
    *,
    scale: float = 1.0,
    progress: Progress = lambda phase, done, total: None,
    **options: Any,
) -> MergeResult:
    return merge_adapters(model, [AdapterSource(adapter, scale)], output, MergeOptions(**options), progress)


def family_targets(family: str) -> list[str]:
    return LLAMA_TARGETS if family == "llama" else GPT2_TARGETS


def assert_same_weights(ours: Any, theirs: Any, tolerance: float) -> None:
    left, right = ours.state_dict(), theirs.state_dict()
    assert set(left) == set(right)
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], atol=tolerance, rtol=0)


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


def test_merging_into_what_does_not_fit(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    other = make_base(tmp_path / "other", "gpt2")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])
    with pytest.raises(PreconditionError, match="no linear module"):
        merge_adapter(other, adapter, tmp_path / "merged")
    with pytest.raises(PreconditionError, match="not the adapter's base model"):
        merge_adapter(other, bind(read_adapter(adapter), ModelFolder.open(base).base_model()), tmp_path / "merged")
    wide = ModuleWeights(torch.zeros(2, 65), torch.zeros(64, 2), 1.0)
    with pytest.raises(PreconditionError, match="64 inputs and 64 outputs"):
        merge_adapter(base, BoundAdapter("d", {"model.layers.0.self_attn.q_proj": wide}), tmp_path / "merged")
    with pytest.raises(AdapterFormatError):
        merge_adapter(base, tmp_path, tmp_path / "merged")


@pytest.mark.parametrize("where", ["adapter", "base", "overflow"])
def test_nan_is_refused_and_leaves_nothing(tmp_path: Path, where: str) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])
    bound = bind(read_adapter(adapter), ModelFolder.open(base).base_model())
    dtype, name = None, "model.layers.1.self_attn.q_proj"
    if where == "adapter":
        bound.modules[name].b[0, 0] = float("nan")
    else:
        weights = load_file(base / "model.safetensors")
        changed = f"{name}.weight" if where == "base" else "model.norm.weight"
        weights[changed].view(-1)[0] = float("nan") if where == "base" else 1e30
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        dtype = None if where == "base" else torch.float16
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PreconditionError, match="NaN or infinite"):
        merge_adapter(base, bound, tmp_path / "merged", dtype=dtype)
    assert sorted(tmp_path.iterdir()) == before


def test_outputs_that_exist_are_not_touched(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])
    (tmp_path / "merged").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("merged", "dangling"):
        with pytest.raises(AlreadyExistsError):
            merge_adapter(base, adapter, tmp_path / name)

    def interfere(phase: str, done: int, total: int) -> None:
        (tmp_path / "late").mkdir(exist_ok=True)
        (tmp_path / "late" / "mine").touch()

    with pytest.raises(AlreadyExistsError):
        merge_adapter(base, adapter, tmp_path / "late", progress=interfere)
    assert [path.name for path in (tmp_path / "late").iterdir()] == ["mine"]
    assert not list(tmp_path.glob(".*.partial"))


def test_a_full_disk_and_an_interruption_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])
    before = sorted(tmp_path.iterdir())

    def stop(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_adapter(base, adapter, tmp_path / "merged", progress=stop)
    assert sorted(tmp_path.iterdir()) == before
    with monkeypatch.context() as patch:
        patch.setattr(merge, "free_bytes", lambda folder: 1000)
        with pytest.raises(ResourceExhaustedError, match="needs"):
            merge_adapter(base, adapter, tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before

    def fill(phase: str, done: int, total: int) -> None:
        # The config goes to a device that is always full.
        folder = next(tmp_path.glob(".*.partial"))
        (folder / "config.json").unlink(missing_ok=True)
        (folder / "config.json").symlink_to("/dev/full")

    with pytest.raises(ResourceExhaustedError, match="disk is full"):
        merge_adapter(base, adapter, tmp_path / "merged", progress=fill)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"base": MergeBase.DEQUANTIZED}, "quantization"),
        ({"base": MergeBase.DEQUANTIZED, "quantization": "int3"}, "quantization"),
        ({"quantization": "nf4"}, "quantization"),
        ({"scale": float("nan")}, "scale"),
        ({"dtype": torch.int8}, "dtype"),
        ({"quantize": "int8"}, "quantize"),
        ({"max_shard_bytes": 0}, "max_shard_bytes"),
        ({"max_mean_kl": -1.0}, "max_mean_kl"),
        ({"mixing": Mixing(MergeMethod.TIES)}, "method"),
        ({"mixing": Mixing(density=0.5)}, "density"),
        ({"mixing": Mixing(seed=1)}, "seed"),
        ({"output": Path("absent/folder/merged")}, "output"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path: Path, arguments: dict[str, Any], field: str) -> None:
    output = tmp_path / arguments.pop("output", "merged")
    with pytest.raises(InvalidRequestError, match=field):
        merge_adapter(tmp_path, tmp_path, output, **arguments)


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter", ["q_proj"])

    def refused(match: str) -> None:
        with pytest.raises(PreconditionError, match=match):
            merge_adapter(base, adapter, tmp_path / "merged")

    config = (base / "config.json").read_text()
    (base / "config.json").write_text(json.dumps(json.loads(config) | {"quantization_config": {"load_in_4bit": True}}))
    refused("already quantized")
    (base / "config.json").write_text(config)
    os.truncate(base / "model.safetensors", 1000)
    refused("damaged")
    (base / "model.safetensors").unlink()
    refused("only safetensors can be merged")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    refused("does not name the files")
    shutil.rmtree(base)
    refused("cannot be read")


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
