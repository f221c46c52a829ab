"""Embeddings and norms that adapters bring along: packed, counted, moved, refused, and found in a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraplex.adapters.binding import BoundAdapter, EmbeddingWeights, TokenRows
from loraplex.server.lora.base import BaseNorm, BaseParameters
from loraplex.server.lora.overrides import find_overrides
from loraplex.server.lora.packing import pack_adapter, packed_nbytes
from loraplex.server.lora.segments import LoraBatch, Segment
from loraplex.server.lora.weights import LinearSite, PackedAdapter
from loraplex.server.models.norms import make_norm, norm_tensors

CPU = torch.device("cpu")
VOCAB, HIDDEN = 10, 16
ONE_ROW = TokenRows(torch.arange(1), torch.ones(1, HIDDEN))
HEAD = LinearSite("lm_head", HIDDEN, VOCAB, {"lm_head": (0, VOCAB)})
NORM = BaseNorm(
    {"norm.weight": torch.ones(HIDDEN), "norm.bias": torch.zeros(HIDDEN)},
    lambda parameters: norm_tensors("layer", parameters["norm.weight"], parameters["norm.bias"], torch.float32),
    lambda tensors: make_norm("layer", 1e-5, tensors, torch.float32),
)
BASE = BaseParameters(
    weights=[],
    biases={},
    activations=torch.float32,
    norms={"final_norm": NORM},
    tables={"embed.weight": (VOCAB, HIDDEN), "positions.weight": (7, HIDDEN)},
    embedding="embed.weight",
    positions="positions.weight",
)


def pack(bound: BoundAdapter, dtype: torch.dtype = torch.float32) -> PackedAdapter:
    packed = pack_adapter(bound, [HEAD], dtype, CPU, BASE)
    assert packed.nbytes == packed_nbytes(bound, [HEAD], dtype, BASE)
    return packed


def adapter(**changes: object) -> BoundAdapter:
    return replace(BoundAdapter("sha256:1", {}), **changes)  # type: ignore[arg-type]


def test_a_norm_takes_what_it_does_not_change_from_the_base() -> None:
    packed = pack(adapter(parameters={"norm.bias": torch.full((HIDDEN,), 2.0)}))
    x = torch.randn(3, HIDDEN)
    torch.testing.assert_close(packed.norms["final_norm"].norm(x), NORM.norm()(x) + 2)


def test_a_tied_matrix_lies_there_once() -> None:
    table = torch.randn(VOCAB, HIDDEN).bfloat16()
    both = pack(adapter(parameters={"embed.weight": table, "lm_head.weight": table}))
    assert both.embedding is not None
    assert both.embedding.table is not None
    assert both.embedding.table.data_ptr() == both.changes[0].columns[0].weight.data_ptr()
    assert both.nbytes == table.numel() * 4
    # Alone it stays as narrow as it came: looking up widens exactly.
    assert pack(adapter(parameters={"embed.weight": table})).nbytes == table.nbytes


def test_everything_moves() -> None:
    rows = TokenRows(torch.tensor([1, 4]), torch.randn(2, HIDDEN))
    lora = EmbeddingWeights(torch.randn(3, VOCAB), torch.randn(HIDDEN, 3), 0.5)
    tables = {"embed.weight": torch.randn(VOCAB, HIDDEN), "positions.weight": torch.randn(7, HIDDEN)}
    parameters = {**tables, "norm.weight": torch.randn(HIDDEN)}
    packed = pack(adapter(parameters=parameters, token_rows={"embed.weight": rows}, embedding=lora))
    away = packed.to(torch.device("meta"))
    for one, other in ((packed, "cpu"), (away, "meta")):
        found = one.embedding
        assert found is not None
        assert found.lora is not None
        assert found.rows is not None
        tensors = (found.table, found.positions, found.rows.tokens, found.rows.rows, found.lora.a_t, found.lora.b_t)
        for tensor in (*tensors, *one.norms["final_norm"].tensors):
            assert tensor is not None
            assert tensor.device.type == other


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"parameters": {"embed.weight": torch.ones(VOCAB, 3)}}, r"embed\.weight: \(10, 3\)"),
        ({"parameters": {"positions.weight": torch.ones(8, HIDDEN)}}, r"positions\.weight"),
        ({"parameters": {"norm.weight": torch.ones(3)}}, r"norm\.weight: \(3,\)"),
        ({"parameters": {"other.weight": torch.ones(3)}}, r"parameters other\.weight"),
        (
            {"token_rows": {"norm.weight": ONE_ROW}},
            r"token_rows norm\.weight",
        ),
        ({"token_rows": {"embed.weight": replace(ONE_ROW, tokens=torch.arange(2))}}, "token rows"),
        ({"embedding": EmbeddingWeights(torch.ones(2, 9), torch.ones(HIDDEN, 2), 1.0)}, "A of the embedding"),
        ({"embedding": EmbeddingWeights(torch.ones(2, VOCAB), torch.ones(HIDDEN, 3), 1.0)}, "B of the embedding"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        pack(adapter(**changes))


def test_without_a_base_nothing_of_it_is_dropped() -> None:
    lora = EmbeddingWeights(torch.ones(2, VOCAB), torch.ones(HIDDEN, 2), 1.0)
    for changes in ({"embedding": lora}, {"parameters": {"norm.weight": torch.ones(HIDDEN)}}):
        with pytest.raises(ValueError, match="does not have"):
            pack_adapter(adapter(**changes), [HEAD], torch.float32, CPU)


def test_only_segments_with_overrides_are_found() -> None:
    plain = pack(adapter())
    changed = pack(adapter(parameters={"norm.bias": torch.ones(HIDDEN)}))
    segments = (Segment(0, 1, 0), Segment(1, 4, 1), Segment(4, 5, 0))
    found = find_overrides(LoraBatch(segments, segments[1:2]), {0: plain, 1: changed})
    assert found is not None
    assert found.tokens == ((segments[1], changed),)
    assert found.logits == ((segments[1], changed),)
    assert find_overrides(LoraBatch(segments[:1], ()), {0: plain}) is None
