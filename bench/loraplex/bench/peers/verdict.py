"""Decides from the oracle's scores whether a system answered with the adapters that it was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

GREEDY_SHARE = 0.6
"""Least share of tokens that are the exact model's first choice: 4-bit weights turn a fifth of them around; what falls
below this is another model."""
BASE = ""


CLEARLY, SLACK = 1.5, 0.02
"""A row is wrong if its own adapter leaves more regret than so many times another's, and so many nats: rounding alone
makes near-ties."""


@dataclass(frozen=True)
class Verdict:
    """How a run's answers compare with PEFT in float32. Regrets are means per token in nats, see `oracle`.

    Attributes:
        rows: requests judged.
        rows_right: of them, those that nothing else explains clearly better than their own adapter.
        regret: of the rows under their own adapters.
        other_regret: of the rows under what else explains each best.
        greedy_share: share of tokens that are the exact model's first choice under the row's own adapter.
    """

    rows: int
    rows_right: int
    regret: float
    other_regret: float
    greedy_share: float

    @property
    def correct(self) -> bool:
        """Whether every row had its own adapter, and the model was computed well."""
        own = self.rows_right == self.rows and self.regret < self.other_regret
        return own and self.greedy_share >= GREEDY_SHARE

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**{name: round(value, 4) for name, value in asdict(self).items()}, "correct": self.correct}


def candidates(own: str, adapters: Sequence[str]) -> list[str]:
    """Return what row of adapter `own` (empty: the base) is judged under: first its own, then likely mistakes.

    Those are the base, the first adapter (what a system answers that heeds only one) and the next one (what it answers
    when rows are mixed up).
    """
    others = [BASE, *adapters[:1]]
    if own in adapters:
        others.append(adapters[(adapters.index(own) + 1) % len(adapters)])
    return [own, *dict.fromkeys(other for other in others if other != own)]


def judge(scores: Sequence[Sequence[tuple[float, float]]]) -> Verdict:
    """Return the verdict over rows of (regret, greedy share), each row's own adapter first.

    Raises:
        ValueError: if there are no rows.
    """
    if not scores:
        raise ValueError("no rows to judge")
    own = [row[0][0] for row in scores]
    others = [min(other[0] for other in row[1:]) for row in scores]
    return Verdict(
        rows=len(scores),
        rows_right=sum(mine <= CLEARLY * other + SLACK for mine, other in zip(own, others, strict=True)),
        regret=fmean(own),
        other_regret=fmean(others),
        greedy_share=fmean(row[0][1] for row in scores),
    )


def verdicts_as_json(verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    """Return verdicts by case as plain values."""
    return {case: verdict.as_json() for case, verdict in verdicts.items()}
