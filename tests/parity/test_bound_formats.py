"""Binding, against PEFT: what a bound adapter means is what PEFT computes, for every format."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from loraplex.adapters.binding import BaseModel, BoundAdapter, bind, bind_report
from loraplex.adapters.formats import read_adapter
from loraplex.adapters.model_folder import ModelFolder
from tests.parity.bound_reference import bound_logits
from tests.parity.peft_formats import FORMATS, INVOCATION, TINY, PeftFormat, peft_logits, tiny_base

CASES = [(base, made) for base, formats in FORMATS.items() for made in formats]
# Two rows with all the tokens that formats train; the first is invoked twice, the second not at all.
TOKENS = torch.tensor([[3, 9, *INVOCATION, 14, 5, *INVOCATION, 7, 4], [6, 9, 3, 14, 22, 5, 40, 4, 7, 31]])


class Bases:
    """The tiny models, written once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.model = cache(self._model)
        self.base = cache(self._base)

    def _model(self, name: str) -> PreTrainedModel:
        return tiny_base(name, self._folder / name)

    def _base(self, name: str) -> BaseModel:
        self.model(name)
        return ModelFolder.open(self._folder / name).base_model()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize(("name", "made"), CASES, ids=[f"{base}-{made.name}" for base, made in CASES])
def test_a_bound_adapter_means_what_peft_computes(bases: Bases, tmp_path: Path, name: str, made: PeftFormat) -> None:
    model, base = bases.model(name), bases.base(name)
    made.save(model, tmp_path)
    adapter = read_adapter(tmp_path)
    bound = bind(adapter, base)
    expected = peft_logits(model, tmp_path, TOKENS)
    with torch.inference_mode():
        plain = model(input_ids=TOKENS).logits
    if made.name != "copies":
        assert (expected - plain).abs().amax() > 0.05, "an adapter without effect would prove nothing"
    torch.testing.assert_close(bound_logits(model, base, bound, TOKENS), expected, rtol=1e-4, atol=1e-4)
    entries = bind_report(adapter, base).entries
    assert {entry.subject for entry in entries} >= _keys(tmp_path)
    assert bound.nbytes == _nbytes(bound)


def _keys(folder: Path) -> set[str]:
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        return set(file.keys())


def _nbytes(bound: BoundAdapter) -> int:
    tensors = [t for w in bound.modules.values() for t in (w.a, w.b, w.magnitude, w.lora_bias)]
    tensors += [
        *bound.parameters.values(),
        *(t for rows in bound.token_rows.values() for t in (rows.tokens, rows.rows)),
    ]
    if bound.embedding is not None:
        tensors += [bound.embedding.a, bound.embedding.b]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def test_the_tiny_models_are_what_the_formats_need(bases: Bases) -> None:
    assert set(FORMATS) <= set(TINY)
    assert {name: bases.base(name).tied for name in FORMATS} == {
        "llama-biases": False,
        "llama-tied-llama3": True,
        "gpt2-tied": True,
        "gpt2-untied-scales": False,
        "phi3-partial-rotary": False,
        "qwen3-tied": True,
        "gemma2-caps": True,
        "gemma2-no-caps": False,
    }
