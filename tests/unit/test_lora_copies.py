"""Copies of the base's matrices in an adapter: left out where they are the base's, kept where they are not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraplex.adapters.binding import BoundAdapter
from loraplex.server.lora.base import BaseParameters
from loraplex.server.lora.copies import without_copies
from loraplex.server.lora.packing import pack_adapter, packed_nbytes
from loraplex.server.lora.weights import LinearSite
from loraplex.server.models.linear import DenseLinear

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
    return BaseParameters(weights, {}, dtype, {}, tables, EMBEDDING, table=TABLE.to(dtype))


def adapter(embedding: torch.Tensor, head: torch.Tensor) -> BoundAdapter:
    return BoundAdapter("sha256:1", {}, parameters={EMBEDDING: embedding, HEAD: head})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_take_no_memory(dtype: torch.dtype) -> None:
    copied = adapter(TABLE.clone(), OUT.clone())
    assert not without_copies(copied, SITES, base(dtype)).parameters
    assert packed_nbytes(copied, SITES, dtype, base(dtype)) == 0
    packed = pack_adapter(copied, SITES, dtype, torch.device("cpu"), base(dtype))
    assert packed.embedding is None
    assert not packed.changes


def test_a_matrix_that_differs_in_one_value_is_the_adapters_own() -> None:
    changed = TABLE.clone()
    changed[3, 3] += 1e-5
    assert without_copies(adapter(changed, OUT), SITES, base()).parameters.keys() == {EMBEDDING}
    assert without_copies(adapter(TABLE, OUT * 2), SITES, base()).parameters.keys() == {HEAD}
    both = adapter(OUT, TABLE)
    assert without_copies(both, SITES, base()) is both


def test_what_cannot_be_compared_is_kept() -> None:
    unknown = replace(base(), table=None)
    assert without_copies(adapter(TABLE, OUT), SITES, unknown).parameters.keys() == {EMBEDDING}
    assert without_copies(adapter(TABLE[:-1], OUT[:-1]), SITES, base()).parameters.keys() == {EMBEDDING, HEAD}
    assert without_copies(adapter(TABLE, OUT), SITES[:1], base()).parameters.keys() == {HEAD}
