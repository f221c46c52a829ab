from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loraplex.adapters.errors import NotFoundError, PreconditionError
from loraplex.adapters.training.architecture import CLASSIFICATION, read_architecture
from loraplex.adapters.training.known_models import KNOWN_MODELS

# As the model cards and the checkpoints' headers say; BERT's without its pre-training heads.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "phi-3-mini": 3_821_079_552,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "dialogpt-medium": 354_823_168,
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
}


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_a_known_models_parameters_are_those_published(name: str) -> None:
    if name.startswith("bert"):
        model = read_architecture(name, CLASSIFICATION)
        head = next(module for module in model.modules if module.name == model.head)
        assert model.parameters - head.weights - head.out_features == PUBLISHED[name]
    else:
        assert read_architecture(name).parameters == PUBLISHED[name]


def test_a_hub_id_of_the_table_needs_no_hub() -> None:
    model = read_architecture("meta-llama/Llama-2-7b-hf")
    assert (model.origin, model.architecture, model.head) == ("built-in table", "LlamaForCausalLM", "lm_head")
    assert (model.layers, model.key_value_width, len(model.body)) == (32, 4096, 7 * 32)


def test_a_folder_is_read_without_its_weights(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen2", hidden_size=32, intermediate_size=48, num_hidden_layers=3, vocab_size=97)
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    config.save_pretrained(tmp_path)
    model = read_architecture(str(tmp_path))
    real = AutoModelForCausalLM.from_config(config)
    assert model.parameters == sum(parameter.numel() for parameter in real.parameters())
    found = {module.name: (module.in_features, module.out_features) for module in model.modules}
    linear = {name: each for name, each in real.named_modules() if isinstance(each, torch.nn.Linear)}
    assert found == {name: (each.in_features, each.out_features) for name, each in linear.items()}
    assert all(parameter.is_meta for parameter in model.build().parameters())


def test_what_is_no_model_is_said_with_what_to_try(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="llama-2-7b"):
        read_architecture("no-such-model")
    with pytest.raises(NotFoundError, match=r"config\.json"):
        read_architecture(str(tmp_path))
    with pytest.raises(NotFoundError, match="built-in table"):
        read_architecture("some-owner/some-model")  # tests run without a hub
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(PreconditionError, match="no_such_type"):
        read_architecture(str(tmp_path))


def test_a_model_that_cannot_do_the_task_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("clip").save_pretrained(tmp_path)  # compares texts with images; it writes nothing
    with pytest.raises(PreconditionError, match="clip"):
        read_architecture(str(tmp_path))
