"""Copies of the base's matrices in an adapter: left out where they are the base's, kept where they are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex.adapters.binding import BoundAdapter
from loraplex.server.lora import copies
from loraplex.server.lora.base import BaseParameters
from loraplex.server.lora.copies import matrix_digest, without_copies
from loraplex.server.lora.packing import pack_adapter, packed_nbytes
from loraplex.server.lora.weights import LinearSite
from loraplex.server.models import quantization
from loraplex.server.models.linear import DenseLinear
from loraplex.server.models.loader import load_model
from loraplex.server.models.panel_linear import RoundedPanelLinear

VOCAB, HIDDEN = 12, 8
EMBEDDING, HEAD = "model.embed.weight", "lm_head.weight"
SITES = (
    LinearSite("q", HIDDEN, HIDDEN, {"q": (0, HIDDEN)}),
    LinearSite("lm_head", HIDDEN, VOCAB, {"lm_head": (0, VOCAB)}),
)
TABLE, OUT = torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN)


def base(dtype: torch.dtype = torch.float32) -> BaseParameters:
    weights = [DenseLinear(torch.eye(HIDDEN).to(dtype)), DenseLinear(OUT.to(dtype))]
    tables = {EMBEDDING: (VOCAB, HIDDEN)}
    digest = matrix_digest(OUT, dtype)
    return BaseParameters(weights, {}, dtype, {}, tables, EMBEDDING, table=TABLE.to(dtype), head_digest=digest)


def adapter(embedding: torch.Tensor, head: torch.Tensor) -> BoundAdapter:
    return BoundAdapter("sha256:1", {}, parameters={EMBEDDING: embedding, HEAD: head})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_take_no_memory(dtype: torch.dtype) -> None:
    copied = adapter(TABLE.clone(), OUT.clone())
    assert not without_copies(copied, base(dtype)).parameters
    assert packed_nbytes(copied, SITES, dtype, base(dtype)) == 0
    packed = pack_adapter(copied, SITES, dtype, torch.device("cpu"), base(dtype))
    assert packed.embedding is None
    assert not packed.changes


def test_a_matrix_that_differs_in_one_value_is_the_adapters_own() -> None:
    changed = TABLE.clone()
    changed[3, 3] += 1e-5
    assert without_copies(adapter(changed, OUT), base()).parameters.keys() == {EMBEDDING}
    assert without_copies(adapter(TABLE, OUT * 2), base()).parameters.keys() == {HEAD}
    both = adapter(OUT, TABLE)
    assert without_copies(both, base()) is both


def test_what_cannot_be_compared_is_kept() -> None:
    unknown = replace(base(), table=None)
    assert without_copies(adapter(TABLE, OUT), unknown).parameters.keys() == {EMBEDDING}
    assert without_copies(adapter(TABLE[:-1], OUT[:-1]), base()).parameters.keys() == {EMBEDDING, HEAD}
    assert without_copies(adapter(TABLE, OUT), replace(base(), head_digest="")).parameters.keys() == {HEAD}


def test_large_matrices_are_compared_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = matrix_digest(OUT, torch.float32)
    monkeypatch.setattr(copies, "_CHUNK_ELEMENTS", 3 * HIDDEN)
    assert matrix_digest(OUT, torch.float32) == whole
    changed = TABLE.clone()
    changed[-1, -1] += 1
    assert without_copies(adapter(changed, OUT), base()).parameters.keys() == {EMBEDDING}


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_served_rounded_has_copies_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    monkeypatch.setattr(quantization, "panels_available", lambda kind: kind == "int16")
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=96, num_hidden_layers=1, tie_word_embeddings=tied, **sizes)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), quantization="nf4", dtype="bfloat16", weight_execution="packed")
    served = model.decoder.base
    assert isinstance(served.weights[-1], RoundedPanelLinear)
    stored = load_file(tmp_path / "model.safetensors")
    table = stored["model.embed_tokens.weight"]
    head = table if tied else stored["lm_head.weight"]
    matrices = {served.embedding: table.clone(), HEAD: head.clone()}
    copied = BoundAdapter("sha256:1", {}, parameters=matrices)
    assert packed_nbytes(copied, model.decoder.sites, torch.bfloat16, served) == 0
    matrices[HEAD][5, 5] *= 1.01  # one step of bfloat16
    assert without_copies(copied, served).parameters.keys() == {HEAD}
