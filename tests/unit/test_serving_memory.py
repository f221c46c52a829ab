"""Plans of a server's memory against what the server itself allocates."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loraplex.adapters.training.architecture import read_architecture
from loraplex.adapters.training.serving_memory import QUANTIZATIONS, Quantization, ServingShape, serving_memory
from loraplex.server.config import EngineConfig
from loraplex.server.engine.kv_cache import KVCache
from loraplex.server.engine.limits import kv_cache_shape
from loraplex.server.models.loader import load_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = AutoConfig.for_model(
        "llama",
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=request.param,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "float32")
    model.to(torch.bfloat16).save_pretrained(folder / "bfloat16")
    return folder


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_take_what_the_loaded_model_takes(folder: Path, quantization: Quantization, dtype: str) -> None:
    shape = ServingShape(dtype=getattr(torch, dtype), on_cpu=True)
    plan = serving_memory(read_architecture(str(folder / dtype)), quantization, shape)
    loaded = load_model(str(folder / dtype), quantization=quantization, dtype=dtype, weight_execution="packed")
    assert plan.weights == pytest.approx(loaded.weight_bytes, rel=0.05)


def test_the_cache_takes_what_the_server_allocates(folder: Path) -> None:
    shape = ServingShape(sequences=3, context=50, dtype=torch.bfloat16)
    plan = serving_memory(read_architecture(str(folder / "bfloat16")), "none", shape)
    loaded = load_model(str(folder / "bfloat16"), dtype="bfloat16")
    cache = KVCache(kv_cache_shape(loaded, EngineConfig()), 3 * 4, CPU)  # 50 tokens are four blocks of 16
    assert plan.kv_cache == sum(layer.k.nbytes + layer.v.nbytes for layer in cache.layers)


def test_adapters_take_their_own_ranks(folder: Path) -> None:
    model = read_architecture(str(folder / "bfloat16"))
    real = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "bfloat16"),
        peft.LoraConfig(r=8, target_modules="all-linear", rank_pattern={"down_proj": 4}),
    )
    trained = sum(parameter.numel() for parameter in real.parameters() if parameter.requires_grad)
    pattern = {module.name: 4 for module in model.body if module.leaf == "down_proj"}
    plan = serving_memory(model, "none", ServingShape(adapters=5, rank=8, rank_pattern=pattern, dtype=torch.float16))
    assert plan.adapters == 5 * 2 * trained
