"""`python -m loraplex.adapters.training.method_process`: trains by one method in a process of its own.

Reads `{"method": "lora", "config": {...}}` from standard input and writes a line for each phase, `{"phase": "..."}`,
and at the end `{"found": {...}}`, a `MethodRun`; a failure is one line `{"error": "..."}` and status 1. A process of
its own has a peak of memory of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

from loraplex.adapters.errors import LoraplexError, PreconditionError
from loraplex.adapters.training.measured_process import start_measured
from loraplex.adapters.training.method_comparison import MethodRun, run_of
from loraplex.adapters.training.peak_memory import resident_bytes
from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.training_memory import Method
from loraplex.adapters.training.watching import Progress


def run_method(method: Method, config: TrainConfig, tell: Callable[[str], None]) -> MethodRun:
    """Train `config` by `method` in a new process; `tell` hears what it does.

    Raises:
        PreconditionError: what it reports, or that it ended without a word.
    """
    job = {"method": method, "config": config.to_values()}
    with start_measured("loraplex.adapters.training.method_process", job, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None, "it was opened as a pipe"
        for line in child.stdout:
            event = json.loads(line)
            if "error" in event:
                raise PreconditionError(f"{method}: {event['error']}")
            if "found" in event:
                return MethodRun(**event["found"])
            tell(f"{method}: {event['phase']}")
    raise PreconditionError(f"{method}: the process ended with status {child.returncode}; too little memory?")


class _Telling:
    """Passes on what a run tells."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def phase(self, description: str) -> None:
        """Pass it on."""
        self._tell(description)

    def progress(self, progress: Progress) -> None:
        """Pass on where the run is."""
        self._tell(f"step {progress.step} of {progress.steps}, loss {progress.loss:.3f}")

    def note(self, text: str) -> None:
        """Do nothing: it was told by the phase."""


def main() -> int:
    """Train what standard input describes; return the exit status."""
    from loraplex.adapters.training import training_run  # noqa: F401  (its libraries are no part of the peak)
    from loraplex.adapters.training.full_tuning import tune_fully
    from loraplex.adapters.training.trainer import train

    # Whatever the libraries print, the reader gets JSON alone.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(**event: object) -> None:
        print(json.dumps(event), file=out, flush=True)

    job = json.load(sys.stdin)
    observer = _Telling(lambda phase: tell(phase=phase))
    try:
        config = TrainConfig.from_values(job["config"])
        before = resident_bytes()
        result = (tune_fully if job["method"] == "full" else train)(config, observer)
        tell(found=asdict(run_of(result, before)))
    except LoraplexError as error:
        tell(error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
