"""Loading a base model: what is refused and how it is said, and what stays the same however a checkpoint is stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.server.errors import ModelLoadError
from loraplex.server.models import linear
from loraplex.server.models.compute_dtype import compute_dtype
from loraplex.server.models.families import FAMILIES
from loraplex.server.models.loader import LoadedModel, load_model

LAYER = "model.layers.1"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def llama_tensors() -> dict[str, torch.Tensor]:
    """The weights that CONFIG describes."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, 16), "lm_head.weight": (40, 16)}
    for index in range(2):
        layer = f"model.layers.{index}"
        for name, shape in {
            "input_layernorm": (16,),
            "post_attention_layernorm": (16,),
            "self_attn.q_proj": (16, 16),
            "self_attn.k_proj": (8, 16),
            "self_attn.v_proj": (8, 16),
            "self_attn.o_proj": (16, 16),
            "mlp.gate_proj": (24, 16),
            "mlp.up_proj": (24, 16),
            "mlp.down_proj": (16, 24),
        }.items():
            shapes[f"{layer}.{name}.weight"] = shape
    shapes["model.norm.weight"] = (16,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good model, for a test to break."""
    path = tmp_path / "tiny-llama"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(llama_tensors(), path / "model.safetensors")
    return path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(str(folder), dtype="float32", **options)


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(folder, **options)
    return str(caught.value)


def test_a_good_model(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = load(folder, progress=lambda done, total: seen.append((done, total)))
    assert (model.architecture, model.max_model_len, model.eos_token_ids, model.vocab_size) == (
        "LlamaForCausalLM",
        32,
        (2,),
        40,
    )
    assert (model.base.name, model.path, model.dtype) == ("tiny-llama", folder, torch.float32)
    assert model.weight_bytes == sum(tensor.nbytes for tensor in llama_tensors().values())
    assert seen[-1][0] == seen[-1][1] == sum(tensor.numel() for tensor in llama_tensors().values())
    assert seen == sorted(seen)
    down = model.base.modules[f"{LAYER}.mlp.down_proj"]
    assert (down.in_features, down.out_features) == (24, 16)
    assert [site.name for site in model.decoder.sites[-3:]] == ["layers.1.gate_up", "layers.1.down", "lm_head"]
    assert model.decoder.sites[4].targets[f"{LAYER}.self_attn.v_proj"] == (24, 32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "unknown architecture BertForMaskedLM"),
        ({"architectures": None, "model_type": "bert"}, "unknown architecture bert"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"hidden_size": "16"}, "hidden_size must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must be a divisor"),
        ({"num_attention_heads": 3}, "hidden_size must be a multiple"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "unknown rope_type 'spiral'"),
        ({"rope_scaling": {"type": "linear"}}, "factor must be a positive number"),
        ({"rope_scaling": {"mrope_section": [2, 2]}}, "mrope_section"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized by gptq"),
        ({"attention_bias": True}, "lacks tensors that its config.json asks for: model.layers.0.self_attn.k_proj.bias"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_configurations_that_are_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    edit_config(folder, **changes)
    assert said in refusal(folder)


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("GemmaForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("Gemma2ForCausalLM", {"layer_types": ["chunked_attention"] * 26}, "layer_types"),
        ("Gemma2ForCausalLM", {"sliding_window": None}, "sliding_window must be a positive integer"),
        ("GPT2LMHeadModel", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("GPT2LMHeadModel", {"activation_function": "swiglu"}, "hidden_act"),
        ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention"] * 32}, "use_sliding_window"),
        (
            "Phi3ForCausalLM",
            {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
            "48 positive",
        ),
    ],
)
def test_options_that_families_refuse(architecture: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelLoadError, match=said):
        FAMILIES[architecture].read(changes)


def test_unknown_architectures_are_answered_with_the_known_ones(folder: Path) -> None:
    edit_config(folder, architectures=["BertForMaskedLM"])
    assert all(name in refusal(folder) for name in FAMILIES)


def test_old_configurations_without_architectures_load(folder: Path) -> None:
    edit_config(folder, architectures=None)
    assert load(folder).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(f"{LAYER}.mlp.up_proj.weight"), f"lacks tensors.*{LAYER}.mlp.up_proj.weight"),
        (lambda t: t.pop("lm_head.weight"), "lacks tensors.*lm_head.weight"),
        (lambda t: t.update({f"{LAYER}.mlp.up_proj.bias": torch.ones(24)}), "does not have.*mlp.up_proj.bias"),
        (lambda t: t.update({"model.norm.weight": torch.ones(17)}), "model.norm.weight is 17 instead of 16"),
        (lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}), r"model.norm.weight \(I8\)"),
    ],
)
def test_tensors_that_are_refused(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], said: str) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(ModelLoadError, match=said):
        load(folder)


def test_tensors_without_use_are_skipped(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    load(folder)


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json is missing" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


def test_pickles_are_never_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(folder)
    assert "save_pretrained" in refusal(folder)


def test_adapter_folder(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter, not a base model" in refusal(folder)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refusal(folder)


@pytest.mark.parametrize("size", [0, 5, 400, -100])
def test_truncated_weights(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "model.safetensors is damaged or incomplete" in refusal(folder)


def shard(folder: Path, parts: int = 3) -> None:
    """Divide the weights into files so that the parts of packed products lie apart."""
    tensors = load_file(folder / "model.safetensors")
    names = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    weight_map = {name: names[i % parts] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: tensors[n].clone() for n in tensors if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "names files that are missing: model-00002-of-00003.safetensors" in refusal(folder)


def test_index_that_leaves_the_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "outside its folder" in refusal(folder)


def test_index_that_names_unknown_tensors(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert "names tensors that no file holds: a" in refusal(folder)


def test_fingerprint_is_the_content(folder: Path, tmp_path: Path) -> None:
    first = load(folder).base.fingerprint
    assert first.startswith("sha256:")
    assert len(first) == 71
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    shard(moved)
    edit_config(moved, transformers_version="4.0", rms_norm_eps=1e-6, attention_bias=False)
    assert load(moved).base.fingerprint == first
    edit_config(moved, rms_norm_eps=1e-5)
    assert load(moved).base.fingerprint != first
    edit_tensors(folder, lambda t: t["model.norm.weight"][3].add_(1e-6))
    assert load(folder).base.fingerprint != first


def weights_of(model: LoadedModel) -> torch.Tensor:
    return model.decoder.linears[-1].dequantize()


def test_tied_embeddings_need_one_matrix(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    tensors = llama_tensors()
    # Different matrices are not tied, whatever the configuration says: so does transformers.
    assert torch.equal(weights_of(load(folder)), tensors["lm_head.weight"])
    edit_tensors(folder, lambda t: t.pop("lm_head.weight"))
    one = load(folder)
    assert torch.equal(weights_of(one), tensors["model.embed_tokens.weight"])
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(weights_of(load(folder)), tensors["model.embed_tokens.weight"])


def test_tied_embeddings_are_counted_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As they are where nothing rearranges them: float32 without oneDNN.
    monkeypatch.setattr(linear, "_can_prepack", lambda: False)
    apart = load(folder).weight_bytes
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, lambda t: t.pop("lm_head.weight"))
    assert load(folder).weight_bytes == apart - 4 * 40 * 16
    # bfloat16 is looked up in, but the logits come from a float32 copy.
    as_bf16 = load_model(str(folder), dtype="bfloat16").weight_bytes
    edit_config(folder, tie_word_embeddings=False)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    assert load_model(str(folder), dtype="bfloat16").weight_bytes == as_bf16


def test_names_without_the_model_prefix(folder: Path) -> None:
    before = load(folder).base.fingerprint
    edit_tensors(
        folder, lambda t: [t.update({name.removeprefix("model."): t.pop(name)}) for name in list(t) if "model." in name]
    )
    assert load(folder).base.fingerprint == before


@pytest.mark.parametrize(
    ("stored", "expected"), [({"eos_token_id": [5, 6]}, (5, 6)), ({"eos_token_id": 7}, (7,)), ({}, (2,))]
)
def test_eos_tokens(folder: Path, stored: dict[str, Any], expected: tuple[int, ...]) -> None:
    (folder / "generation_config.json").write_text(json.dumps(stored))
    assert load(folder).eos_token_ids == expected


def test_context_asked_for(folder: Path) -> None:
    assert load(folder, max_model_len=20).max_model_len == 20
    assert "33 tokens was asked for; the model's positions end at 32" in refusal(folder, max_model_len=33)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("no/such/folder", "no such folder"),
        ("./missing", "no such folder"),
        ("missing.gguf", "no such GGUF file"),
        ("nobody/nothing", "neither a folder here nor in the hub's cache"),
    ],
)
def test_models_that_are_nowhere(model: str, said: str) -> None:
    with pytest.raises(ModelLoadError, match=said):
        load_model(model)


def test_gguf_files_are_converted_first(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no GGUF at all")
    with pytest.raises(ModelLoadError, match="is not a GGUF file"):
        load_model(str(path))


def test_a_file_is_no_model(folder: Path) -> None:
    assert "is a file" in refusal(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["float16", "int4"])
def test_dtypes_that_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(ModelLoadError, match=name):
        load_model(str(folder), dtype=name)


def test_unknown_quantization(folder: Path) -> None:
    assert "int3" in refusal(folder, quantization="int3")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fma avx2", torch.float32), ("avx2 avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16)],
)
def test_dtype_auto_follows_the_cpu(tmp_path: Path, flags: str, expected: torch.dtype) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert compute_dtype("auto", torch.device("cpu"), info) == expected
    assert compute_dtype("auto", torch.device("cpu"), tmp_path / "none") == torch.float32
