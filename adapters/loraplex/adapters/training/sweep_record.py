"""What a rank sweep has found so far, in a file: an interrupted one goes on, and a finished one takes more ranks."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loraplex.adapters.errors import AlreadyExistsError
from loraplex.adapters.training.rank_sweep import RankPoint
from loraplex.adapters.training.score import Score
from loraplex.adapters.training.train_config import TrainConfig

_BY_RANK = ("rank", "alpha", "rank_pattern", "alpha_pattern", "output_dir")


class SweepRecord:
    """The points in the file `path`, all of one budget: one configuration but for the rank, and as many steps."""

    def __init__(self, path: Path, config: TrainConfig, steps: int) -> None:
        """Read the file if it is there.

        Raises:
            AlreadyExistsError: its points had another budget.
        """
        self._path = path
        values = {name: value for name, value in config.to_values().items() if name not in _BY_RANK}
        self._budget: dict[str, Any] = json.loads(json.dumps({**values, "max_steps": steps}))
        self.base: Score | None = None
        self.points: dict[int, RankPoint] = {}
        if path.is_file():
            self._read()

    def add(self, point: RankPoint, base: Score) -> None:
        """Take in a point, with the score of the base, and write the file."""
        self.base = base
        self.points[point.rank] = point
        content = {"budget": self._budget, "base": asdict(base), "points": [asdict(each) for each in self.ordered()]}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self._path)

    def ordered(self) -> tuple[RankPoint, ...]:
        """Return the points by rank."""
        return tuple(self.points[rank] for rank in sorted(self.points))

    def _read(self) -> None:
        content = json.loads(self._path.read_text(encoding="utf-8"))
        other = [name for name, value in self._budget.items() if content["budget"].get(name) != value]
        if other:
            raise AlreadyExistsError(
                f"{self._path} holds a sweep with another budget ({', '.join(other)}): choose another output folder"
            )
        self.base = Score(**content["base"])
        self.points = {values["rank"]: RankPoint(**values) for values in content["points"]}
