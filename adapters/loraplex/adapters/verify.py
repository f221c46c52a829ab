"""Does a server compute what PEFT computes, and does the merged model? Compares the three on the server's own answers.

Each answer is computed again by the others, all of it at once, given the server's tokens: so a position counts by
itself, whatever came before. A server tells the log probabilities of its 20 best tokens only; where it takes part, the
rest of the vocabulary counts as one token, and the KL divergence is a lower bound of the whole one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loraplex.adapters import reference
from loraplex.adapters.compare import Difference
from loraplex.adapters.errors import LoraplexError, PreconditionError
from loraplex.adapters.merge import AdapterSource, MergeOptions, merge_adapters
from loraplex.adapters.merge_plan import MergeBase

LOGITS, LOGPROBS = "logits", "log probabilities"


@dataclass(frozen=True)
class ServedPosition:
    """One output position: the token chosen greedily, and (token, natural log probability) of the best ones."""

    token: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class ServedAnswer:
    """What a server answered to a prompt of token ids."""

    prompt: tuple[int, ...]
    positions: tuple[ServedPosition, ...]

    @property
    def sequence(self) -> list[int]:
        """Prompt and answer but for its last token, after which nothing was computed."""
        return [*self.prompt, *(position.token for position in self.positions[:-1])]


@dataclass(frozen=True)
class PairDifference:
    """How far the second of a pair is from the first.

    Attributes:
        pair: what is compared, e.g. "PEFT and merged".
        measure: what the largest difference is of.
        max_difference: over all positions and tokens compared.
        top1_agreement: share of positions with the same most likely token.
        mean_kl: in nats, over positions.
    """

    pair: str
    measure: str
    max_difference: float
    top1_agreement: float
    mean_kl: float
    positions: int


@dataclass(frozen=True)
class VerifyJob:
    """What is compared: base model and adapter as folders, how the server quantizes, what it answered.

    `scratch` is a folder for the merged model, which takes the base's size, or four bytes a parameter if quantized.
    """

    model: Path
    adapter: Path
    quantization: str | None
    answers: tuple[ServedAnswer, ...]
    scratch: Path

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), **{name: str(getattr(self, name)) for name in ("model", "adapter", "scratch")}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> VerifyJob:
        """Undo `to_json`."""
        answers = tuple(
            ServedAnswer(
                tuple(answer["prompt"]),
                tuple(
                    ServedPosition(position["token"], tuple((token, logprob) for token, logprob in position["top"]))
                    for position in answer["positions"]
                ),
            )
            for answer in values["answers"]
        )
        paths = {name: Path(values[name]) for name in ("model", "adapter", "scratch")}
        return cls(quantization=values["quantization"], answers=answers, **paths)


@dataclass(frozen=True)
class Verified:
    """The differences of each pair; `not_merged` says why there is no merged model, if there is none."""

    pairs: tuple[PairDifference, ...]
    not_merged: str = ""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Verified:
        """Undo `dataclasses.asdict`."""
        return cls(tuple(PairDifference(**pair) for pair in values["pairs"]), values["not_merged"])


def verify(job: VerifyJob, progress: Callable[[str, int, int], None]) -> Verified:
    """Return the differences of each pair of server, PEFT and merged model, if the adapter can be merged.

    `progress` hears the phase, how much of it is done and how much there is.

    Raises:
        PreconditionError: the model or the adapter cannot be read.
    """
    try:
        adapted = reference.adapted_model(job.model, job.adapter, job.quantization)
    except (ValueError, RuntimeError) as error:
        raise PreconditionError(f"PEFT cannot load the adapter into {job.model}: {error!s:.500}") from error
    unmerged = _all_logits(adapted, job.answers, lambda *done: progress("PEFT", *done))
    del adapted
    output = job.scratch / "merged"
    options = MergeOptions(
        base=MergeBase.DEQUANTIZED if job.quantization else MergeBase.FULL_PRECISION,
        quantization=job.quantization,
        # Whatever it is, it is told here.
        max_mean_kl=math.inf,
    )
    served = served_difference("PEFT and server", job.answers, unmerged)
    try:
        merge_adapters(job.model, [AdapterSource(job.adapter)], output, options, progress)
    except LoraplexError as error:  # a full disk, too: what is compared already is worth telling
        return Verified((served,), str(error))
    merged = _all_logits(reference.plain_model(output), job.answers, lambda *done: progress("merged", *done))
    return Verified(
        (
            served,
            served_difference("merged and server", job.answers, merged),
            _logit_difference("PEFT and merged", unmerged, merged),
        )
    )


def served_difference(pair: str, answers: Sequence[ServedAnswer], logits: Sequence[torch.Tensor]) -> PairDifference:
    """Return how far the server is from `logits` (positions, vocabulary), one for each of its answers."""
    largest, kl, agreed, count = 0.0, 0.0, 0, 0
    for answer, rows in zip(answers, logits, strict=True):
        for position, row in zip(answer.positions, rows.double().log_softmax(-1), strict=True):
            tokens = torch.tensor([token for token, _ in position.top])
            served = torch.tensor([logprob for _, logprob in position.top], dtype=torch.float64)
            largest = max(largest, float((served - row[tokens]).abs().max()))
            kl += _lumped_kl(row[tokens], served)
            agreed += int(row.argmax()) == position.token
            count += 1
    return PairDifference(pair, LOGPROBS, largest, agreed / count, kl / count, count)


def _lumped_kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return KL(reference || other) over some tokens (log probabilities) and all others as one."""
    p, q = (torch.cat([x.exp(), (1 - x.exp().sum()).clamp(min=1e-12)[None]]) for x in (reference, other))
    return float((p * (p / q).log()).sum())


def _logit_difference(pair: str, left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> PairDifference:
    difference = Difference()
    for reference_rows, rows in zip(left, right, strict=True):
        difference.add(reference_rows, rows)
    found = difference.total()
    return PairDifference(
        pair, LOGITS, found.max_logit_difference, found.top1_agreement, found.mean_kl, found.positions
    )


def _all_logits(
    model: Any, answers: Sequence[ServedAnswer], progress: Callable[[int, int], None]
) -> list[torch.Tensor]:
    """Return the logits at each answer's positions."""
    found = []
    for done, answer in enumerate(answers, start=1):
        rows = reference.logits(model, answer.sequence)
        found.append(rows[len(answer.prompt) - 1 :].clone())
        progress(done, len(answers))
    return found
