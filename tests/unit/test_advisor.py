from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import yaml

from loraplex.adapters.training.advisor import Wishes, advise, advise_config
from loraplex.adapters.training.architecture import CLASSIFICATION, read_architecture
from loraplex.adapters.training.data_profile import DataProfile
from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.training_time import estimate_time


def profile(rows: int = 500, longest: int = 100) -> DataProfile:
    return DataProfile("data.jsonl", "prompt-completion", [10] * (rows - 1) + [longest], 4 * rows)


def test_advice_for_a_small_model_has_a_reason_for_each_value() -> None:
    advice = advise_config(read_architecture("smollm2-135m"), profile(), Wishes("code", output_dir="out"))
    config = advice.config
    assert (config.rank, config.alpha, config.dropout) == (32, 64, 0.1)
    assert config.rank_pattern == {"q_proj": 64, "v_proj": 64, "gate_proj": 16, "down_proj": 16}
    assert config.alpha_pattern == {"q_proj": 128, "v_proj": 128, "gate_proj": 32, "down_proj": 32}
    assert (config.learning_rate, config.lr_scheduler_type, config.warmup_ratio) == (2e-4, "cosine", 0.1)
    assert (config.max_length, config.epochs) == (128, 3)
    assert config.quantization == "none"
    assert config.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "raised to 32" in advice.reasons["rank"]
    assert set(advice.reasons) <= set(config.to_values())


def test_trained_parameters_are_those_that_peft_would_train() -> None:
    model = read_architecture("smollm2-135m")
    advice = advise_config(model, profile(), Wishes("dialogue"))
    config = advice.config
    lora = peft.LoraConfig(
        r=config.rank, target_modules=list(config.target_modules), rank_pattern=dict(config.rank_pattern)
    )
    adapted: Any = peft.get_peft_model(model.build(), lora)
    assert advice.trained == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("name", ["llama-3.2-1b", "gpt2"])
def test_a_train_yaml_reads_back_as_the_advice(name: str, tmp_path: Path) -> None:
    advice = advise_config(read_architecture(name), profile(), Wishes())
    path = tmp_path / "train.yaml"
    path.write_text(advice.config.to_yaml(advice.reasons))
    assert TrainConfig.from_yaml(path) == advice.config
    assert "# " + advice.reasons["rank"] in path.read_text()
    assert yaml.safe_load(path.read_text())["learning_rate"] == 2e-4


def test_larger_models_are_trained_on_four_bits() -> None:
    advice = advise_config(read_architecture("llama-3.2-1b"), profile(), Wishes())
    assert advice.config.quantization == "nf4"


def test_memory_and_time_are_those_of_what_is_advised() -> None:
    model = read_architecture("gpt2")
    advice = advise(model, profile(), Wishes("summarization", quantization="nf4", device="l4"))
    assert (advice.trained_share, advice.time.device) == (advice.advised.trained / 124_439_808, "l4")
    assert {each.trained for each in advice.memory if each.method != "full"} == {advice.advised.trained}
    assert advice.time.tokens == 3 * profile().tokens_total
    qlora = next(each for each in advice.memory if each.method == "qlora")
    assert qlora.total < min(each.total for each in advice.memory if each.method != "qlora")


def test_an_encoder_is_advised_as_a_classifier() -> None:
    model = read_architecture("bert-base", CLASSIFICATION)
    advice = advise_config(model, profile(), Wishes("classification"))
    assert advice.config.task == CLASSIFICATION
    assert advice.config.target_modules == ("query", "key", "value", "attention.output.dense")
    assert any("server refuses" in note for note in advice.notes)


def test_wishes_go_before_rules() -> None:
    wishes = Wishes("dialogue", "complex", one_rank=True, quantization="nf4")
    advice = advise_config(read_architecture("smollm2-135m"), profile(20_000, 5_000), wishes, "demo")
    config = advice.config
    assert (config.model, config.quantization, config.rank_pattern, config.rank) == ("demo", "nf4", {}, 16)
    assert (config.dropout, config.max_length) == (0.01, 5_056)


def test_rows_longer_than_the_model_takes_are_cut_at_that() -> None:
    advice = advise_config(read_architecture("gpt2"), profile(500, 5_000), Wishes())
    assert advice.config.max_length == 1024
    assert "the model takes 1,024" in advice.reasons["max_length"]


def test_time_follows_from_operations() -> None:
    model = read_architecture("llama-2-7b")
    full, lora, qlora = (
        estimate_time(model, method, trained, 1000, 1000, "a100")  # type: ignore[arg-type]
        for method, trained in (("full", model.parameters), ("lora", 40_000_000), ("qlora", 40_000_000))
    )
    linear = sum(module.weights for module in model.modules)
    assert full.flops == 6 * 1000 * linear  # Kaplan et al.: 6 N D
    assert 4 * 1000 * linear < lora.flops < 4.1 * 1000 * linear
    assert lora.seconds < qlora.seconds < full.seconds
    again = estimate_time(model, "lora", 40_000_000, 1000, 1000, "a100", checkpointing=True)
    assert again.flops == pytest.approx(1.5 * lora.flops, rel=0.01)
