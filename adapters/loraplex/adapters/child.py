"""How a job reaches a process of its own: one JSON object on its standard input. Knows no job."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import IO, Any


def send_job(stdin: IO[str], job: dict[str, Any]) -> None:
    """Write `job` to `stdin` and close it. A process that died before it read all tells more by its status."""
    with suppress(OSError):
        stdin.write(json.dumps(job))
    with suppress(OSError):
        stdin.close()
