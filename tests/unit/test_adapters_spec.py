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
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key

from loraplex.adapters.config_file import parse_config
from loraplex.adapters.errors import AdapterFormatError
from loraplex.adapters.traits import AdapterTraits
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
    assert parse().pattern_key(keys, module) == get_pattern_key(keys, module)


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


NAMES = ["q_proj", "proj", "lm_head", "self_attn.q_proj", "c_attn", "layers.1.self_attn.k_proj", MODULES[0]]
selectors = st.one_of(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3), patterns)


@st.composite
def choices(draw: st.DrawFn) -> dict[str, Any]:
    """What a config says about which modules are targets, as far as PEFT accepts it together."""
    chosen: dict[str, Any] = {"target_modules": draw(selectors), "exclude_modules": draw(st.none() | selectors)}
    if isinstance(chosen["target_modules"], list):
        layers = st.lists(st.integers(0, 12), max_size=3) | st.integers(0, 12)
        chosen["layers_to_transform"] = draw(st.none() | layers)
        if chosen["layers_to_transform"] not in (None, []):
            chosen["layers_pattern"] = draw(st.none() | st.sampled_from(["layers", "h", ["h", "layers"], r"l\w+", []]))
    chosen["modules_to_save"] = draw(st.none() | st.lists(st.sampled_from(["lm_head", "mlp", "k_proj", "h.1"])))
    return chosen


@settings(deadline=None, max_examples=300)
@given(choices(), st.sampled_from(MODULES))
def test_targets_are_pefts(chosen: dict[str, Any], module: str) -> None:
    found = check_target_module_exists(LoraConfig(**chosen), module)
    assert parse(**chosen).targets(module) == (bool(found) and not isinstance(found, _ExcludedModule))


def test_every_key_of_pefts_own_config_is_known() -> None:
    written = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=8).to_dict()
    written["target_modules"] = list(written["target_modules"])
    spec, _ = parse_config(json.dumps(written).encode())
    assert spec.rank == 8
    assert spec.target_modules == ("q_proj",)


def test_all_linear_leaves_out_head_and_embedding() -> None:
    spec = parse(target_modules="All-Linear", exclude_modules=["down_proj"])
    assert spec.targets("model.layers.0.self_attn.q_proj")
    assert not spec.targets("model.layers.0.mlp.down_proj")
    assert not spec.targets("lm_head")
    assert not spec.targets("model.embed_tokens", embedding=True)


def test_modules_to_save_name_ends_of_modules_as_in_peft() -> None:
    spec = parse(modules_to_save=["norm", "embed_tokens", "mlp"])
    assert spec.saving_names("model.layers.0.self_attn.q_norm.weight") == ("norm",)
    assert spec.saving_names("model.layers.0.mlp.up_proj.weight") == ("mlp",)
    assert spec.saves("model.embed_tokens.weight")
    assert not spec.saves("model.layers.0.self_attn.q_proj.bias")


def test_what_else_a_config_declares() -> None:
    spec = parse(
        bias="lora_only",
        lora_bias=True,
        trainable_token_indices={"embed_tokens": [5, 3], "lm_head": [7]},
        ensure_weight_tying=True,
        layers_to_transform=3,
        loraplex_base_fingerprint="abc",
    )
    assert (spec.bias, spec.lora_bias, spec.ensure_weight_tying, spec.layers) == ("lora_only", True, True, (3,))
    assert spec.token_indices == {"embed_tokens": (5, 3), "lm_head": (7,)}
    assert parse(trainable_token_indices=[2, 1]).token_indices == {"": (2, 1)}
    assert (spec.base_model, spec.base_fingerprint) == ("some/base", "abc")


