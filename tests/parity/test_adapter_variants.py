"""Every kind of adapter in one batch with plain ones and the base: logits equal transformers' with edited weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from loraplex.adapters.binding import BoundAdapter
from loraplex.server.lora.ops.cpu import CpuLoraOps
from loraplex.server.lora.ops.interface import LoraContext, LoraOps
from loraplex.server.lora.ops.reference import ReferenceLoraOps
from loraplex.server.lora.overrides import find_overrides
from loraplex.server.lora.packing import pack_adapter
from loraplex.server.lora.segments import LoraBatch, build_segments
from loraplex.server.lora.weights import PackedAdapter
from loraplex.server.models.loader import LoadedModel, load_model
from tests.parity.adapter_variants import VARIANTS, Draw, Edited, holds_one_scale_only
from tests.parity.paged_rows import PagedRows
from tests.parity.tiny_models import TINY_MODELS, VOCAB

TOLERANCE = 1e-4
# A family each: biases, norms of heads, tied and untied heads, fused modules, norms after, scaled embeddings, soft
# caps, LayerNorms, learned positions, weights stored across.
MODELS = (
    "llama-biases",
    "qwen2-tied",
    "qwen3-windows",
    "phi3-partial-rotary",
    "gemma2-caps",
    "gpt2-tied",
    "gpt2-untied-scales",
)


@dataclass(frozen=True)
class Row:
    """One row of the batch; no adapter is the base. The adapter acts from token `start` on."""

    name: str
    tokens: list[int]
    adapter: BoundAdapter | None
    scale: float = 1.0
    start: int = 0


class Adapters:
    """Makes the context of each pass for rows with adapters of their own; `last_only` as in `PagedRows`."""

    def __init__(
        self, rows: Sequence[Row], slots: Mapping[int, PackedAdapter], ops: LoraOps, *, last_only: bool = False
    ) -> None:
        self._rows, self._slots, self._ops, self._last_only = rows, slots, ops, last_only

    def __call__(self, spans: Sequence[tuple[int, int, int]]) -> LoraContext | None:
        segments = build_segments(entry for span in spans for entry in self._entries(*span))
        kept = [(row, first + count - 1, 1) for row, first, count in spans] if self._last_only else spans
        batch = LoraBatch(segments, build_segments(entry for span in kept for entry in self._entries(*span)))
        tokens, logits = (self._ops.prepare(part, self._slots) for part in (batch.segments, batch.logits_segments))
        return LoraContext(self._ops, tokens, logits, find_overrides(batch, self._slots))

    def _entries(self, index: int, first: int, count: int) -> list[tuple[int, int | None, float]]:
        row = self._rows[index]
        if row.adapter is None:
            return [(count, None, 1.0)]
        before = min(max(row.start - first, 0), count)
        return [(before, None, 1.0), (count - before, index, row.scale)]


def mixed_rows(model: LoadedModel) -> list[Row]:
    """Two base rows and one of each kind, some of them at another scale, some from the middle of the row on."""
    generator = torch.Generator().manual_seed(7)
    rows = [Row("base", [], None)]
    for number, (name, make) in enumerate(VARIANTS.items()):
        adapter = make(model.base, Draw(number))
        rows.append(Row(name, [], adapter))
        if number % 2 and not holds_one_scale_only(adapter):
            rows.append(Row(f"{name} at -0.5", [], adapter, -0.5))
        if name in ("plain", "bias_on_b", "everything"):
            rows.append(Row(f"{name} from token 5", [], adapter, start=5))
    rows.append(Row("base again", [], None))
    lengths = torch.randint(9, 24, (len(rows),), generator=generator).tolist()
    return [
        replace(row, tokens=torch.randint(3, VOCAB, (length,), generator=generator).tolist())
        for row, length in zip(rows, lengths, strict=True)
    ]


def expected_logits(reference: PreTrainedModel, model: LoadedModel, row: Row) -> torch.Tensor:
    adapted = reference if row.adapter is None else Edited(model.base, row.scale).model(reference, row.adapter)
    tokens = torch.tensor([row.tokens])
    with torch.inference_mode():
        if not row.start:
            return torch.as_tensor(adapted(tokens).logits[0])
        before = reference(tokens[:, : row.start], use_cache=True)
        after = adapted(tokens[:, row.start :], past_key_values=before.past_key_values)
        return torch.cat([before.logits[0], after.logits[0]])


def assert_parity(name: str, tmp_path: Path, ops: LoraOps) -> None:
    (tiny,) = (tiny for tiny in TINY_MODELS if tiny.name == name)
    reference = tiny.save(tmp_path)
    model = load_model(str(tmp_path), dtype="float32", max_model_len=tiny.max_model_len)
    rows = mixed_rows(model)
    slots = {
        index: pack_adapter(row.adapter, model.decoder.sites, model.dtype, torch.device("cpu"), model.decoder.base)
        for index, row in enumerate(rows)
        if row.adapter is not None
    }
    paged = PagedRows(model.decoder, [row.tokens for row in rows], model.dtype)
    paged.advance_mixed(Adapters(rows, slots, ops))
    with torch.inference_mode():
        bases = [reference(torch.tensor([row.tokens])).logits[0] for row in rows]
    for row, logits, base in zip(rows, paged.logits, bases, strict=True):
        expected = expected_logits(reference, model, row)
        changes = (expected - base).abs().max().item()
        assert (changes > 0.1) == (row.adapter is not None), f"{row.name} changes the logits by {changes}"
        difference = (torch.stack(logits) - expected).abs().max().item()
        assert difference < TOLERANCE, f"{row.name}: off by {difference}"
    assert_the_last_tokens_alone_agree(model, rows, slots, ops, [logits[-1] for logits in paged.logits])


def assert_the_last_tokens_alone_agree(
    model: LoadedModel,
    rows: Sequence[Row],
    slots: Mapping[int, PackedAdapter],
    ops: LoraOps,
    expected: Sequence[torch.Tensor],
) -> None:
    """Where only the last tokens' logits are wanted, the decoder drops the others within its last layer."""
    paged = PagedRows(model.decoder, [row.tokens for row in rows], model.dtype, last_only=True)
    paged.advance(
        {index: len(row.tokens) for index, row in enumerate(rows)}, Adapters(rows, slots, ops, last_only=True)
    )
    for row, (logits,), wanted in zip(rows, paged.logits, expected, strict=True):
        difference = (logits - wanted).abs().max().item()
        assert difference < TOLERANCE, f"{row.name}, last token alone: off by {difference}"


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_with_edited_weights(name: str, tmp_path: Path) -> None:
    assert_parity(name, tmp_path, CpuLoraOps())


def test_the_reference_operator_does_too(tmp_path: Path) -> None:
    assert_parity("gemma2-caps", tmp_path, ReferenceLoraOps())
