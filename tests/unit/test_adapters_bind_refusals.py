"""Binding: config and tensors that contradict each other or the base, each reported by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.adapters.binding import BaseModel, BaseModule, BindError, bind
from loraplex.adapters.formats import read_adapter
from tests.adapter_factory import HIDDEN, tensors, tiny_base, write_adapter

VOCAB = 32
PREFIX = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q0 = "model.layers.0.self_attn.q_proj"
ROWS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD_ROWS = f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta"


def base(**changes: Any) -> BaseModel:
    """`tiny_base` with an embedding, norms, and a bias of each q_proj."""
    parameters: dict[str, tuple[int, ...]] = {EMBEDDING: (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(2):
        parameters[f"model.layers.{layer}.input_layernorm.weight"] = (HIDDEN,)
        parameters[f"model.layers.{layer}.self_attn.q_proj.bias"] = (HIDDEN,)
    return replace(tiny_base(), parameters=parameters, embedding=EMBEDDING, **changes)


def lora(path: str, a: tuple[int, int], b: tuple[int, int]) -> dict[str, torch.Tensor]:
    return {f"{PREFIX}{path}.lora_A.weight": torch.ones(a), f"{PREFIX}{path}.lora_B.weight": torch.ones(b)}


def embedding_lora(vocab: int = VOCAB) -> dict[str, torch.Tensor]:
    path = f"{PREFIX}model.embed_tokens.lora_embedding"
    return {f"{path}_A": torch.ones(4, vocab), f"{path}_B": torch.ones(HIDDEN, 4)}


def problems(
    folder: Path, more: dict[str, torch.Tensor], of: BaseModel | None = None, **changes: Any
) -> dict[str, str]:
    """Write an adapter with LoRA on q_proj and v_proj and `more`; return what is wrong with it, by subject."""
    adapter = read_adapter(write_adapter(folder, weights=tensors(tiny_base()) | more, **changes))
    with pytest.raises(BindError) as caught:
        bind(adapter, of or base())
    return {entry.subject: entry.problem for entry in caught.value.report.problems}


def test_a_target_that_lost_its_tensors_in_one_layer(tmp_path: Path) -> None:
    weights = {key: tensor for key, tensor in tensors(tiny_base()).items() if "1.self_attn.v_proj" not in key}
    with pytest.raises(BindError) as caught:
        bind(read_adapter(write_adapter(tmp_path, weights=weights)), base())
    assert [v.field for v in caught.value.violations] == ["model.layers.1.self_attn.v_proj"]
    assert "is a target by the config, but no tensor belongs to it" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ".*q_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
        {"target_modules": None, "exclude_modules": ["v_proj"]},
        {"target_modules": ["q_proj", Q0.replace("q_", "v_")]},
    ],
)
def test_tensors_of_what_is_no_target(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = problems(tmp_path, {}, **changes)
    stray = f"{PREFIX}model.layers.1.self_attn.v_proj.lora_A.weight"
    assert "that the config does not target" in found[stray]


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "o_proj"], ".*(gate|up)_proj"])
def test_targets_that_nothing_answers_to(tmp_path: Path, targets: list[str] | str) -> None:
    found = problems(tmp_path, {}, target_modules=targets)
    subject = targets if isinstance(targets, str) else "o_proj"
    assert "is named in target_modules, but no tensor belongs to it" in found[subject]


def test_all_linear_means_every_linear_module_but_lm_head(tmp_path: Path) -> None:
    found = problems(tmp_path, {}, target_modules="all-linear")
    assert set(found) == {f"model.layers.{layer}.mlp.down_proj" for layer in range(2)}
    adapter = read_adapter(
        write_adapter(
            tmp_path, weights=tensors(tiny_base(), ("q_proj", "v_proj", "down_proj")), target_modules="all-linear"
        )
    )
    assert len(bind(adapter, base()).modules) == 6


def test_layers_that_are_no_target(tmp_path: Path) -> None:
    found = problems(tmp_path, {}, layers_to_transform=[1])
    assert set(found) == {f"{PREFIX}model.layers.0.self_attn.{m}_proj.lora_A.weight" for m in "qv"}


def test_modules_trained_whole(tmp_path: Path) -> None:
    norm = {f"{PREFIX}model.norm.weight": torch.ones(HIDDEN)}
    found = problems(tmp_path, norm, modules_to_save=["norm", "score"])
    norms = {f"model.layers.{layer}.input_layernorm.weight" for layer in range(2)}
    assert set(found) == {"score"} | norms
    assert found["score"] == "is named in modules_to_save, but the base has no such module"
    assert all("according to modules_to_save (norm), but it is not in the file" in found[norm] for norm in norms)
    down = {f"{PREFIX}model.layers.0.mlp.down_proj.weight": torch.ones(8, 16)}
    assert set(problems(tmp_path, down, modules_to_save=["down_proj"])) == {"model.layers.1.mlp.down_proj.weight"}
    query = {f"{PREFIX}{Q0}.weight": torch.ones(8, 8)}
    assert (
        "of which PEFT would use one" in problems(tmp_path, query, modules_to_save=["q_proj"])[f"{PREFIX}{Q0}.weight"]
    )


@pytest.mark.parametrize(
    ("path", "shape", "problem"),
    [
        ("lm_head.weight", (VOCAB + 1, HIDDEN), "use the base it was trained for"),
        ("model.embed_tokens.weight", (VOCAB, HIDDEN + 1), "use the base it was trained for"),
        ("model.visual.proj.weight", (8, 8), "the base has no model.visual.proj.weight"),
    ],
)
def test_weights_that_fit_nowhere(tmp_path: Path, path: str, shape: tuple[int, int], problem: str) -> None:
    name = path.removesuffix(".weight").rpartition(".")[2]
    found = problems(tmp_path, {PREFIX + path: torch.ones(shape)}, modules_to_save=[name])
    assert problem in found[PREFIX + path]


def test_weights_of_the_base_that_nothing_declares(tmp_path: Path) -> None:
    key = f"{PREFIX}model.norm.weight"
    assert "neither modules_to_save nor bias says" in problems(tmp_path, {key: torch.ones(HIDDEN)})[key]


def test_weights_of_the_base_in_an_alora(tmp_path: Path) -> None:
    key = f"{PREFIX}lm_head.base_layer.weight"
    found = problems(tmp_path, {key: torch.ones(VOCAB, HIDDEN)}, alora_invocation_tokens=[1, 2])
    assert "would act before the invocation tokens; save the adapter with save_embedding_layers=False" in found[key]


def test_the_unused_original_of_a_module_trained_whole_is_in_order(tmp_path: Path) -> None:
    weights = tensors(tiny_base()) | {
        f"{PREFIX}lm_head.modules_to_save.weight": torch.ones(VOCAB, HIDDEN),
        f"{PREFIX}lm_head.original_module.weight": torch.zeros(VOCAB, HIDDEN),
    }
    adapter = read_adapter(write_adapter(tmp_path, weights=weights, modules_to_save=["lm_head"]))
    assert bind(adapter, base()).parameters[HEAD].eq(1).all()
    tied = bind(adapter, base(tied=True)).parameters
    assert tied[HEAD].eq(1).all()
    assert tied[EMBEDDING].eq(0).all(), "on a tied base, PEFT writes the original over the embedding"


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_were_trained_but_are_not_there(tmp_path: Path, bias: str) -> None:
    one = {f"{PREFIX}{Q0}.base_layer.bias": torch.ones(HIDDEN)}
    found = problems(tmp_path, one, bias=bias)
    assert set(found) == {"model.layers.1.self_attn.q_proj.bias"}
    wrong = {f"{PREFIX}{Q0}.base_layer.bias": torch.ones(HIDDEN + 1)}
    assert "needs (8,)" in problems(tmp_path, wrong, bias=bias)[f"{PREFIX}{Q0}.base_layer.bias"]


@pytest.mark.parametrize(
    ("rows", "indices", "subject", "problem"),
    [
        ({ROWS: (3, HIDDEN)}, [1, 2], ROWS, "needs (2, 8)"),
        ({ROWS: (2, HIDDEN)}, [1, VOCAB], ROWS, "is for token 32, but the base has 32 tokens"),
        ({ROWS: (2, HIDDEN)}, None, ROWS, "does not say for which tokens"),
        ({HEAD_ROWS: (2, HIDDEN)}, [1, 2], HEAD_ROWS, "does not say for which tokens"),
        ({}, [1, 2], "trainable_token_indices", "their rows are not in the file"),
        (
            {ROWS: (1, HIDDEN)},
            {"embed_tokens": [1], "lm_head": [1]},
            "trainable_token_indices lm_head",
            "not in the file",
        ),
        (
            {f"{PREFIX}{Q0}.token_adapter.trainable_tokens_delta": (1, HIDDEN)},
            {"q_proj": [1]},
            None,
            "neither the base's",
        ),
        ({ROWS: (1, HIDDEN)}, {"embed_tokens": [1], "tokens": [2]}, ROWS, "does not say for which tokens"),
    ],
)
def test_token_rows_that_fit_nowhere(
    tmp_path: Path, rows: dict[str, tuple[int, int]], indices: Any, subject: str | None, problem: str
) -> None:
    weights = {key: torch.ones(shape) for key, shape in rows.items()}
    found = problems(tmp_path, weights, trainable_token_indices=indices)
    assert problem in found[subject or next(iter(rows))]


def test_rows_are_sorted_by_token(tmp_path: Path) -> None:
    rows = torch.arange(3.0)[:, None].expand(3, HIDDEN).contiguous()
    folder = write_adapter(tmp_path, weights=tensors(tiny_base()) | {ROWS: rows}, trainable_token_indices=[9, 3, 14])
    bound = bind(read_adapter(folder), base())
    assert bound.token_rows.keys() == {EMBEDDING}
    assert bound.token_rows[EMBEDDING].tokens.tolist() == [3, 9, 14]
    assert bound.token_rows[EMBEDDING].rows[:, 0].tolist() == [1, 0, 2]
    assert bind(read_adapter(folder), base(tied=True)).token_rows.keys() == {EMBEDDING, HEAD}


def test_rows_go_into_a_weight_of_the_base_that_was_saved_along(tmp_path: Path) -> None:
    weights = tensors(tiny_base()) | {
        ROWS: torch.full((1, HIDDEN), 2.0),
        f"{PREFIX}model.embed_tokens.token_adapter.base_layer.weight": torch.ones(VOCAB, HIDDEN, dtype=torch.bfloat16),
    }
    bound = bind(read_adapter(write_adapter(tmp_path, weights=weights, trainable_token_indices=[5])), base())
    assert not bound.token_rows
    assert bound.parameters[EMBEDDING][:, 0].tolist() == [2.0 if token == 5 else 1.0 for token in range(VOCAB)]


@pytest.mark.parametrize("twice", [False, True])
def test_rows_in_a_tied_matrix_that_was_saved_along_leave_one_matrix(tmp_path: Path, twice: bool) -> None:
    rows = {key: torch.full((1, HIDDEN), 2.0) for key in ([ROWS, HEAD_ROWS] if twice else [ROWS])}
    saved = {f"{PREFIX}model.embed_tokens.token_adapter.base_layer.weight": torch.ones(VOCAB, HIDDEN)}
    listed: Any = {"embed_tokens": [5], "lm_head": [5]} if twice else [5]
    folder = write_adapter(tmp_path, weights=tensors(tiny_base()) | rows | saved, trainable_token_indices=listed)
    bound = bind(read_adapter(folder), base(tied=True))
    assert not bound.token_rows
    assert bound.parameters[EMBEDDING][5].eq(2).all()
    assert bound.parameters[HEAD] is bound.parameters[EMBEDDING], "packing tells by the memory that it is one"


def test_two_ways_of_training_one_matrix(tmp_path: Path) -> None:
    whole = {f"{PREFIX}model.embed_tokens.weight": torch.ones(VOCAB, HIDDEN)}
    rows = {ROWS: torch.ones(1, HIDDEN)}
    saved: dict[str, Any] = {"modules_to_save": ["embed_tokens"]}
    listed: dict[str, Any] = {"trainable_token_indices": [1]}
    targets: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "embed_tokens"]}
    assert "was also trained whole" in problems(tmp_path, whole | rows, **saved, **listed)[ROWS]
    assert "beside LoRA" in problems(tmp_path, rows | embedding_lora(), **targets, **listed)[ROWS]
    found = problems(tmp_path, whole | embedding_lora(), **targets, **saved)
    assert "of which PEFT would use one" in found[f"{PREFIX}model.embed_tokens.weight"]


def test_lora_for_another_vocabulary(tmp_path: Path) -> None:
    found = problems(tmp_path, embedding_lora(VOCAB + 1), target_modules=["q_proj", "v_proj", "embed_tokens"])
    assert len(found) == 2
    assert all("LoRA for the embedding has shape (33, 8)" in problem for problem in found.values())
    elsewhere = {key.replace("embed_tokens", "positions"): t for key, t in embedding_lora().items()}
    found = problems(tmp_path, elsewhere)
    assert all("whose place" in problem for problem in found.values())


@pytest.mark.parametrize("ensure", [False, True])
def test_contradictions_on_a_tied_base(tmp_path: Path, ensure: bool) -> None:
    copies = {f"{PREFIX}{name}": torch.full((VOCAB, HIDDEN), float(i)) for i, name in enumerate((EMBEDDING, HEAD))}
    assert "they were saved along with different values" in problems(tmp_path, copies, base(tied=True))[HEAD]
    rows = {ROWS: torch.ones(1, HIDDEN), HEAD_ROWS: torch.zeros(1, HIDDEN)}
    options: dict[str, Any] = {"ensure_weight_tying": ensure}
    same = {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [1]}}
    assert "for the same tokens" in problems(tmp_path, rows, base(tied=True), **same, **options)[HEAD]
    if ensure:
        other = {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}
        assert "rows for other tokens" in problems(tmp_path, rows, base(tied=True), **other, **options)[HEAD]
        saved = {"modules_to_save": ["embed_tokens", "lm_head"]}
        assert "trained to different values" in problems(tmp_path, copies, base(tied=True), **saved, **options)[HEAD]
        both = embedding_lora() | lora("lm_head", (4, HIDDEN), (VOCAB, 4))
        both[f"{PREFIX}lm_head.lora_A.weight"] += 1
        targets = {"target_modules": ["q_proj", "v_proj", "embed_tokens"]}
        assert (
            "other matrices than the embedding"
            in problems(tmp_path, both, base(tied=True), **targets, **options)["lm_head"]
        )


def test_a_base_with_another_fingerprint(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path, loraplex_base_fingerprint="tiny"))
    assert bind(adapter, base()).modules
    assert bind(adapter, replace(base(), fingerprint="")).modules, "a base whose fingerprint nobody knows"
    with pytest.raises(BindError, match="trained on another base"):
        bind(adapter, replace(base(), fingerprint="other"))


def fused_base() -> BaseModel:
    modules = {name: BaseModule(name, HIDDEN, size) for name, size in (("model.layers.0.self_attn.qkv_proj", 16),)}
    return BaseModel("fused", "Phi3ForCausalLM", "", modules)


@pytest.mark.parametrize(
    ("outputs", "options", "problem"),
    [
        ({"q": 8, "k": 4, "v": 4}, {"alpha_pattern": {"k_proj": 3}}, "scalings of their own"),
        ({"q": 8, "k": 4, "v": 5}, {}, "the parts have 17 outputs"),
        ({"q": 8, "k": 4, "v": 3}, {}, "the parts have 15 outputs"),
        ({"q": 9}, {}, "the parts have 9 outputs"),
        ({"q": 16}, {}, "the parts have 16 outputs"),
        ({"v": 8}, {}, "the parts have 8 outputs"),
        ({"q": 8, "v": 4}, {"use_dora": True}, "DoRA on some parts only"),
    ],
)
def test_parts_that_make_up_no_fused_module(
    tmp_path: Path, outputs: dict[str, int], options: dict[str, Any], problem: str
) -> None:
    weights: dict[str, torch.Tensor] = {}
    for part, size in outputs.items():
        path = f"model.layers.0.self_attn.{part}_proj"
        weights |= lora(path, (4, HIDDEN), (size, 4))
        if options.get("use_dora"):
            weights[f"{PREFIX}{path}.lora_magnitude_vector"] = torch.ones(size)
    targets = [f"{part}_proj" for part in outputs]
    adapter = read_adapter(write_adapter(tmp_path, weights=weights, target_modules=targets, **options))
    with pytest.raises(BindError) as caught:
        bind(adapter, fused_base())
    assert {entry.subject for entry in caught.value.report.problems} == set(weights)
    assert problem in str(caught.value)


def test_a_fused_adapter_of_another_size(tmp_path: Path) -> None:
    modules = {name: BaseModule(name, HIDDEN, 8) for name in (f"model.layers.0.self_attn.{p}_proj" for p in "qkv")}
    split = BaseModel("split", "LlamaForCausalLM", "", modules)
    weights = lora("model.layers.0.self_attn.qkv_proj", (4, HIDDEN), (25, 4))
    adapter = read_adapter(write_adapter(tmp_path, weights=weights, target_modules=["qkv_proj"]))
    with pytest.raises(BindError, match="has 25 outputs, the base's module has 24"):
        bind(adapter, split)