def test_traits_follow_from_the_config() -> None:
    assert parse().traits == AdapterTraits()
    assert parse(use_dora=True).traits == AdapterTraits("dora", fixed_scale=True)
    assert parse(alora_invocation_tokens=[5, 6]).traits == AdapterTraits("alora", invocation_tokens=(5, 6))
    assert parse(alora_invocation_tokens=[]).traits == AdapterTraits()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_replication", [[0, 4], [2, 5]]),
        ("task_type", "SEQ_CLS"),
        ("megatron_config", {"tensor_parallel": 2}),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1.0}),
        ("monteclora_config", {"num_samples": 8}),
        ("velora_config", {"num_groups": 64}),
        ("bias", "some"),
        ("bias", True),
        ("use_dora", 1),
        ("lora_bias", "yes"),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", [""]),
        ("modules_to_save", ["("]),
        ("trainable_token_indices", [1, 1]),
        ("trainable_token_indices", [-1]),
        ("trainable_token_indices", [True]),
        ("trainable_token_indices", {"embed_tokens": []}),
        ("trainable_token_indices", 7),
        ("alora_invocation_tokens", ["<assistant>"]),
        ("alora_invocation_tokens", [2**40]),
        ("alora_invocation_tokens", [5] * 1025),
        ("layers_to_transform", [-1]),
        ("layers_to_transform", -1),
        ("layers_to_transform", "1"),
        ("target_modules", ["q_proj"] * 5000),
        ("exclude_modules", ["q_proj"] * 5000),
        ("modules_to_save", ["norm"] * 300),
        ("rank_pattern", {f"{i}.q_proj": 8 for i in range(5000)}),
        ("layers_pattern", "layers"),
        ("layers_pattern", "(?P<idx>"),
        ("ensure_weight_tying", 1),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "of_the_future"),
        ("peft_type", "LOHA"),
        ("peft_type", "ADALORA"),
        ("peft_type", "VERA"),
        ("peft_type", "LOKR"),
        ("peft_type", "IA3"),
        ("peft_type", "XLORA"),
        ("peft_type", "PROMPT_TUNING"),
        ("peft_type", ["LORA"]),
        ("peft_type", None),
        ("a_key_of_the_future", 0.5),
        ("r", 0),
        ("r", -4),
        ("r", 2.5),
        ("r", True),
        ("r", None),
        ("lora_alpha", "16"),
        ("lora_alpha", 10**400),
        ("lora_alpha", 1e300),
        ("alpha_pattern", {"q_proj": -1e39}),
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
        parse(use_qalora=True, bias="some", r=0, a_key_of_the_future=1)
    assert {v.field for v in caught.value.violations} == {"use_qalora", "bias", "r", "a_key_of_the_future"}
    assert "and 1 more" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [3]),
    ],
)
def test_what_would_act_before_an_invocation_is_refused(key: str, value: object) -> None:
    assert key in refusal(alora_invocation_tokens=[5, 6], **{key: value})


def test_what_peft_refuses_together_is_refused() -> None:
    assert "lora_bias" in refusal(use_dora=True, lora_bias=True)
    assert "layers_to_transform" in refusal(target_modules=".*q_proj", layers_to_transform=[1])


BOMB = "(a|aa)+[^a]"


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": BOMB},
        {"exclude_modules": BOMB},
        {"rank_pattern": {BOMB: 8}},
        {"alpha_pattern": {BOMB: 8}},
        {"modules_to_save": [BOMB]},
        {"target_modules": ["a"], "layers_to_transform": [1], "layers_pattern": [BOMB]},
    ],
)
def test_an_expression_that_never_ends_is_refused(config: dict[str, object]) -> None:
    spec, module = parse(**config), f"{'a' * 50}.a"
    with pytest.raises(AdapterFormatError, match="takes too long to match"):
        (spec.targets(module), spec.scaling_of(module))


def test_many_slow_expressions_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex.adapters.patterns._TOTAL_S", 0.0)
    with pytest.raises(AdapterFormatError, match="together take too long"):
        parse(target_modules=".*q_proj").targets("model.layers.0.self_attn.q_proj")


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
