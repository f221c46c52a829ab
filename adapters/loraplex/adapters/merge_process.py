"""`python -m loraplex.adapters.merge_process`: one merge in a process of its own, told and telling JSON.

Reads one object with the arguments of `merge_adapter` from standard input and writes a line for each tensor,
`{"done": 3, "total": 272}`; a failure is one line `{"error": "PreconditionError", "message": "..."}` and status 1. The
error is named by its class in `errors`, whatever its own sub-class.
SIGTERM, or a reader that goes away, ends the merge and leaves no output.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from loraplex.adapters.errors import (
    AlreadyExistsError,
    InvalidRequestError,
    LoraplexError,
    PreconditionError,
    ResourceExhaustedError,
)
from loraplex.adapters.merge import MergeBase, merge_adapter


def main() -> int:
    """Run the merge that standard input describes; return the exit status."""
    signal.signal(signal.SIGTERM, _leave)
    # Serving goes on beside this process: it takes what is left of the processor.
    os.nice(10)
    job: dict[str, Any] = json.load(sys.stdin)
    try:
        merge_adapter(
            Path(job["model_dir"]),
            Path(job["adapter_dir"]),
            Path(job["output"]),
            base=MergeBase(job["base"]),
            quantization=job["quantization"],
            scale=job["scale"],
            progress=lambda done, total: _tell(done=done, total=total),
        )
    except LoraplexError as error:
        _tell(error=_public_name(error), message=str(error))
        return 1
    return 0


def _public_name(error: LoraplexError) -> str:
    """Return the class that callers know: a BindError is a PreconditionError to them."""
    shared = (InvalidRequestError, AlreadyExistsError, PreconditionError, ResourceExhaustedError)
    return next((kind.__name__ for kind in shared if isinstance(error, kind)), type(error).__name__)


def _tell(**event: object) -> None:
    print(json.dumps(event), flush=True)


def _leave(signum: int, frame: FrameType | None) -> None:
    # Raised in the main thread, so that the merge removes what it has written.
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
