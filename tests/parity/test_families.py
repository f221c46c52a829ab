"""Every family's logits equal transformers', over prompts in chunks and step by step; adapters reach every target."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from loraplex.adapters.binding import BoundAdapter, ModuleWeights
from loraplex.server.lora.ops.interface import LoraContext
from loraplex.server.lora.ops.reference import ReferenceLoraOps
from loraplex.server.lora.packing import pack_adapter
from loraplex.server.lora.segments import Segment
from loraplex.server.lora.weights import PackedAdapter
from loraplex.server.models.families import FAMILIES
from loraplex.server.models.family import Family
from loraplex.server.models.loader import LoadedModel, load_model
from tests.parity.paged_rows import PagedRows
from tests.parity.tiny_models import TINY_MODELS, VOCAB, TinyModel

LENGTHS = (29, 13, 22)
TOLERANCE = 1e-4


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def reference_logits(model: PreTrainedModel) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([tokens])).logits[0].float() for tokens in sequences()]


def our_logits(model: LoadedModel, lora: LoraContext | None = None) -> list[torch.Tensor]:
    rows = PagedRows(model.decoder, sequences(), model.dtype)
    rows.advance_mixed(lora)
    return [torch.stack(logits) for logits in rows.logits]


@pytest.fixture(params=TINY_MODELS, ids=lambda tiny: tiny.name)
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    model: TinyModel = request.param
    return model


def test_every_family_is_here() -> None:
    assert {tiny.model_type for tiny in TINY_MODELS} == {family.model_type for family in FAMILIES.values()}


def test_logits_equal_transformers(tiny: TinyModel, tmp_path: Path) -> None:
    reference = tiny.save(tmp_path)
    expected = reference_logits(reference)
    assert all(row.std() > 0.3 for row in expected), "a model without differences proves nothing"
    model = load_model(str(tmp_path), dtype="float32", max_model_len=tiny.max_model_len)
    assert model.eos_token_ids == (2,)
    at_once = PagedRows(model.decoder, sequences(), model.dtype)
    at_once.advance(dict(enumerate(LENGTHS)))
    whole = [torch.stack(logits) for logits in at_once.logits]
    for mixed, prefilled, theirs in zip(our_logits(model), whole, expected, strict=True):
        torch.testing.assert_close(mixed, theirs, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(prefilled, theirs, atol=TOLERANCE, rtol=0)


# A family each, and both ways of packing.
ADAPTED = ("llama-biases", "qwen3-windows", "phi3-partial-rotary", "gemma2-caps", "gpt2-untied-scales", "gpt2-tied")


def random_adapter(model: LoadedModel) -> BoundAdapter:
    """An adapter on every linear module there is, of another rank on each."""
    generator = torch.Generator().manual_seed(3)
    modules = {}
    for index, module in enumerate(model.base.modules.values()):
        rank = 1 + index % 5
        a = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
        b = torch.randn(module.out_features, rank, generator=generator) / rank**0.5
        modules[module.name] = ModuleWeights(a, b, scaling=0.5)
    return BoundAdapter("sha256:test", modules)


def merge(model: PreTrainedModel, adapter: BoundAdapter, *, transposed: bool) -> None:
    """Add the adapter to transformers' weights; lm_head gets a matrix of its own first."""
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        for name, weights in adapter.modules.items():
            delta = weights.scaling * weights.b @ weights.a
            weight = model.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            weight.add_(delta.T if transposed and name != "lm_head" else delta)


def lora_context(model: LoadedModel, packed: PackedAdapter, tokens: int) -> LoraContext:
    ops = ReferenceLoraOps()
    prepared = ops.prepare([Segment(0, tokens, slot=0)], {0: packed})
    return LoraContext(ops, tokens=prepared, logits=prepared)


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_reach_every_linear_module(name: str, tmp_path: Path) -> None:
    (tiny,) = (tiny for tiny in TINY_MODELS if tiny.name == name)
    reference = tiny.save(tmp_path)
    model = load_model(str(tmp_path), dtype="float32")
    linears = {
        path for path, m in reference.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"
    }
    assert set(model.base.modules) == linears
    assert model.base.parameters == {
        path: tuple(p.shape) for path, p in reference.named_parameters() if path.removesuffix(".weight") not in linears
    }
    assert reference.get_parameter(model.base.embedding) is reference.get_input_embeddings().weight
    assert model.base.tied == (reference.lm_head.weight is reference.get_input_embeddings().weight)
    adapter = random_adapter(model)
    packed = pack_adapter(adapter, model.decoder.sites, torch.float32, torch.device("cpu"))
    tokens = sequences()[0]
    rows = PagedRows(model.decoder, [tokens], model.dtype)
    rows.advance({0: len(tokens)}, lora_context(model, packed, len(tokens)))
    base = reference(torch.tensor([tokens])).logits[0]
    merge(reference, adapter, transposed=model.base.conv1d)
    expected = reference(torch.tensor([tokens])).logits[0]
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(torch.stack(rows.logits[0]), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_defaults_are_those_of_transformers(family: Family) -> None:
    whole = AutoConfig.for_model(family.model_type).to_dict()
    assert family.read({}) == family.read(whole)
    assert family.reader({}).get("eos_token_id") == whole["eos_token_id"]


@pytest.mark.parametrize("name", ["llama-tied-llama3", "gemma2-caps", "gpt2-tied"])
def test_bfloat16_is_as_close_as_transformers(name: str, tmp_path: Path) -> None:
    (tiny,) = (tiny for tiny in TINY_MODELS if tiny.name == name)
    reference = tiny.save(tmp_path)
    exact = reference_logits(reference)
    theirs = reference_logits(reference.bfloat16())
    ours = our_logits(load_model(str(tmp_path), dtype="bfloat16"))
    for row, (a, b, c) in enumerate(zip(exact, theirs, ours, strict=True)):
        error, accepted = (c - a).pow(2).mean().sqrt(), (b - a).pow(2).mean().sqrt()
        assert error < 1.5 * accepted, f"row {row}: {error} against {accepted}"


def test_only_wanted_rows_reach_the_head(tmp_path: Path) -> None:
    tiny = TINY_MODELS[0]
    expected = reference_logits(tiny.save(tmp_path))
    model = load_model(str(tmp_path), dtype="float32")
    rows = PagedRows(model.decoder, sequences(), model.dtype, last_only=True)
    rows.advance(dict(enumerate(LENGTHS)))
    for ours, theirs in zip(rows.logits, expected, strict=True):
        torch.testing.assert_close(torch.stack(ours), theirs[-1:], atol=TOLERANCE, rtol=0)
