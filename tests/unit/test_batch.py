"""Building a batch: positions, slots and logits rows of decodes and prompt chunks side by side."""

from __future__ import annotations

import pytest
import torch

from loraplex.server.engine.model_runner import build_batch
from loraplex.server.engine.request import GenerationRequest, SamplingParams
from loraplex.server.engine.scheduler import ScheduledSequence
from loraplex.server.engine.sequence import Sequence
from loraplex.server.lora.segments import Segment

CPU = torch.device("cpu")


def scheduled(
    tokens: list[int], computed: int, count: int, table: list[int], digest: str | None = None, start: int | None = 0
) -> ScheduledSequence:
    request = GenerationRequest("r", tuple(tokens), SamplingParams(seed=0), adapter_digest=digest, adapter_start=start)
    seq = Sequence(request, 0, 0.0)
    seq.num_computed_tokens = computed
    seq.block_table = table
    return ScheduledSequence(seq, count)


def test_a_decode_and_a_chunk() -> None:
    decode = scheduled([10, 11, 12, 13, 14], 4, 1, [7, 3], digest="a")
    chunk = scheduled([20, 21, 22, 23, 24, 25, 26, 27, 28], 2, 4, [5, 6, 1])
    batch = build_batch([decode, chunk], {"a": 9}.__getitem__, 4, CPU)
    assert batch.token_ids.tolist() == [14, 22, 23, 24, 25]
    assert batch.positions.tolist() == [4, 2, 3, 4, 5]
    assert batch.slot_mapping.tolist() == [12, 22, 23, 24, 25]
    assert batch.query_start.tolist() == [0, 1, 5]
    assert batch.context_lens.tolist() == [5, 6]
    assert batch.block_tables.tolist() == [[7, 3, 0], [5, 6, 1]]
    assert batch.logits_indices.tolist() == [0], "the chunk does not reach the end of its prompt"
    assert batch.num_decodes == 1
    assert batch.lora is not None
    assert batch.lora.segments == (Segment(0, 1, 9, 1.0),)
    assert batch.lora.logits_segments == (Segment(0, 1, 9, 1.0),)


def test_logits_segments_count_only_rows_that_sample() -> None:
    chunk = scheduled([1] * 9, 0, 4, [0, 1, 2], digest="a")
    whole = scheduled([2] * 3, 0, 3, [3], digest="b")
    batch = build_batch([chunk, whole], {"a": 0, "b": 1}.__getitem__, 4, CPU)
    assert batch.lora is not None
    assert batch.lora.segments == (Segment(0, 4, 0), Segment(4, 7, 1))
    assert batch.lora.logits_segments == (Segment(0, 1, 1),)
    assert batch.logits_indices.tolist() == [6]


@pytest.mark.parametrize(
    ("computed", "count", "start", "segments"),
    [
        (0, 6, 0, (Segment(1, 7, 0),)),
        (0, 6, 4, (Segment(5, 7, 0),)),
        (0, 3, 4, ()),
        (2, 4, 4, (Segment(3, 5, 0),)),
        (4, 2, 4, (Segment(1, 3, 0),)),
        (5, 1, 2, (Segment(1, 2, 0),)),
        (0, 6, None, ()),
    ],
)
def test_an_adapter_acts_from_its_start_on(
    computed: int, count: int, start: int | None, segments: tuple[Segment, ...]
) -> None:
    row = scheduled([1] * 6, computed, count, [0, 1], digest="a", start=start)
    other = scheduled([2] * 9, 8, 1, [2, 3, 4])
    lora = build_batch([other, row], lambda digest: 0, 4, CPU).lora
    assert (() if lora is None else lora.segments) == segments
    samples = bool(segments) and computed + count == 6
    assert (() if lora is None else lora.logits_segments) == ((Segment(1, 2, 0),) if samples else ())


def test_no_adapter_no_segments() -> None:
    assert build_batch([scheduled([1, 2], 0, 2, [0])], lambda digest: 0, 4, CPU).lora is None


def test_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        build_batch([], lambda digest: 0, 4, CPU)
