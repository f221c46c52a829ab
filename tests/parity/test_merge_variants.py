"""Everything a bound adapter can hold, merged: against PEFT's own unmerged model, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from loraplex.adapters.binding import BoundAdapter, ModuleWeights, TokenRows
from loraplex.adapters.errors import InvalidRequestError, PreconditionError
from loraplex.adapters.merge import AdapterSource, MergeOptions, merge_adapters
from loraplex.adapters.merge_plan import MergeBase
from loraplex.adapters.quantized_values import round_trip
from loraplex.adapters.traits import AdapterTraits
from tests.parity.bound_peft import bound, randomized
from tests.parity.merge_models import GPT2_TARGETS, LLAMA_TARGETS, load, logits, make_base

EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte"}
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
    "norms-saved": {"modules_to_save": {"llama": ["norm", "input_layernorm"], "gpt2": ["ln_f", "ln_1"]}},
    "head-saved": {"modules_to_save": {"llama": ["lm_head"], "gpt2": ["lm_head"]}, "untied": True},
    "embedding-saved": {"modules_to_save": {"llama": ["embed_tokens"], "gpt2": ["wte"]}, "untied": True},
    "embedding-lora": {"embedding": True},
    "token-rows": {"rows": [3, 17, 40]},
    "token-rows-and-head": {"rows": [3, 17, 40], "head": True},
}


def config(family: str, variant: dict[str, Any]) -> LoraConfig:
    options = dict(variant)
    options.pop("untied", None)
    targets = list(LLAMA_TARGETS if family == "llama" else GPT2_TARGETS)
    if options.pop("embedding", False):
        targets.append(EMBEDDING[family])
    if options.pop("head", False):
        targets.append("lm_head")
    if "modules_to_save" in options:
        options["modules_to_save"] = options["modules_to_save"][family]
    if "rows" in options:
        options["trainable_token_indices"] = {EMBEDDING[family]: options.pop("rows")}
    return LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **options)


def merged_logits(model: Path, adapter: BoundAdapter, output: Path, **options: Any) -> torch.Tensor:
    result = merge_adapters(model, [AdapterSource(adapter)], output, MergeOptions(**options))
    assert result.comparison.mean_kl < 1e-8
    assert result.comparison.max_logit_difference < 1e-4
    return logits(load(output))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_merged_like_peft(tmp_path: Path, family: str, tied: bool, name: str) -> None:
    if tied and VARIANTS[name].get("untied"):
        pytest.skip("PEFT saves both of a tied pair or neither; see the test of tied replacements")
    base = make_base(tmp_path / "base", family, tied=tied)
    peft = randomized(load(base), config(family, VARIANTS[name]))
    expected = logits(peft)
    found = merged_logits(base, bound(peft), tmp_path / "merged")
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert (found - logits(load(base))).abs().max() > 1e-2


def test_dora_on_the_dequantized_base_has_that_bases_norm(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    model = load(base)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ".layers." in name:
            parameter.data = round_trip(parameter.data, "nf4")
    peft = randomized(model, config("llama", VARIANTS["dora"]))
    expected = logits(peft)
    options: dict[str, Any] = {"base": MergeBase.DEQUANTIZED, "quantization": "nf4"}
    found = merged_logits(base, bound(peft), tmp_path / "merged", **options)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["lora_bias", "all", "lora_only"])
def test_biases(tmp_path: Path, name: str) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    options: dict[str, Any] = {"lora_bias": True} if name == "lora_bias" else {"bias": name}
    peft = randomized(load(base), config("gpt2", options))
    expected = logits(peft)
    adapter = bound(peft)
    assert any(name.endswith("bias") for name in adapter.parameters) == (name != "lora_bias")
    torch.testing.assert_close(merged_logits(base, adapter, tmp_path / "merged"), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tied_replacements_stay_tied_only_if_they_are_one(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path / "base", family)
    model = load(base)
    name = next(name for name, _ in model.named_parameters() if EMBEDDING[family] in name)
    new = torch.randn_like(model.get_parameter(name))
    both = BoundAdapter("d", {}, parameters={name: new, "lm_head.weight": new})
    merged_logits(base, both, tmp_path / "both")
    tied = load(tmp_path / "both")
    assert tied.config.tie_word_embeddings
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert torch.equal(tied.lm_head.weight, new)
    merged_logits(base, BoundAdapter("d", {}, parameters={name: new}), tmp_path / "one")
    untied = load(tmp_path / "one")
    assert not untied.config.tie_word_embeddings
    assert torch.equal(untied.get_input_embeddings().weight, new)
    assert torch.equal(untied.lm_head.weight, model.lm_head.weight)


def test_what_cannot_be_merged_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    q = "model.layers.0.self_attn.q_proj"
    plain = ModuleWeights(torch.ones(2, 64), torch.ones(64, 2), 1.0)
    biased = ModuleWeights(plain.a, plain.b, 1.0, lora_bias=torch.ones(64))
    dora = ModuleWeights(plain.a, plain.b, 1.0, magnitude=torch.ones(64))
    other = AdapterSource(BoundAdapter("other", {q: plain}))

    def refused(match: str, adapter: BoundAdapter, *more: AdapterSource, weight: float = 1.0) -> None:
        before = sorted(tmp_path.iterdir())
        with pytest.raises((PreconditionError, InvalidRequestError), match=match):
            merge_adapters(base, [AdapterSource(adapter, weight), *more], tmp_path / "merged")
        assert sorted(tmp_path.iterdir()) == before

    refused("aLoRA", BoundAdapter("a", {q: plain}, traits=AdapterTraits("alora", invocation_tokens=(5,))))
    refused(f"{q} has a lora_bias", BoundAdapter("b", {q: biased}))
    refused("DoRA adapter holds for its own scaling", BoundAdapter("c", {q: dora}), weight=0.5)
    refused(f"{q} has a DoRA magnitude", BoundAdapter("d", {q: dora}), other)
    norm = {"model.norm.weight": torch.ones(64)}
    refused(r"model\.norm\.weight is trained as a whole", BoundAdapter("e", {}, parameters=norm), other)
    refused("no place", BoundAdapter("f", {}, parameters={"model.absent.weight": torch.ones(64)}))
    rows = {"model.embed_tokens.weight": TokenRows(torch.tensor([96]), torch.ones(1, 64))}
    refused("token rows that do not fit", BoundAdapter("g", {}, token_rows=rows))
