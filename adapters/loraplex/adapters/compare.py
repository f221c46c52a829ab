"""How far apart two models are: largest logit difference, agreement of the best token, KL divergence.

Knows logits only, not where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Tokens that are computed at a time: two float32 logits of a vocabulary of 150,000 for them take 600 MB.
BATCH_TOKENS = 512
# Positions whose probabilities are computed at a time, in float64.
_CHUNK = 64
# (ids, mask), both (batch, tokens), to logits (batch, tokens, vocabulary).
Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """The difference of a model from a reference.

    Attributes:
        max_logit_difference: over all positions and tokens.
        top1_agreement: share of positions with the same most likely token.
        mean_kl: of the model from the reference, in nats, over positions.
        positions: how many there were.
    """

    max_logit_difference: float
    top1_agreement: float
    mean_kl: float
    positions: int


class Difference:
    """Adds up a comparison, some positions at a time."""

    def __init__(self) -> None:
        self._max = 0.0
        self._agreed = 0
        self._kl = 0.0
        self._positions = 0

    def add(self, reference: torch.Tensor, other: torch.Tensor) -> None:
        """Take the logits (positions, vocabulary) of both at the same positions.

        NaN on one side makes the difference NaN.
        """
        for left, right in zip(torch.split(reference, _CHUNK), torch.split(other, _CHUNK), strict=True):
            largest = float((left - right).abs().max())
            self._max = largest if math.isnan(largest) else max(self._max, largest)
            self._agreed += int((left.argmax(-1) == right.argmax(-1)).sum())
            log_p, log_q = left.double().log_softmax(-1), right.double().log_softmax(-1)
            self._kl += float((log_p.exp() * (log_p - log_q)).sum())
        self._positions += len(reference)

    def total(self) -> Comparison:
        """Return the comparison so far; there must be at least one position."""
        return Comparison(self._max, self._agreed / self._positions, self._kl / self._positions, self._positions)


def compare(reference: Logits, other: Logits, prompts: Sequence[Sequence[int]]) -> Comparison:
    """Compare the two models on every position of `prompts` (token ids)."""
    difference = Difference()
    for batch in batches(prompts):
        ids, mask = padded(batch)
        kept = mask.bool()
        difference.add(reference(ids, mask)[kept], other(ids, mask)[kept])
    return difference.total()


def batches(prompts: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Put prompts of similar length together, at most `BATCH_TOKENS` tokens with the padding (one prompt at least)."""
    found: list[list[Sequence[int]]] = []
    for prompt in sorted(prompts, key=len):
        # Sorted, so the last one is the longest and says how wide the batch is.
        if found and (len(found[-1]) + 1) * len(prompt) <= BATCH_TOKENS:
            found[-1].append(prompt)
        else:
            found.append([prompt])
    return found


def padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask (batch, tokens) int64, padded on the right, where causal attention does not see it."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
    return ids, mask
