"""How well a model does on held-out rows: its loss, and how many of its answers are right.

Answers are greedy. *Exact*: the answer and nothing else, white space at the ends aside. *Contained*: the expected
answer anywhere in the text, which is fair to a base that was never told how to phrase it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.adapters.training.formatting import Formatter
from loraplex.adapters.training.sample import Sample

_BATCH_ROWS = 32


@dataclass(frozen=True)
class Answer:
    """What a model wrote for a held-out row."""

    prompt: str
    expected: str
    text: str


@dataclass(frozen=True)
class Score:
    """Of one model on held-out rows.

    Attributes:
        loss: cross-entropy in nats a token, of all held-out rows.
        rows: that were answered, or classified.
        accuracy: share of them that is exactly right; None where nothing is answered (plain text).
        contained: share in which the right answer is found; None for plain text and for classes.
    """

    loss: float
    rows: int = 0
    accuracy: float | None = None
    contained: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


def score_answers(loss: float, answers: Sequence[Answer]) -> Score:
    """Return the score of `answers`."""
    if not answers:
        return Score(loss)
    pairs = [(answer.text.strip(), answer.expected.strip()) for answer in answers]
    exact = sum(text == expected for text, expected in pairs) / len(pairs)
    return Score(loss, len(pairs), exact, sum(expected in text for text, expected in pairs) / len(pairs))


@torch.inference_mode()
def answer(model: Any, formatter: Formatter, samples: Sequence[Sample], max_new_tokens: int) -> list[Answer]:
    """Return the greedy answers of `model` to the prompts of `samples`."""
    tokenizer, was_training = formatter.tokenizer, model.training
    model.eval()
    answers = []
    for start in range(0, len(samples), _BATCH_ROWS):
        rows = samples[start : start + _BATCH_ROWS]
        prompts = [{"input_ids": formatter.prompt_ids(row)} for row in rows]
        batch = tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(model.device)
        tokens = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, pad_token_id=tokenizer.pad_token_id
        )
        texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [Answer(_shown(row), row.answer, text) for row, text in zip(rows, texts, strict=True)]
    model.train(was_training)
    return answers


def _shown(sample: Sample) -> str:
    if sample.messages:
        return "\n".join(message.content for message in sample.messages[:-1])
    return sample.prompt
