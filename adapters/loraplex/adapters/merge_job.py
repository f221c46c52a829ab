"""A merge as plain JSON values: what a process of its own is told, and what it says at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraplex.adapters.compare import Comparison
from loraplex.adapters.merge import AdapterSource, MergeOptions, MergeResult
from loraplex.adapters.merge_methods import MergeMethod, Mixing
from loraplex.adapters.merge_plan import MergeBase
from loraplex.adapters.speed_command import SpeedFigures


@dataclass(frozen=True)
class MergeJob:
    """The arguments of `merge_adapters`; the adapters are folders, each with its weight.

    `threads` is how many the process may use; 0 leaves PyTorch's choice.
    """

    model_dir: Path
    adapters: tuple[tuple[Path, float], ...]
    output: Path
    options: MergeOptions = field(default_factory=MergeOptions)
    threads: int = 0

    @property
    def sources(self) -> tuple[AdapterSource, ...]:
        """The adapters as `merge_adapters` takes them."""
        return tuple(AdapterSource(folder, weight) for folder, weight in self.adapters)

    def to_json(self) -> dict[str, Any]:
        """Return plain values. A dtype other than the default is not among them."""
        assert self.options.dtype is None
        options = asdict(self.options)
        del options["dtype"]
        return {
            "model_dir": str(self.model_dir),
            "adapters": [[str(folder), weight] for folder, weight in self.adapters],
            "output": str(self.output),
            "options": options,
            "threads": self.threads,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> MergeJob:
        """Undo `to_json`."""
        options = dict(values["options"])
        mixing = options.pop("mixing")
        return cls(
            Path(values["model_dir"]),
            tuple((Path(folder), weight) for folder, weight in values["adapters"]),
            Path(values["output"]),
            MergeOptions(
                base=MergeBase(options.pop("base")),
                mixing=Mixing(MergeMethod(mixing["method"]), mixing["density"], mixing["seed"]),
                prompts=tuple(options.pop("prompts")),
                speed_command=tuple(options.pop("speed_command")),
                **options,
            ),
            values["threads"],
        )


@dataclass(frozen=True)
class MergeReport:
    """What a merge process says at the end."""

    adapter_digests: tuple[str, ...]
    comparison: Comparison
    speed: tuple[SpeedFigures, ...]

    @classmethod
    def of(cls, result: MergeResult) -> MergeReport:
        """Return what of `result` is told."""
        return cls(result.adapter_digests, result.comparison, result.speed)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> MergeReport:
        """Undo `to_json`."""
        return cls(
            tuple(values["adapter_digests"]),
            Comparison(**values["comparison"]),
            tuple(SpeedFigures(**figures) for figures in values["speed"]),
        )
