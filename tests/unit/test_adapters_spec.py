"""adapter_config.json: PEFT's matching rules, its scalings, and refusal by name."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from loraplex.adapters.errors import AdapterFormatError
from loraplex.adapters.spec import parse_config, pattern_key
from tests.adapter_factory import config

MODULES = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 1, 10, 11)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
] + ["lm_head", "transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_proj"]
PIECES = [
    "q_proj",
    "k_proj",
    "self_attn",
    "layers",
    "1",
    "10",
    r"\d+",
    ".*",
    "[01]",
    "^model",
    "model",
    "(q|k)_proj",
    "lm_head",
    "c_attn",
]
patterns = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).flatmap(
    lambda pieces: st.sampled_from([".", r"\."]).map(lambda dot: dot.join(pieces))
)


def parse(**changes: Any) -> Any:
    return parse_config(json.dumps(config(**changes)).encode())[0]


def refusal(**changes: Any) -> str:
    with pytest.raises(AdapterFormatError) as caught:
        parse(**changes)
    return str(caught.value)


@settings(deadline=None)
@given(st.lists(patterns, max_size=5, unique=True), st.sampled_from(MODULES))
def test_pattern_matching_is_pefts(keys: list[str], module: str) -> None:
    assert pattern_key(keys, module) == get_pattern_key(keys, module)


@settings(deadline=None)
@given(
    st.dictionaries(patterns, st.integers(1, 64), max_size=4),
    st.dictionaries(patterns, st.integers(1, 64), max_size=4),
    st.booleans(),
    st.sampled_from(MODULES),
)
def test_rank_and_scaling_are_pefts(ranks: dict[str, int], alphas: dict[str, int], rslora: bool, module: str) -> None:
    spec = parse(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    rank = ranks.get(get_pattern_key(list(ranks), module), 4)
    alpha = alphas.get(get_pattern_key(list(alphas), module), 8)
    assert spec.rank_of(module) == rank
    assert spec.scaling_of(module) == (alpha / math.sqrt(rank) if rslora else alpha / rank)


@settings(deadline=None)
@given(
    st.one_of(
        st.lists(st.sampled_from(["q_proj", "proj", "lm_head", "self_attn.q_proj", "c_attn"]), min_size=1, max_size=3),
        patterns,
    )
)
def test_a_target_is_unmatched_exactly_where_peft_matches_nothing(targets: list[str] | str) -> None:
    spec = parse(target_modules=targets)
    for target in targets if isinstance(targets, list) else [targets]:
        peft_config = LoraConfig(target_modules=[target] if isinstance(targets, list) else target)
        matched = any(check_target_module_exists(peft_config, module) for module in MODULES)
        assert (target in spec.unmatched_targets(MODULES, MODULES)) == (not matched)


def test_every_key_of_pefts_own_config_is_known() -> None:
    written = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=8).to_dict()
    written["target_modules"] = list(written["target_modules"])
    spec, _ = parse_config(json.dumps(written).encode())
    assert spec.rank == 8
    assert spec.target_modules == ("q_proj",)


def test_an_excluded_target_needs_no_tensor() -> None:
    spec = parse(target_modules=["q_proj", "lm_head"], exclude_modules=["lm_head"])
    adapted = [module for module in MODULES if module.endswith("q_proj")]
    assert spec.unmatched_targets(adapted, MODULES) == ()
    assert parse(target_modules=["q_proj", "lm_head"]).unmatched_targets(adapted, MODULES) == ("lm_head",)


def test_all_linear_says_nothing_about_single_modules() -> None:
    assert parse(target_modules="all-linear").unmatched_targets(["lm_head"], MODULES) == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [5]),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("megatron_config", {"tensor_parallel": 2}),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1.0}),
        ("monteclora_config", {"num_samples": 8}),
        ("velora_config", {"num_groups": 64}),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("peft_type", "LOHA"),
        ("peft_type", "ADALORA"),
        ("peft_type", None),
        ("a_key_of_the_future", 0.5),
        ("r", 0),
        ("r", -4),
        ("r", 2.5),
        ("r", True),
        ("r", None),
        ("lora_alpha", "16"),
        ("lora_alpha", 10**400),
        ("use_rslora", 1),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(": 8}),
        ("alpha_pattern", {"q_proj": "8"}),
        ("alpha_pattern", ["q_proj"]),
        ("target_modules", "(q_proj"),
        ("target_modules", [1]),
        ("exclude_modules", {"a": 1}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(key: str, value: object) -> None:
    assert key in refusal(**{key: value})


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_leave_the_base_alone_are_accepted(init: object) -> None:
    assert parse(init_lora_weights=init).rank == 4


@pytest.mark.parametrize("value", [None, False, [], {}, 0, ""])
def test_an_unknown_key_that_is_off_is_accepted(value: object) -> None:
    assert parse(a_key_of_the_future=value).rank == 4


def test_every_violation_is_reported_at_once() -> None:
    with pytest.raises(AdapterFormatError) as caught:
        parse(use_dora=True, bias="all", r=0, a_key_of_the_future=1)
    assert {v.field for v in caught.value.violations} == {"use_dora", "bias", "r", "a_key_of_the_future"}
    assert "and 1 more" in str(caught.value)


@pytest.mark.parametrize("config", [{"target_modules": "(a|aa)+[^a]"}, {"rank_pattern": {"(a|aa)+[^a]": 8}}])
def test_an_expression_that_never_ends_is_refused(config: dict[str, object]) -> None:
    spec, module = parse(**config), "a" * 50
    with pytest.raises(AdapterFormatError, match="takes too long to match"):
        (spec.unmatched_targets([module], [module]), spec.rank_of(module))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b"\xff\xfe",
        b'{"r": NaN}',
        b'{"lora_dropout": 1e999}',
        b'{"revision": "\\ud800"}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(AdapterFormatError, match=re.escape("adapter_config.json")):
        parse_config(data)
