"""Renders adapters' chat templates in a process of its own, so that none can hold up or bring down the server.

One at a time. A template that had to be stopped is refused for a while, or whoever sends it could keep the process
busy.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from loraplex.server.errors import InvalidRequestError, ResourceExhaustedError

WAIT_S = 1.0
"""How long a request waits for those before it."""
REFUSED_FOR_S = 10.0


class TemplateRenderer:
    """Owns the process, which starts when it is first needed. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._refused_until: dict[bytes, float] = {}

    def render(self, template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str]) -> str:
        """Return the text that `template` makes of `messages`, up to where the assistant begins.

        `tokens` are the special tokens by name (`bos_token`).

        Raises:
            InvalidRequestError: the template fails, refuses these messages or takes too long.
            ResourceExhaustedError: others take too long before it.
        """
        key = hashlib.sha256(template.encode()).digest()
        if not self._lock.acquire(timeout=WAIT_S):
            raise ResourceExhaustedError("other adapters' chat templates take too long; try again", WAIT_S)
        try:
            if self._refused_until.get(key, 0) > time.monotonic():
                raise _failure("it took too much time or memory a moment ago")
            answer = self._ask({"template": template, "messages": list(messages), "tokens": dict(tokens)})
            if answer.get("stopped"):
                self._refuse(key)
        finally:
            self._lock.release()
        if "text" not in answer:
            raise _failure(answer["error"])
        return str(answer["text"])

    def close(self) -> None:
        """End the process; another `render` starts it again."""
        with self._lock:
            self._end()

    def _refuse(self, key: bytes) -> None:
        now = time.monotonic()
        self._refused_until = {known: until for known, until in self._refused_until.items() if until > now}
        self._refused_until[key] = now + REFUSED_FOR_S

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        process = self._process = self._process or _start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
        except (OSError, ValueError):  # it has been ended from outside
            self._end()
            return {"error": "the process that renders it has ended; try again"}
        return answer

    def _end(self) -> None:
        if self._process is not None:
            with self._process as process:
                process.kill()
            self._process = None


def _failure(problem: str) -> InvalidRequestError:
    return InvalidRequestError.of("chat", f"the chat template does not take this chat: {problem}")


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # -P: what lies in the server's working directory is no module.
        [sys.executable, "-P", "-m", "loraplex.server.template_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        # Ctrl-C in the server's terminal is for the server, which then ends this.
        start_new_session=True,
    )
