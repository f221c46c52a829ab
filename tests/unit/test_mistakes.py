from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from loraplex.adapters.training.advisor import Wishes, advise_config
from loraplex.adapters.training.architecture import CLASSIFICATION, ModelArchitecture, read_architecture
from loraplex.adapters.training.data_profile import DataProfile
from loraplex.adapters.training.known_models import KNOWN_MODELS
from loraplex.adapters.training.mistakes import Mistake, Servable, find_mistakes
from loraplex.adapters.training.rank_advice import TASKS, Task
from loraplex.adapters.training.train_config import TrainConfig
from loraplex.cli.servable import servable_modules

DATA = DataProfile("data.jsonl", "prompt-completion", [*[50] * 90, *[300] * 10], 1000)


@pytest.fixture(scope="module")
def llama() -> ModelArchitecture:
    return read_architecture("llama-3.2-1b")


def good(**changes: Any) -> TrainConfig:
    config = TrainConfig(
        model="llama-3.2-1b",
        data="data.jsonl",
        output_dir="out",
        rank=16,
        alpha=32.0,
        target_modules=("q_proj", "v_proj"),
        max_length=320,
    )
    return replace(config, **changes)


def found(config: TrainConfig, model: ModelArchitecture, task: Task = "dialogue") -> dict[str, Mistake]:
    mistakes = find_mistakes(config, model, DATA, task, servable_modules(model))
    return {mistake.field: mistake for mistake in mistakes}


def test_a_good_configuration_has_none(llama: ModelArchitecture) -> None:
    assert found(good(), llama) == {}


CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("rank", {"rank": 2, "alpha": 4.0}, "below the range", "16"),
    ("rank", {"rank": 128, "alpha": 256.0}, "above the range", "16"),
    ("alpha", {"rank": 32, "alpha": 8.0}, "forgotten", "64"),
    ("learning_rate", {"learning_rate": 2e-5}, "full fine-tuning", "0.0002"),
    ("learning_rate", {"learning_rate": 0.05}, "diverges", "0.0002"),
    ("target_modules", {"target_modules": ("q_proj", "c_attn")}, "c_attn hits no linear module", "q_proj, k_proj"),
    ("target_modules", {"target_modules": ("lm_head",)}, "outside of the blocks", "qualified names"),
    ("max_length", {"max_length": 64}, "10 of 100 rows (10%) have more than 64 tokens and are refused", "300"),
    ("max_length", {"max_length": 64, "long_rows": "truncate"}, "lose their end", "300"),
    ("modules_to_save", {"modules_to_save": ("embed_tokens",)}, "LoRA's learning rate", "2e-05"),
    ("alpha_pattern", {"rank_pattern": {"v_proj": 32}}, "scaled otherwise", "v_proj: 64"),
]


@pytest.mark.parametrize(("field", "changes", "problem", "instead"), CASES)
def test_a_mistake_is_named_with_what_to_write(
    llama: ModelArchitecture, field: str, changes: dict[str, Any], problem: str, instead: str
) -> None:
    mistake = found(good(**changes), llama)[field]
    assert problem in mistake.problem
    assert instead in mistake.instead


def test_the_suggested_alpha_pattern_mends_the_scaling(llama: ModelArchitecture) -> None:
    config = good(rank_pattern={"v_proj": 32})
    name, alpha = found(config, llama)["alpha_pattern"].instead.split(": ")
    assert found(replace(config, alpha_pattern={name: float(alpha)}), llama) == {}


def test_rslora_scales_otherwise_on_purpose(llama: ModelArchitecture) -> None:
    assert found(good(use_rslora=True, alpha=8.0, rank_pattern={"v_proj": 32}), llama) == {}


def test_a_bare_name_that_also_hits_the_feed_forward_is_named() -> None:
    gpt2 = read_architecture("gpt2")
    mistake = found(good(target_modules=("c_attn", "c_proj"), max_length=512), gpt2)["target_modules"]
    assert "attn.c_proj, mlp.c_proj" in mistake.problem
    assert "attn.c_proj" in mistake.instead
    bert = read_architecture("bert-base", CLASSIFICATION)
    config = good(target_modules=("query", "dense"), task=CLASSIFICATION, rank=4, alpha=8.0)
    dense = [
        each.problem
        for each in find_mistakes(config, bert, DATA, "classification", servable_modules(bert))
        if each.field == "target_modules"
    ]
    assert ["attention and feed-forward" in problem for problem in dense] == [True, False]
    assert "bert.pooler.dense" in dense[1]


def test_what_the_server_cannot_serve_is_named(llama: ModelArchitecture) -> None:
    bert = read_architecture("bert-base", CLASSIFICATION)
    assert "server refuses" in found(good(task=CLASSIFICATION, target_modules=("query",)), bert)["task"].problem
    opt = ModelArchitecture("opt", "folder", llama.config, "causal-lm", "OPTForCausalLM", 1, llama.modules, "lm_head")
    assert "OPTForCausalLM" in found(good(), opt)["model"].problem
    none = Servable(frozenset(module.name for module in llama.modules if "q_proj" in module.name))
    (mistake,) = find_mistakes(good(), llama, DATA, "dialogue", none)
    assert "model.layers.0.self_attn.v_proj" in mistake.problem
    assert "12 more" in mistake.problem


@pytest.mark.parametrize("name", [name for name in KNOWN_MODELS if not name.startswith("bert")])
def test_all_linear_modules_of_the_known_decoders_can_be_served(name: str) -> None:
    model = read_architecture(name)
    servable = servable_modules(model)
    assert servable.problem == ""
    assert {module.name for module in model.modules} == servable.modules


@pytest.mark.parametrize("name", ["smollm2-135m", "gpt2", "phi-3-mini"])
@pytest.mark.parametrize("task", TASKS)
def test_the_advice_makes_none_of_the_mistakes(name: str, task: Task) -> None:
    model = read_architecture(name)
    config = advise_config(model, DATA, Wishes(task)).config
    assert find_mistakes(config, model, DATA, task, servable_modules(model)) == ()
