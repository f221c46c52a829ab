"""`python -m loraplex.server.template_process`: renders chat templates that others wrote, told and telling JSON lines.

Writes `{}` when it is ready. Then reads `{"template": ..., "messages": [...], "tokens": {...}}` from standard input
and answers `{"text": ...}` or `{"error": ...}`, with `"stopped": true` where a limit was met, one after the other,
until its input ends. A template is a program: each is rendered in a fork of this process that the system ends after a
second or with too much memory, whatever it is doing. Jinja's sandbox bounds neither (one expression can take hours, or
all memory). Knows nothing about tokenizers.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

TIME_LIMIT_S = 1.0
MEMORY_LIMIT_BYTES = 1 << 30
MAX_CHARACTERS = 4 << 20
_FAILED = 3
"""Exit status of a fork that has answered with an error."""
LIMITS = f"it may take {TIME_LIMIT_S:g} s, {MEMORY_LIMIT_BYTES >> 20} MiB and write {MAX_CHARACTERS} characters"


def main() -> int:
    """Answer every line of standard input; return the exit status."""
    out = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print, the reader gets JSON alone
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    _write(out, b"{}")
    for line in sys.stdin.buffer:
        job = json.loads(line)
        child = os.fork()
        if not child:
            _answer(job, out)
        _, status = os.waitpid(child, 0)
        if status == 0:
            # It has been compiled within the limits once; kept here, the next forks need not do it again.
            with suppress(Exception):
                _compile_jinja_template(job["template"])
        elif os.waitstatus_to_exitcode(status) != _FAILED:
            # Ended by a signal or for want of memory, in either case before it wrote.
            _write(out, json.dumps({"error": f"it was stopped: {LIMITS}", "stopped": True}).encode())
    return 0


def _answer(job: dict[str, Any], out: int) -> None:
    """Render in this fork, write the answer and end; never returns."""
    try:
        signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)  # the default action ends the process, even within C code
        answer = _rendered(job)
        encoded = json.dumps(answer).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except BaseException:
        os._exit(1)
    _write(out, encoded)
    os._exit(0 if "text" in answer else _FAILED)


def _rendered(job: dict[str, Any]) -> dict[str, str]:
    try:
        rendered: Any = render_jinja_template(
            [job["messages"]], chat_template=job["template"], add_generation_prompt=True, **job["tokens"]
        )
        text = str(rendered[0][0])  # of texts and marks
        text.encode()  # half a surrogate pair is no text
    except MemoryError:
        raise
    except Exception as error:  # a template can raise anything
        return {"error": f"{error!s:.1000}"}
    return {"text": text} if len(text) <= MAX_CHARACTERS else {"error": f"it writes too much: {LIMITS}"}


def _write(out: int, encoded: bytes) -> None:
    with os.fdopen(os.dup(out), "wb") as file:
        file.write(encoded + b"\n")


if __name__ == "__main__":
    sys.exit(main())
