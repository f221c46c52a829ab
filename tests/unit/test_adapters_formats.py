"""Adapter folders: what is read, and every way in which one can be wrong."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraplex.adapters.errors import AdapterFormatError, FieldViolation
from loraplex.adapters.formats import read_adapter
from tests.adapter_factory import tensors, tiny_base, write_adapter

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def refusal(folder: Path) -> AdapterFormatError:
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(folder)
    return caught.value


def test_matrices_are_read_per_module(tmp_path: Path) -> None:
    weights = tensors(tiny_base())
    adapter = read_adapter(write_adapter(tmp_path, weights=weights))
    assert set(adapter.pairs) == {n for n in tiny_base().modules if n.endswith(("q_proj", "v_proj"))}
    pair = adapter.pairs["model.layers.0.self_attn.q_proj"]
    assert torch.equal(pair.a, weights[f"{Q0}.lora_A.weight"])
    assert torch.equal(pair.b, weights[f"{Q0}.lora_B.weight"])
    assert adapter.chat_template is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_source_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {key: tensor.to(dtype) for key, tensor in tensors(tiny_base()).items()}
    adapter = read_adapter(write_adapter(tmp_path, weights=weights))
    assert {pair.a.dtype for pair in adapter.pairs.values()} == {dtype}


def test_keys_with_the_adapters_name_are_the_same_modules(tmp_path: Path) -> None:
    weights = {key.replace(".weight", ".default.weight"): t for key, t in tensors(tiny_base()).items()}
    adapter = read_adapter(write_adapter(tmp_path, weights=weights))
    assert "model.layers.1.self_attn.v_proj" in adapter.pairs


def test_tensors_outlive_the_file(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path))
    before = {name: pair.a.clone() for name, pair in adapter.pairs.items()}
    os.truncate(tmp_path / "adapter_model.safetensors", 0)
    assert all(torch.equal(before[name], pair.a) for name, pair in adapter.pairs.items())


def test_folder_without_config(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert "adapter_config.json: is missing" in str(refusal(tmp_path))


def test_config_that_is_not_json(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("r: 8")
    assert "not valid JSON" in str(refusal(tmp_path))


def test_pickle_files_only(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({}, tmp_path / "adapter_model.bin")
    assert "adapter_model.bin is a pickle" in str(refusal(tmp_path))
    assert "safetensors" in str(refusal(tmp_path))


def test_no_weights_at_all(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: is missing" in str(refusal(tmp_path))


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    path = write_adapter(tmp_path) / "adapter_model.safetensors"
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    assert "damaged or incomplete" in str(refusal(tmp_path))


def test_huge_header(tmp_path: Path) -> None:
    path = write_adapter(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])
    assert "header of 1099511627776 bytes" in str(refusal(tmp_path))


def test_more_tensors_than_any_adapter_has(tmp_path: Path) -> None:
    weights = {f"{Q0}.{number}.lora_A.weight": torch.zeros(1, 1) for number in range(20_001)}
    assert "has 20001 tensors, so it is no adapter" in str(refusal(write_adapter(tmp_path, weights=weights)))


def test_headers_that_lie(tmp_path: Path) -> None:
    """Tensors that overlap, tensors beyond the end of the file, and one name twice."""
    path = write_adapter(tmp_path) / "adapter_model.safetensors"
    entry = '"%s": {"dtype": "F32", "shape": [4, 8], "data_offsets": [%d, %d]}'
    a, b = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
    for entries in (
        [entry % (a, 0, 128), entry % (b, 64, 192)],
        [entry % (a, 0, 128), entry % (b, 128, 1 << 50)],
        [entry % (a, 0, 128), entry % (a, 128, 256)],
        [entry % (a, 0, 127), entry % (b, 127, 256)],
        [entry.replace("4", "-4") % (a, 0, 128)],
    ):
        header = ("{" + ", ".join(entries) + "}").encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(256))
        error = refusal(tmp_path)
        assert error.violations, entries


@pytest.mark.parametrize("shape", ["[0, 4611686018427387904, 8]", "[0, 8]", "[4, 0]", "[0]"])
def test_a_tensor_without_values(tmp_path: Path, shape: str) -> None:
    path = write_adapter(tmp_path) / "adapter_model.safetensors"
    name = f"{Q0}.lora_A.weight"
    header = f'{{"{name}": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 0]}}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert refusal(tmp_path).violations == (FieldViolation(name, "has no values: one of its dimensions is 0"),)


EVERY_KIND = {
    f"{Q0}.lora_A.weight": (4, 8),
    f"{Q0}.lora_B.bias": (8,),
    f"{Q0}.lora_magnitude_vector": (8,),
    f"{Q0}.base_layer.bias": (8,),
    "base_model.model.lm_head.weight": (32, 8),
    "base_model.model.model.embed_tokens.base_layer.weight": (32, 8),
    "base_model.model.model.embed_tokens.lora_embedding_A": (4, 32),
    "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 8),
}


@pytest.mark.parametrize("key", EVERY_KIND)
def test_nan_is_refused_in_tensors_of_every_kind(tmp_path: Path, key: str) -> None:
    weights = tensors(tiny_base()) | {key: torch.ones(EVERY_KIND[key])}
    weights[key].view(-1)[-1] = float("nan")
    error = refusal(write_adapter(tmp_path, weights=weights))
    assert [v.field for v in error.violations] == [key]
    assert "NaN" in str(error)
    weights[key] = weights[key].double()
    assert "only float32, float16 and bfloat16" in str(refusal(write_adapter(tmp_path, weights=weights)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinite_weights(tmp_path: Path, value: float) -> None:
    weights = tensors(tiny_base())
    weights[f"{Q0}.lora_B.weight"][0, 0] = value
    error = refusal(write_adapter(tmp_path, weights=weights))
    assert [v.field for v in error.violations] == [f"{Q0}.lora_B.weight"]
    assert "NaN" in str(error)


def test_rank_mismatch_between_config_and_tensors(tmp_path: Path) -> None:
    error = refusal(write_adapter(tmp_path, r=8))
    assert len(error.violations) == len(tensors(tiny_base()))
    assert "has rank 4" in str(error)
    assert "gives the module rank 8" in str(error)


def test_rank_pattern_counts_for_the_tensors_rank(tmp_path: Path) -> None:
    weights = tensors(tiny_base(), ("q_proj",), rank=4) | tensors(tiny_base(), ("v_proj",), rank=2)
    folder = write_adapter(tmp_path, weights=weights, rank_pattern={"v_proj": 2})
    adapter = read_adapter(folder)
    assert adapter.spec.scaling_of("model.layers.0.self_attn.v_proj") == 4.0
    assert len(refusal(write_adapter(tmp_path, weights=weights)).violations) == 4


def test_a_without_b_and_b_without_a(tmp_path: Path) -> None:
    weights = tensors(tiny_base())
    del weights[f"{Q0}.lora_B.weight"]
    del weights[f"{Q0.replace('0', '1')}.lora_A.weight"]
    text = str(refusal(write_adapter(tmp_path, weights=weights)))
    assert f"{Q0}.lora_A.weight: has no matching lora_B" in text
    assert "has no matching lora_A" in text


def test_one_matrix_twice(tmp_path: Path) -> None:
    weights = tensors(tiny_base())
    weights[f"{Q0}.lora_A.default.weight"] = weights[f"{Q0}.lora_A.weight"].clone()
    assert "is the same tensor as" in str(refusal(write_adapter(tmp_path, weights=weights)))


def test_no_tensors(tmp_path: Path) -> None:
    assert "holds no LoRA matrices" in str(refusal(write_adapter(tmp_path, weights={})))


EMBEDDING = "base_model.model.model.embed_tokens"


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (f"{EMBEDDING}.lora_embedding_A", "no matching lora_embedding_B"),
        (f"{EMBEDDING}.lora_embedding_B", "no matching lora_embedding_A"),
        (f"{Q0}.lora_magnitude_vector", "use_dora is not set"),
        (f"{Q0}.lora_B.bias", "lora_bias is not set"),
        (f"{Q0.replace('q_proj', 'o_proj')}.lora_B.bias", "no LoRA matrices beside it"),
        (f"{Q0}.base_layer.bias", "neither bias nor modules_to_save"),
        ("base_model.model.model.norm.bias", "neither bias nor modules_to_save"),
        (f"{Q0}.lora_diag", "not a tensor that LoRA has"),
        (f"{Q0}.lora_E", "not a tensor that LoRA has"),
        (f"{Q0}.base_layer.lora_A.weight", "not a tensor that LoRA has"),
        (f"{Q0}.base_layer.weight.absmax", "not a tensor that LoRA has"),
        (f"{EMBEDDING}.token_adapter.trainable_tokens_original", "not a tensor that LoRA has"),
        ("base_model.vera_A", "not a tensor that LoRA has"),
        ("prompt_embeddings", "not a tensor that LoRA has"),
        (f"{'x.' * 300}lora_A.weight", "not a tensor that LoRA has"),
    ],
)
def test_tensors_without_a_meaning_are_refused_by_name(tmp_path: Path, key: str, reason: str) -> None:
    weights = tensors(tiny_base()) | {key: torch.zeros(4, 4)}
    error = refusal(write_adapter(tmp_path, weights=weights))
    assert [v.field for v in error.violations] == [key]
    assert reason in str(error)


VECTORS = [f"{Q0.replace('0', str(layer))}.lora_magnitude_vector" for layer in range(2)]


def dora_weights() -> dict[str, torch.Tensor]:
    weights = tensors(tiny_base(), ("q_proj",))
    return weights | {key: torch.ones(8) for key in VECTORS}


def test_every_module_of_a_dora_adapter_has_a_magnitude(tmp_path: Path) -> None:
    weights = dora_weights()
    adapter = read_adapter(write_adapter(tmp_path, weights=weights, target_modules=["q_proj"], use_dora=True))
    magnitude = adapter.pairs["model.layers.0.self_attn.q_proj"].magnitude
    assert magnitude is not None
    assert magnitude.key == VECTORS[0]
    del weights[VECTORS[1]]
    weights[VECTORS[0]] = torch.ones(7)
    error = refusal(write_adapter(tmp_path, weights=weights, target_modules=["q_proj"], use_dora=True))
    assert "has shape (7,), but B has 8 rows" in str(error)
    assert "has no lora_magnitude_vector beside it, though use_dora is set" in str(error)


def test_dora_on_an_embedding_is_refused_by_name(tmp_path: Path) -> None:
    weights = dora_weights() | {
        f"{EMBEDDING}.lora_embedding_A": torch.ones(4, 32),
        f"{EMBEDDING}.lora_embedding_B": torch.ones(8, 4),
        f"{EMBEDDING}.lora_magnitude_vector": torch.ones(8),
    }
    error = refusal(write_adapter(tmp_path, weights=weights, use_dora=True))
    assert [v.field for v in error.violations] == [f"{EMBEDDING}.lora_magnitude_vector"]
    assert "DoRA magnitude on an embedding" in str(error)


def test_the_bias_of_a_module_without_lora_contradicts_lora_only(tmp_path: Path) -> None:
    weights = tensors(tiny_base()) | {f"{Q0.replace('q_proj', 'o_proj')}.bias": torch.zeros(8)}
    assert "without LoRA, though bias is 'lora_only'" in str(
        refusal(write_adapter(tmp_path, weights=weights, bias="lora_only"))
    )


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.lm_head.weight",
        "base_model.model.lm_head.modules_to_save.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
        "lm_head.weight",
    ],
)
def test_layouts_of_a_module_trained_whole(tmp_path: Path, key: str) -> None:
    weights = tensors(tiny_base()) | {key: torch.ones(32, 8)}
    adapter = read_adapter(write_adapter(tmp_path, weights=weights, modules_to_save=["lm_head"]))
    assert adapter.parameters["lm_head.weight"].key == key
    assert read_adapter(write_adapter(tmp_path, weights=weights)).base_copies["lm_head.weight"].key == key


def test_a_module_trained_whole_may_be_there_twice_if_both_are_the_same(tmp_path: Path) -> None:
    first, second = "base_model.model.lm_head.modules_to_save.weight", "base_model.model.lm_head.weight"
    weights = tensors(tiny_base()) | {first: torch.ones(32, 8), second: torch.ones(32, 8)}
    adapter = read_adapter(write_adapter(tmp_path, weights=weights, modules_to_save=["lm_head"]))
    assert adapter.repeated == {second: "lm_head.weight"}
    weights[second][0, 0] = 2
    error = refusal(write_adapter(tmp_path, weights=weights, modules_to_save=["lm_head"]))
    assert f"{second}: is the same tensor as {first}" in str(error)


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "module.base_model.model.", "_orig_mod.base_model.model."])
@pytest.mark.parametrize("adapter_name", ["", ".default", ".sql"])
def test_layouts_of_old_files(tmp_path: Path, prefix: str, adapter_name: str) -> None:
    module = "model.layers.0.self_attn.q_proj"
    weights = {
        f"{prefix}{module}.lora_A{adapter_name}.weight": torch.ones(4, 8),
        f"{prefix}{module}.lora_B{adapter_name}.weight": torch.ones(8, 4),
        f"{prefix}{module}.lora_magnitude_vector{adapter_name}{'.weight' if adapter_name else ''}": torch.ones(8),
    }
    adapter = read_adapter(write_adapter(tmp_path, weights=weights, use_dora=True))
    assert set(adapter.pairs) == {module}
    assert adapter.pairs[module].magnitude is not None
    embedding = {
        f"{prefix}model.embed_tokens.lora_embedding_A{adapter_name}": torch.ones(4, 32),
        f"{prefix}model.embed_tokens.lora_embedding_B{adapter_name}": torch.ones(8, 4),
    }
    adapter = read_adapter(write_adapter(tmp_path, weights=embedding))
    assert adapter.embeddings["model.embed_tokens"].a.shape == (4, 32)
    assert (adapter.rank, adapter.target_modules) == (4, ("embed_tokens",))


def test_dtypes_that_are_no_floats(tmp_path: Path) -> None:
    weights = {key: tensor.to(torch.int8) for key, tensor in tensors(tiny_base()).items()}
    assert "only float32, float16 and bfloat16" in str(refusal(write_adapter(tmp_path, weights=weights)))


def test_matrices_with_other_than_two_dimensions(tmp_path: Path) -> None:
    weights = tensors(tiny_base())
    weights[f"{Q0}.lora_A.weight"] = torch.zeros(4)
    assert "not two dimensions" in str(refusal(write_adapter(tmp_path, weights=weights)))


def test_one_adapter_in_two_layouts_of_the_file_has_one_digest(tmp_path: Path) -> None:
    weights = tensors(tiny_base())
    one = write_adapter(tmp_path / "one", weights=weights)
    two = write_adapter(tmp_path / "two", weights=dict(reversed(weights.items())))
    save_file(weights, two / "adapter_model.safetensors", metadata={"made": "elsewhere"})
    assert read_adapter(one).digest == read_adapter(two).digest
