from __future__ import annotations

from typing import Any

import peft
import pytest

from loraplex.adapters.training.architecture import CLASSIFICATION, read_architecture
from loraplex.adapters.training.module_ranks import seed_ranks, uniform_ranks
from loraplex.adapters.training.module_role import kind_of
from loraplex.adapters.training.targets import choose_targets

LLAMA = {"q_proj": 32, "k_proj": 16, "v_proj": 32, "o_proj": 16, "gate_proj": 8, "up_proj": 16, "down_proj": 8}


def test_at_rank_16_the_ranks_are_the_seed_texts() -> None:
    model = read_architecture("llama-3.2-1b")
    ranks = seed_ranks(choose_targets(model, "all").modules, model.modules, 16)
    assert {name.rpartition(".")[2]: rank for name, rank in ranks.ranks.items()} == LLAMA
    assert ranks.rank_pattern == {"q_proj": 32, "v_proj": 32, "gate_proj": 8, "down_proj": 8}
    assert ranks.alpha_pattern == {"q_proj": 64, "v_proj": 64, "gate_proj": 16, "down_proj": 16}


@pytest.mark.parametrize("name", ["smollm2-135m", "phi-3-mini", "gpt2", "bert-base"])
@pytest.mark.parametrize("scope", ["all", "attention"])
@pytest.mark.parametrize("rank", [4, 24])
def test_peft_gives_every_module_its_rank_and_the_same_scaling(name: str, scope: Any, rank: int) -> None:
    model = read_architecture(name, CLASSIFICATION if name == "bert-base" else "causal-lm")
    targets = choose_targets(model, scope)
    ranks = seed_ranks(targets.modules, model.modules, rank)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets.target_modules
        if isinstance(targets.target_modules, str)
        else list(targets.target_modules),
        rank_pattern=dict(ranks.rank_pattern),
        alpha_pattern=dict(ranks.alpha_pattern),
    )
    adapted: Any = peft.get_peft_model(model.build(), config)
    found = {
        path: module
        for path, module in adapted.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {path: module.r["default"] for path, module in found.items()} == ranks.ranks
    assert {module.scaling["default"] for module in found.values()} == {2.0}
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trained == sum(module.lora_parameters(ranks.ranks[module.name]) for module in targets.modules)


def test_a_pattern_does_not_reach_what_has_another_rank() -> None:
    model = read_architecture("bert-base", CLASSIFICATION)
    ranks = seed_ranks(choose_targets(model, "all").modules, model.modules, 16)
    by_kind = {kind_of(module.name): ranks.ranks[module.name] for module in choose_targets(model, "all").modules}
    # Both end in output.dense.
    assert by_kind["bert.encoder.layer.N.attention.output.dense"] == 16
    assert by_kind["bert.encoder.layer.N.output.dense"] == 8


def test_one_rank_needs_no_pattern() -> None:
    model = read_architecture("gpt2")
    ranks = uniform_ranks(choose_targets(model, "all").modules, 8)
    assert (ranks.rank_pattern, ranks.alpha_pattern, set(ranks.ranks.values())) == ({}, {}, {8})
