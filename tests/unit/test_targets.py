from __future__ import annotations

from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from loraplex.adapters.errors import InvalidRequestError
from loraplex.adapters.spec import AdapterSpec
from loraplex.adapters.training.architecture import CLASSIFICATION, LinearModule, ModelArchitecture, read_architecture
from loraplex.adapters.training.module_role import kind_of, role_of
from loraplex.adapters.training.targets import Scope, choose_targets, modules_of, names_of

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# As the seed text lists them, with the names that hit only what is meant.
CASES: list[tuple[str, Scope, object, int]] = [
    ("llama-2-7b", "all", LLAMA, 7 * 32),
    ("llama-2-7b", "attention", LLAMA[:4], 4 * 32),
    ("phi-3-mini", "attention", ("o_proj", "qkv_proj"), 2 * 32),
    ("gpt2", "all", ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"), 4 * 12),
    ("gpt2", "attention", ("c_attn", "attn.c_proj"), 2 * 12),
    ("bert-base", "attention", ("query", "key", "value", "attention.output.dense"), 4 * 12),
    (
        "bert-base",
        "all",
        ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
        6 * 12,
    ),
]
ROLES = {
    "opt": {"self_attn.out_proj": "o", "self_attn.q_proj": "q", "fc1": "up", "fc2": "down"},
    "gpt_neox": {"attention.query_key_value": "qkv", "attention.dense": "o", "mlp.dense_4h_to_h": "down"},
    "falcon": {"self_attention.query_key_value": "qkv", "self_attention.dense": "o", "mlp.dense_h_to_4h": "up"},
    "distilbert": {"attention.q_lin": "q", "attention.out_lin": "o", "ffn.lin1": "up", "ffn.lin2": "down"},
    "phi3": {"mlp.gate_up_proj": "gate_up", "self_attn.qkv_proj": "qkv"},
    "olmoe": {"self_attn.q_proj": "q"},
}


def architecture(name: str) -> ModelArchitecture:
    return read_architecture(name, CLASSIFICATION if name.startswith("bert") else "causal-lm")


def adapted_by_peft(model: Any, target_modules: Any) -> set[str]:
    """The modules that PEFT itself puts LoRA on."""
    wanted = target_modules if isinstance(target_modules, str) else list(target_modules)
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=wanted, fan_in_fan_out=False))
    return {name for name, module in adapted.base_model.model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize(("name", "scope", "names", "count"), CASES)
def test_names_hit_what_is_meant_in_peft_too(name: str, scope: Scope, names: object, count: int) -> None:
    model = architecture(name)
    targets = choose_targets(model, scope)
    assert (targets.target_modules, len(targets.modules)) == (names, count)
    meant = {module.name for module in targets.modules}
    assert {module.name for module in modules_of(model, targets.target_modules)} == meant
    assert adapted_by_peft(model.build(), targets.target_modules) == meant


def test_where_no_name_will_do_an_expression_does() -> None:
    model = architecture("bert-base")
    targets = choose_targets(model, "feed-forward")
    assert isinstance(targets.target_modules, str)
    meant = {module.name for module in targets.modules}
    assert len(meant) == 2 * 12
    assert not any("attention" in name for name in meant)
    assert adapted_by_peft(model.build(), targets.target_modules) == meant


@pytest.mark.parametrize("model_type", ROLES)
def test_roles_are_told_from_place_and_shape(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    factory = AutoModelForSequenceClassification if model_type == "distilbert" else AutoModelForCausalLM
    import torch

    from loraplex.adapters.training import architecture as module

    with torch.device("meta"):
        linear = list(module._linear_modules(factory.from_config(config)))
    found = {each.name: role_of(each) for each in linear}
    for end, role in ROLES[model_type].items():
        assert {found[name] for name in found if name.endswith(f".{end}")} == {role}, end


@given(st.data())
def test_names_hit_exactly_what_was_chosen(data: st.DataObject) -> None:
    parts = st.sampled_from(["attn", "mlp", "output", "dense", "q_proj"])
    ends = data.draw(st.lists(st.lists(parts, min_size=1, max_size=3).map(".".join), min_size=1, unique=True))
    kinds = data.draw(st.lists(st.sampled_from(ends), min_size=1, unique=True))
    modules = [LinearModule(f"model.layers.{layer}.{end}", 4, 4) for layer in range(2) for end in ends]
    # A module may not lie in another one that is linear.
    modules += [LinearModule("dense", 4, 4), LinearModule("output.dense", 4, 4)]
    chosen = [module for module in modules if kind_of(module.name).removeprefix("model.layers.N.") in kinds]
    chosen = [module for module in chosen if module.name.startswith("model.")]
    spec = AdapterSpec(rank=1, alpha=1.0, target_modules=names_of(chosen, modules))
    assert [module for module in modules if spec.targets(module.name)] == [
        module for module in modules if module in chosen
    ]


def test_a_model_without_blocks_is_refused_with_what_it_has() -> None:
    model = architecture("gpt2")
    bare = ModelArchitecture("bare", "folder", model.config, model.task, "Bare", 1, (LinearModule("fc", 2, 2),), "")
    with pytest.raises(InvalidRequestError, match="fc"):
        choose_targets(bare, "all")
