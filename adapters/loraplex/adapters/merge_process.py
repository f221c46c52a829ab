"""`python -m loraplex.adapters.merge_process`: one merge in a process of its own, told and telling JSON.

Reads one `MergeJob` from standard input and writes a line for each step, `{"phase": "merging", "done": 3, "total":
272}`, and at the end `{"report": {...}}`, a `MergeReport`; a failure is one line `{"error": "PreconditionError",
"message": "..."}` and status 1. The error is named by its class in `errors`, whatever its own sub-class.
SIGTERM, or a reader that goes away, ends the merge and leaves no output; what a SIGKILL leaves, the next merge into the
same folder removes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from types import FrameType
from typing import TextIO

import torch

from loraplex.adapters.errors import (
    AlreadyExistsError,
    InvalidRequestError,
    LoraplexError,
    PreconditionError,
    ResourceExhaustedError,
)
from loraplex.adapters.merge import merge_adapters
from loraplex.adapters.merge_job import MergeJob, MergeReport


def main() -> int:
    """Run the merge that standard input describes; return the exit status."""
    signal.signal(signal.SIGTERM, _leave)
    # Serving goes on beside this process: it takes what is left of the processor.
    os.nice(10)
    # Whatever the libraries print, the reader gets JSON alone.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    job = MergeJob.from_json(json.load(sys.stdin))
    if job.threads:
        torch.set_num_threads(job.threads)

    def progress(phase: str, done: int, total: int) -> None:
        _tell(out, phase=phase, done=done, total=total)

    try:
        result = merge_adapters(job.model_dir, job.sources, job.output, job.options, progress)
    except LoraplexError as error:
        _tell(out, error=_public_name(error), message=str(error))
        return 1
    _tell(out, report=MergeReport.of(result).to_json())
    return 0


def _public_name(error: LoraplexError) -> str:
    """Return the class that callers know: a BindError is a PreconditionError to them."""
    shared = (InvalidRequestError, AlreadyExistsError, PreconditionError, ResourceExhaustedError)
    return next((kind.__name__ for kind in shared if isinstance(error, kind)), type(error).__name__)


def _tell(out: TextIO, **event: object) -> None:
    print(json.dumps(event), file=out, flush=True)


def _leave(signum: int, frame: FrameType | None) -> None:
    # Raised in the main thread, so that the merge removes what it has written.
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
