"""The GPU's kernels inside whole models, interpreted on the CPU: logits equal transformers' with the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from loraplex.server.attention.triton import TritonAttention
from loraplex.server.lora.ops.interface import LoraContext
from loraplex.server.lora.ops.triton import TritonLoraOps
from loraplex.server.lora.packing import pack_adapter
from loraplex.server.lora.segments import Segment
from loraplex.server.models.loader import load_model
from tests.parity.paged_rows import PagedRows
from tests.parity.test_families import TOLERANCE, merge, random_adapter, sequences
from tests.parity.tiny_models import TINY_MODELS
from tests.triton_interpreter import INTERPRETED

CPU = torch.device("cpu")


@pytest.mark.skipif(not INTERPRETED, reason="the models are on the CPU, where kernels are only interpreted")
@pytest.mark.parametrize("name", ["llama-biases", "qwen3-windows", "gemma2-caps", "gpt2-tied"])
def test_models_with_an_adapter(name: str, tmp_path: Path) -> None:
    (tiny,) = (tiny for tiny in TINY_MODELS if tiny.name == name)
    reference = tiny.save(tmp_path)
    model = load_model(str(tmp_path), dtype="float32")
    model.decoder.attention = TritonAttention()
    ops, adapter = TritonLoraOps(CPU), random_adapter(model)
    packed = pack_adapter(adapter, model.decoder.sites, torch.float32, CPU)

    def lora(passed: Sequence[tuple[int, int, int]]) -> LoraContext:
        # The second row is the base's, and comes first where it alone has one token.
        counts = [count for _, _, count in passed]
        place = [row for row, _, _ in passed].index(0)
        start, tokens = sum(counts[:place]), counts[place]
        prepared = ops.prepare([Segment(start, start + tokens, slot=0)], {0: packed})
        return LoraContext(ops, tokens=prepared, logits=prepared)

    adapted, base = sequences()[0], sequences()[1]
    rows = PagedRows(model.decoder, [adapted, base], model.dtype)
    for counts in ({0: 20, 1: 12}, {0: 8, 1: 1}, {0: 1}):
        rows.advance(counts, lora)
    expected_base = reference(torch.tensor([base])).logits[0]
    torch.testing.assert_close(torch.stack(rows.logits[1]), expected_base, atol=TOLERANCE, rtol=0)
    unchanged = reference(torch.tensor([adapted])).logits[0]
    merge(reference, adapter, transposed=model.base.conv1d)
    expected = reference(torch.tensor([adapted])).logits[0]
    assert (expected - unchanged).abs().max() > 0.1
    torch.testing.assert_close(torch.stack(rows.logits[0]), expected, atol=TOLERANCE, rtol=0)
