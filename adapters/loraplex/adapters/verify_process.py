"""`python -m loraplex.adapters.verify_process`: the reference side of `verify` in a process of its own.

Reads a `VerifyJob` as one JSON object from standard input and writes a line for each step, `{"phase": "PEFT", "done":
3, "total": 8}`, and at the end `{"found": {...}}`, a `Verified`; a failure is one line `{"error": "..."}` and status 1.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from types import FrameType

from loraplex.adapters.errors import LoraplexError
from loraplex.adapters.verify import VerifyJob, verify


def main() -> int:
    """Compare what standard input describes; return the exit status."""
    signal.signal(signal.SIGTERM, _leave)
    # The server that is verified may be on this machine and have other things to do.
    os.nice(10)
    # Whatever the libraries print, the reader gets JSON alone.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(**event: object) -> None:
        print(json.dumps(event), file=out, flush=True)

    job = VerifyJob.from_json(json.load(sys.stdin))
    try:
        found = verify(job, lambda phase, done, total: tell(phase=phase, done=done, total=total))
    except LoraplexError as error:
        tell(error=str(error))
        return 1
    tell(found=asdict(found))
    return 0


def _leave(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
