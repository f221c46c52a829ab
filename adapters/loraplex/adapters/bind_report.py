"""What was found when an adapter was bound to a base model: where each tensor goes, or why it cannot."""

from __future__ import annotations

from dataclasses import dataclass, field

from loraplex.adapters.errors import FieldViolation, PreconditionError


@dataclass(frozen=True)
class BindEntry:
    """One finding on one tensor or target; `problem` is empty when it is in order, else what is wrong and what to do.

    `module` is the base's module, or empty if it has none; `rank` and `scaling` are 0 where they have no meaning.
    """

    subject: str
    module: str = ""
    rank: int = 0
    scaling: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class BindReport:
    """Where each tensor of an adapter goes in one base model."""

    base_fingerprint: str
    entries: tuple[BindEntry, ...] = field(default=())
    report_id: str = ""

    @property
    def problems(self) -> tuple[BindEntry, ...]:
        """The entries that keep the adapter from being used."""
        return tuple(entry for entry in self.entries if entry.problem)


class BindError(PreconditionError):
    """An adapter that does not fit the base; `report` holds every finding, `violations` the problems among them."""

    def __init__(self, report: BindReport, base: str) -> None:
        """Name the `base` and the first three problems in the message."""
        self.report = report
        self._base = base
        problems = report.problems
        shown = [f"{entry.subject}: {entry.problem}" for entry in problems[:3]]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        super().__init__(
            f"the adapter does not fit the base model {base}: {'; '.join(shown)}",
            [FieldViolation(entry.subject, entry.problem) for entry in problems],
            report.report_id,
        )

    def __reduce__(self) -> tuple[type[BindError], tuple[BindReport, str]]:
        """Say how to make it again, so that it can come from another process."""
        return type(self), (self.report, self._base)
