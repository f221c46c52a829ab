"""Plans of memory against what PyTorch's own profiler and bitsandbytes' own tensors say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.trainer.utils import add_fused_lm_head

from loraplex.adapters.errors import InvalidRequestError
from loraplex.adapters.training.architecture import CLASSIFICATION, read_architecture
from loraplex.adapters.training.training_memory import Method, TrainingShape, training_memory

SIZES = {"vocab_size": 1000, "num_hidden_layers": 3, "max_position_embeddings": 128}
LLAMA = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 1000, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}


def folder_of(tmp_path: Path, model_type: str, **settings: Any) -> Path:
    AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path / model_type)
    return tmp_path / model_type


def profiled_step(model: Any, shape: TrainingShape, causal: bool = True) -> int:
    """Run a step and return the most bytes that PyTorch's allocator gave out on top of what there was."""
    if shape.checkpointing:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": False})
    if causal:
        inner: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        add_fused_lm_head(inner, outputs=("log_probs", "entropy", "is_top1"))
    model.train()
    tokens = torch.randint(0, 1000, (shape.rows, shape.length))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    if causal:
        inputs["fused_lm_head"] = True  # type: ignore[assignment]
    else:
        inputs["labels"] = torch.zeros(shape.rows, dtype=torch.long)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(**inputs).loss.backward()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def with_lora(model: Any, shape: TrainingShape, task: str = "CAUSAL_LM") -> Any:
    config = peft.LoraConfig(
        r=shape.rank, target_modules="all-linear", lora_dropout=shape.dropout, task_type=task, lora_alpha=1
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_takes_what_the_profiler_sees(
    tmp_path: Path, model_type: str, method: Method, checkpointing: bool
) -> None:
    shape = TrainingShape(4, 96, torch.float32, checkpointing, rank=8)
    folder = folder_of(tmp_path, model_type, **(GPT2 if model_type == "gpt2" else SIZES | LLAMA))
    plan = training_memory(read_architecture(str(folder)), method, shape)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    if method == "lora":
        model = with_lora(model, shape)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert plan.trained == sum(parameter.numel() for parameter in trained)
    assert plan.weights + plan.adapters == sum(parameter.nbytes for parameter in model.parameters())
    assert plan.gradients + plan.activations == pytest.approx(profiled_step(model, shape), rel=0.05)


def test_a_classifiers_step_takes_what_the_profiler_sees(tmp_path: Path) -> None:
    shape = TrainingShape(4, 96, torch.float32, rank=8)
    settings = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
    folder = folder_of(tmp_path, "bert", **SIZES, **settings)
    plan = training_memory(read_architecture(str(folder), CLASSIFICATION), "lora", shape)
    model: Any = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))
    model = with_lora(model, shape, "SEQ_CLS")
    assert plan.gradients + plan.activations == pytest.approx(profiled_step(model, shape, causal=False), rel=0.05)


def test_gradients_of_an_earlier_pass_are_there_from_the_start(tmp_path: Path) -> None:
    model = read_architecture(str(folder_of(tmp_path, "llama", **SIZES, **LLAMA)))
    once = training_memory(model, "full", TrainingShape(4, 96, torch.float32))
    more = training_memory(model, "full", TrainingShape(4, 96, torch.float32, accumulation=2))
    assert once.total < more.total <= once.total + once.gradients


@pytest.mark.parametrize("double_quant", [False, True])
def test_four_bit_weights_take_what_bitsandbytes_makes(tmp_path: Path, double_quant: bool) -> None:
    from bitsandbytes.functional import quantize_4bit

    model = read_architecture(str(folder_of(tmp_path, "llama", **SIZES, **LLAMA | {"hidden_size": 256})))
    plan = training_memory(model, "qlora", TrainingShape(1, 8, torch.bfloat16, double_quant=double_quant))
    quantized = 0
    for module in model.body:
        packed, state = quantize_4bit(
            torch.randn(module.out_features, module.in_features).bfloat16(),
            quant_type="nf4",
            compress_statistics=double_quant,
        )
        quantized += packed.nbytes + state.absmax.nbytes
        if double_quant:
            quantized += state.state2.absmax.nbytes
    rest = model.parameters - sum(module.weights for module in model.body)
    assert plan.weights == pytest.approx(quantized + 2 * rest, rel=0.001)


def test_targets_that_miss_are_refused(tmp_path: Path) -> None:
    model = read_architecture(str(folder_of(tmp_path, "llama", **SIZES, **LLAMA)))
    with pytest.raises(InvalidRequestError, match="target_modules"):
        training_memory(model, "lora", TrainingShape(1, 8, targets=("c_attn",)))
