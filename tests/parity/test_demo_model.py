"""The demo's base model gives transformers' logits, in float32 and over the paged cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.server.models.loader import load_model
from tests.parity.paged_rows import PagedRows

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a village by the sea, there lived a fisherman who",
)
# Logits of this model reach 30, where float32 resolves 2e-6; thirty layers of sums lie between.
TOLERANCE = 2e-4


@pytest.mark.slow
def test_logits_equal_transformers(demo_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_path)
    sequences = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    reference = AutoModelForCausalLM.from_pretrained(demo_path, dtype=torch.float32, attn_implementation="eager")
    model = load_model(str(demo_path), dtype="float32")
    rows = PagedRows(model.decoder, sequences, model.dtype)
    rows.advance_mixed()
    for tokens, ours in zip(sequences, rows.logits, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([tokens])).logits[0]
        actual = torch.stack(ours)
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
        assert torch.equal(actual.argmax(-1), expected.argmax(-1))
