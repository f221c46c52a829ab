"""Several adapters in one merge: the weighted sum, TIES and DARE against PEFT's own results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from loraplex.adapters.blend import Blend, WeightedAdapter
from loraplex.adapters.compare import compare
from loraplex.adapters.merge import AdapterSource, MergeOptions, merge_adapters
from loraplex.adapters.merge_methods import MAX_ADAPTERS, MergeMethod, Mixing, subject_seed, weight_violations
from loraplex.adapters.model_folder import ModelFolder
from loraplex.adapters.unmerged import unmerged_model
from tests.parity.bound_peft import bound, randomized
from tests.parity.merge_models import IDS, load, logits, make_base

NAMES = ("default", "second", "third")
WEIGHTS = (0.7, -0.4, 1.3)
RANKS = (4, 8, 2)
TARGETS = {"llama": ["q_proj", "down_proj", "lm_head", "embed_tokens"], "gpt2": ["c_attn", "c_proj", "wte"]}


def three(model: Any, targets: list[str], ranks: tuple[int, ...] = RANKS) -> PeftModel:
    """Return `model` with three adapters; the last one has the first target only."""
    peft = randomized(model, LoraConfig(r=ranks[0], lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM"))
    for name, rank in zip(NAMES[1:], ranks[1:], strict=True):
        own = targets if name == "second" else targets[:1]
        peft.add_adapter(name, LoraConfig(r=rank, lora_alpha=6, target_modules=own, task_type="CAUSAL_LM"))
        torch.manual_seed(rank)
        for path, parameter in peft.named_parameters():
            if f".{name}" in path:
                parameter.data = 0.1 * torch.randn_like(parameter)
    return peft.eval()


def sources(peft: PeftModel) -> list[AdapterSource]:
    return [AdapterSource(bound(peft, name, name), weight) for name, weight in zip(NAMES, WEIGHTS, strict=True)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_weighted_sum_is_pefts_cat(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path / "base", family, tied=False)
    peft = three(load(base), TARGETS[family])
    result = merge_adapters(base, sources(peft), tmp_path / "merged")
    assert result.adapter_digests == NAMES
    assert result.comparison.mean_kl < 1e-8
    model: Any = peft
    model.add_weighted_adapter(list(NAMES), list(WEIGHTS), "sum", combination_type="cat")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(load(result.output)), logits(model), atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ties_is_pefts_before_it_cuts_the_rank(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path / "base", family, tied=False)
    peft = three(load(base), TARGETS[family])
    mixing = Mixing(MergeMethod.TIES, density=0.3)
    result = merge_adapters(base, sources(peft), tmp_path / "merged", MergeOptions(mixing=mixing))
    assert result.comparison.mean_kl < 1e-8
    model: Any = peft
    # Of the full rank, so that its SVD loses nothing.
    model.add_weighted_adapter(
        list(NAMES), list(WEIGHTS), "ties", combination_type="ties_svd", svd_rank=64, density=0.3
    )
    model.set_adapter("ties")
    torch.testing.assert_close(logits(load(result.output)), logits(model), atol=1e-4, rtol=0)
    plain = merge_adapters(base, sources(peft), tmp_path / "plain")
    assert (logits(load(plain.output)) - logits(load(result.output))).abs().max() > 1e-2


@pytest.mark.parametrize("method", [MergeMethod.DARE_LINEAR, MergeMethod.DARE_TIES])
def test_dare_is_pefts_for_the_same_draws(tmp_path: Path, method: MergeMethod) -> None:
    base = make_base(tmp_path / "base", "llama")
    peft = three(load(base), [r"model.layers.1.self_attn.q_proj"])
    result = merge_adapters(base, sources(peft), tmp_path / "merged", MergeOptions(mixing=Mixing(method, 0.6, seed=7)))
    name = "model.layers.1.self_attn.q_proj"
    model: Any = peft
    layer = model.get_base_model().get_submodule(name)
    torch.manual_seed(subject_seed(7, f"{name}.weight"))
    # What PEFT's add_weighted_adapter calls for each module; called here, so that nothing else draws before it.
    a, b = model.base_model._svd_generalized_task_arithmetic_weighted_adapter(
        f"{method.replace('-', '_')}_svd", list(NAMES), list(WEIGHTS), 64, layer, None, None, 0.6, "total"
    )
    expected = load(base).get_parameter(f"{name}.weight") + b @ a
    torch.testing.assert_close(load(result.output).get_parameter(f"{name}.weight"), expected, atol=1e-5, rtol=0)


def test_dare_depends_on_the_seed_alone(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    peft = three(load(base), ["q_proj", "v_proj"])

    def files(folder: str, seed: int | None) -> dict[str, str]:
        torch.manual_seed(len(folder))
        options = MergeOptions(mixing=Mixing(MergeMethod.DARE_TIES, seed=seed))
        return dict(merge_adapters(base, sources(peft), tmp_path / folder, options).files)

    assert files("first", 3) == files("again", 3) != files("other", 4)
    assert files("zero", 0) == files("unset", None)


def test_unmerged_is_pefts_unmerged(tmp_path: Path) -> None:
    """The reference that every merge is held against, by itself."""
    base = make_base(tmp_path / "base", "gpt2", tied=False)
    peft = three(load(base), TARGETS["gpt2"])
    parts = tuple(WeightedAdapter(bound(peft, name, name), w) for name, w in zip(NAMES, WEIGHTS, strict=True))
    streamed = unmerged_model(ModelFolder.open(base), Blend(parts), None)
    model: Any = peft
    model.add_weighted_adapter(list(NAMES), list(WEIGHTS), "sum", combination_type="cat")
    model.set_adapter("sum")

    def theirs(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
        return found

    prompts = [IDS[0].tolist(), IDS[1, :5].tolist(), [3]]
    difference = compare(theirs, streamed.logits, prompts)
    assert difference.max_logit_difference < 2e-5
    assert (difference.positions, difference.top1_agreement) == (18, 1.0)


def test_a_merge_takes_a_bounded_number_of_adapters() -> None:
    assert not weight_violations([0.5] * MAX_ADAPTERS)
    (violation,) = weight_violations([0.5] * (MAX_ADAPTERS + 1))
    assert violation.field == "adapters"
