"""The rank that the seed's rules give for a task and a model size, and how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from loraplex.adapters.training.seed_figures import seed
from loraplex.adapters.training.targets import Scope

Task = Literal["classification", "dialogue", "generation", "qa", "summarization", "code", "multimodal"]
Complexity = Literal["simple", "medium", "complex"]
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True)
class TaskRule:
    """How the seed's tables name a task: its complexity, its range of ranks, and its modules."""

    complexity: Complexity
    rank_range: str
    modules: str


# The seed calls generation a dialogue in one place and gives its range in another; question answering and summarization
# are in its table of modules only and are generation for the rest.
RULES: Mapping[Task, TaskRule] = {
    "classification": TaskRule("simple", "classification", "classification"),
    "dialogue": TaskRule("medium", "dialogue", "generation"),
    "generation": TaskRule("medium", "dialogue", "generation"),
    "qa": TaskRule("medium", "dialogue", "qa"),
    "summarization": TaskRule("medium", "dialogue", "summarization"),
    "code": TaskRule("complex", "code", "generation"),
    "multimodal": TaskRule("complex", "multimodal", "generation"),
}


@dataclass(frozen=True)
class RankAdvice:
    """A rank: `proposed` is base * factor, `rank` what is left of it within `lowest` and `highest`."""

    complexity: Complexity
    base: int
    size: str
    factor: float
    proposed: int
    lowest: int
    highest: int
    rank: int

    @property
    def reason(self) -> str:
        """How it came about, the clamp shown."""
        billions = {"small": "under 1B", "medium": "1 to 7B", "large": "7 to 13B", "xlarge": "over 13B"}[self.size]
        text = f"{self.complexity} task {self.base} x {self.factor:g} for a model {billions} = {self.proposed}"
        if self.rank != self.proposed:
            direction = "raised" if self.rank > self.proposed else "lowered"
            return f"{text}, {direction} to {self.rank}: the task's range is {self.lowest} to {self.highest}"
        return f"{text}, within the task's range of {self.lowest} to {self.highest}"


def advise_rank(task: Task, parameters: int, complexity: Complexity | None = None) -> RankAdvice:
    """Return the rank for `task` on a model of so many `parameters`; `complexity` overrides the task's own."""
    rule = RULES[task]
    chosen = complexity or rule.complexity
    base, size = seed("base_rank")[chosen], size_of(parameters)
    factor = seed("size_factor")[size]
    lowest, highest = seed("rank_range")[rule.rank_range]
    proposed = int(base * factor)
    return RankAdvice(chosen, base, size, factor, proposed, lowest, highest, min(max(proposed, lowest), highest))


def size_of(parameters: int) -> str:
    """Return the seed's name for a model size: small, medium, large, xlarge.

    Models are called by rounded numbers, and the seed calls a "7B" model (6.7 billion) large; so from one billion on,
    the count is rounded to whole billions first.
    """
    bounds = seed("size_bounds")
    billions = parameters / 1e9
    if billions < bounds["small"]:
        return "small"
    if round(billions) < bounds["medium"]:
        return "medium"
    return "large" if round(billions) <= bounds["large"] else "xlarge"


def advise_scope(task: Task) -> Scope:
    """Return which modules of each block are adapted for `task`."""
    scope: Scope = seed("task_modules")[RULES[task].modules]
    return scope


def advise_dropout(rows: int) -> tuple[float, str]:
    """Return dropout for so many training rows, and why."""
    for limit, dropout in seed("dropout").items():
        if limit is None or rows < limit:
            why = f"under {limit:,}" if limit is not None else "10,000 or more"
            return dropout, f"{rows:,} rows are {why}: the fewer rows, the more dropout"
    raise AssertionError("the last limit of the seed's table is open")
