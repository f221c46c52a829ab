"""Runs one merge in a process of its own, `python -m loraplex.adapters.merge_process`: JSON in, JSON lines out.

Serving goes on beside it, and what it does to memory ends with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass

from loraplex.adapters.merge_job import MergeJob, MergeReport
from loraplex.server.errors import (
    AlreadyExistsError,
    EngineError,
    InvalidRequestError,
    LoraplexError,
    PreconditionError,
    ResourceExhaustedError,
)

# One thread and a low priority: two threads that give way wait for each other, and the server's wait for them.
THREADS = 1
LEAVE_S = 10.0
"""How long a process that has said its last word may take to end by itself."""


@dataclass(frozen=True)
class MergeStep:
    """How far a phase of the merge is."""

    phase: str
    done: int
    total: int


async def run_merge(job: MergeJob) -> AsyncGenerator[MergeStep | MergeReport, None]:
    """Run `job`; yield its steps, and the report at the end. Leaving the generator ends the process.

    Raises:
        LoraplexError: what the process reports.
        EngineError: if it dies without a word.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # what lies in the server's working directory is no module
        "-m",
        "loraplex.adapters.merge_process",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
        # Ctrl-C in the server's terminal is for the server, which then ends its merge.
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    reported = last_word = False
    try:
        process.stdin.write(json.dumps(job.to_json()).encode())
        process.stdin.close()
        async for line in process.stdout:
            event = json.loads(line)
            last_word = "error" in event or "report" in event
            if "error" in event:
                raise _error(event["error"], event["message"])
            if "report" in event:
                reported = True
                yield MergeReport.from_json(event["report"])
            else:
                yield MergeStep(event["phase"], event["done"], event["total"])
        if await process.wait() != 0 or not reported:
            raise EngineError(f"the merge process ended with status {process.returncode}; the server's log has more")
    finally:
        if last_word:
            # asyncio takes a signal to a process that has just ended for a lost exit status, and warns.
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), LEAVE_S)
        if process.returncode is None:
            # SIGTERM, not SIGKILL: the process removes its half-written folder.
            process.terminate()
            await process.wait()


def _error(kind: str, message: str) -> LoraplexError:
    """Return the error that the merge process told of."""
    if kind == InvalidRequestError.__name__:
        # The process has checked what only it can: the output's parent folder, for one.
        field, _, description = message.partition(": ")
        return InvalidRequestError.of(field, description)
    known = {k.__name__: k for k in (AlreadyExistsError, PreconditionError, ResourceExhaustedError)}
    return known.get(kind, EngineError)(message)
