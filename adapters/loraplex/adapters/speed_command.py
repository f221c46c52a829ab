"""Runs a program that measures how fast a model is merged and unmerged; knows its input and output, not its engine.

The program reads a `SpeedJob` as one JSON object from standard input, and writes JSON lines: `{"done": 1, "total": 4}`
as it goes, last `{"speed": [...]}` with one object of `SpeedFigures` for each side, or `{"error": "..."}`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.adapters.child import send_job
from loraplex.adapters.errors import PreconditionError

_LEAVE_S = 10.0
"""How long a process that has closed its output may take to end by itself."""


@dataclass(frozen=True)
class SpeedFigures:
    """How fast one side answers: `model` is "unmerged" or "merged", times are in milliseconds."""

    model: str
    tokens_per_second: float
    first_token_ms: float
    inter_token_ms_p50: float


@dataclass(frozen=True)
class SpeedJob:
    """What is measured: `model` with the adapter in the folder `adapter` at `scale`, and `merged`, on `prompts`."""

    model: Path
    adapter: Path
    scale: float
    merged: Path
    prompts: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        paths = {name: str(getattr(self, name)) for name in ("model", "adapter", "merged")}
        return {**paths, "scale": self.scale, "prompts": list(self.prompts)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SpeedJob:
        """Undo `to_json`."""
        paths = {name: Path(values[name]) for name in ("model", "adapter", "merged")}
        return cls(scale=values["scale"], prompts=tuple(values["prompts"]), **paths)


def measure_speed(
    command: Sequence[str], job: SpeedJob, progress: Callable[[int, int], None]
) -> tuple[SpeedFigures, ...]:
    """Run `command` on `job`; return what it measured, the unmerged side first.

    Raises:
        PreconditionError: if it cannot measure.
    """
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        try:
            send_job(process.stdin, job.to_json())
            for line in process.stdout:
                event = json.loads(line)
                if "error" in event:
                    raise PreconditionError(
                        f"the speed cannot be measured: {event['error']}; nothing is written, merge without measuring"
                    )
                if "speed" in event:
                    return tuple(SpeedFigures(**figures) for figures in event["speed"])
                progress(event["done"], event["total"])
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LEAVE_S)
        finally:
            process.kill()
    raise PreconditionError(
        f"the speed cannot be measured: its process ended without a word, with status {process.returncode}; merge "
        "without measuring"
    )
