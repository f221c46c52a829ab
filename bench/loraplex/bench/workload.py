"""What is asked of a server in one measured run: how many requests, at once, for which adapters. Sends nothing."""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass

BASE = "base"
"""Stands for the base model alone in a list of adapters; no adapter can have this name."""

# fmt: off
_ADJECTIVES = (
    "old", "young", "quiet", "bright", "cold", "small", "green", "happy", "strange", "empty", "gentle", "broken",
    "proud", "silver", "dark",
)
_NOUNS = (
    "river", "teacher", "garden", "city", "horse", "winter", "letter", "doctor", "bridge", "forest", "child",
    "market", "sailor", "window", "king",
)
_VERBS = (
    "found", "followed", "watched", "carried", "painted", "opened", "remembered", "needed", "reached", "sold",
    "crossed", "built", "lost",
)
_PLACES = (
    "station", "mountain", "harbor", "school", "kitchen", "island", "village", "church", "castle", "library",
    "valley", "field", "road",
)
# fmt: on


class Assignment(enum.StrEnum):
    """Which adapter each request names."""

    ROUND_ROBIN = "round-robin"
    """The adapters in turn, from the first again after the last."""
    DISTINCT = "distinct"
    """One adapter for each request, none twice."""
    IDENTICAL = "identical"
    """The first adapter for all."""
    ZIPF = "zipf"
    """Drawn anew for each request: the k-th adapter with a probability proportional to 1 / k."""
    BASE = "base"
    """No adapter at all."""


@dataclass(frozen=True)
class PlannedRequest:
    """One request of a run; `adapter` is empty for the base."""

    index: int
    prompt: str
    adapter: str


@dataclass(frozen=True)
class Workload:
    """One run. Equal workloads plan equal requests, prompts included.

    Attributes:
        concurrency: requests in flight at most; the next is sent when one has ended (a closed loop).
        requests: requests in all.
        prompt_tokens: length of each prompt, counted as words and punctuation marks, which is close to what a byte-pair
            tokenizer for English makes of it.
        max_tokens: output tokens of each request.
        adapters: names to choose from; `base` is the base model alone.
        assignment: how they are given out.
        ignore_eos: go on to `max_tokens` whatever the model says, so that every run computes the same amount.
        seed: of the prompts, and of the draw of adapters.
        series: part of the prompts' seed: runs of other series find none of their prefixes in the server's cache.
    """

    concurrency: int = 16
    requests: int = 16
    prompt_tokens: int = 30
    max_tokens: int = 128
    adapters: tuple[str, ...] = ()
    assignment: Assignment = Assignment.BASE
    ignore_eos: bool = True
    seed: int = 0
    series: str = ""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: naming what is out of range.
        """
        for name in ("concurrency", "requests", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.prompt_tokens < 4:
            raise ValueError(f"prompt_tokens must be at least 4, got {self.prompt_tokens}")
        if self.assignment is not Assignment.BASE and not self.adapters:
            raise ValueError(f"assignment {self.assignment} needs adapters")
        if self.assignment is Assignment.DISTINCT and len(set(self.adapters)) < self.requests:
            raise ValueError(f"{self.requests} distinct requests need as many adapters, got {len(set(self.adapters))}")

    def plan(self) -> tuple[PlannedRequest, ...]:
        """Return the requests in the order in which they are sent."""
        names = self._names()
        return tuple(PlannedRequest(index, self._prompt(index), names[index]) for index in range(self.requests))

    def _names(self) -> list[str]:
        """Return each request's adapter."""
        match self.assignment:
            case Assignment.BASE:
                names = [BASE] * self.requests
            case Assignment.IDENTICAL:
                names = [self.adapters[0]] * self.requests
            case Assignment.ZIPF:
                weights = [1 / rank for rank in range(1, len(self.adapters) + 1)]
                names = random.Random(f"zipf/{self.seed}").choices(self.adapters, weights, k=self.requests)
            case Assignment.ROUND_ROBIN | Assignment.DISTINCT:
                names = [self.adapters[index % len(self.adapters)] for index in range(self.requests)]
        return ["" if name == BASE else name for name in names]

    def _prompt(self, index: int) -> str:
        """Return English text that no other request of the run starts with, so that none finds another's prefix."""
        draw = random.Random(f"{self.series}/{self.seed}/{index}")
        words = ["Chapter", str(index + 1), ":"]
        while len(words) < self.prompt_tokens:
            subject, thing = draw.choice(_NOUNS), draw.choice(_NOUNS)
            words += ["The", draw.choice(_ADJECTIVES), subject, draw.choice(_VERBS)]
            words += ["the", draw.choice(_ADJECTIVES), thing, "near", "the", draw.choice(_PLACES), "."]
        text = " ".join(words[: self.prompt_tokens])
        return text.replace(" :", ":").replace(" .", ".")
