"""Renders adapters' chat templates in a process of its own, so that none can hold up or bring down the server.

One at a time; `template_queue` says whose turn it is. A template that had to be stopped is refused for a while, or
whoever sends it could keep the process busy.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from loraplex.server.errors import InvalidRequestError, UnavailableError

REFUSED_FOR_S = 10.0
START_S = 60.0
"""How long the process may take to import what it needs: a second, more on a busy machine."""
ANSWER_S = 10.0
"""After this long without an answer the process is taken for dead: it ends a template by itself after a second."""


class TemplateRenderer:
    """Owns the process, which starts when it is first needed. Thread-safe.

    Attributes:
        is_running: whether the process is up, so that `start` would return at once.
    """

    def __init__(self) -> None:
        self.is_running = False
        self._lock = threading.Lock()
        self._guard = threading.Lock()
        """Over `_process` and `_closed`; never held while anybody waits for the process."""
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._refused_until: dict[bytes, float] = {}

    def start(self) -> None:
        """Start the process unless it runs, and wait until it can render.

        Raises:
            UnavailableError: it does not come up, or this has been closed.
        """
        with self._lock:
            self._start()

    def render(self, template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str]) -> str:
        """Return the text that `template` makes of `messages`, up to where the assistant begins.

        `tokens` are the special tokens by name (`bos_token`). A process that ends or hangs is replaced, once.

        Raises:
            InvalidRequestError: the template fails, refuses these messages or takes too long.
            UnavailableError: as `start`.
        """
        key = hashlib.sha256(template.encode()).digest()
        job = json.dumps({"template": template, "messages": list(messages), "tokens": dict(tokens)}).encode() + b"\n"
        with self._lock:
            if self._refused_until.get(key, 0) > time.monotonic():
                raise _failure("it took too much time or memory a moment ago")
            answer = self._ask(job) or self._ask(job) or {"error": "its process ended, twice", "stopped": True}
            if answer.get("stopped"):
                self._refuse(key)
        if "text" not in answer:
            raise _failure(answer["error"])
        return str(answer["text"])

    def close(self) -> None:
        """End the process, and with it what is being rendered, for good."""
        with self._guard:
            self._closed = True
            if self._process is not None:
                _kill(self._process)
        with self._lock:  # free at once: whoever has it waited for the process
            self._end()

    def _refuse(self, key: bytes) -> None:
        now = time.monotonic()
        self._refused_until = {known: until for known, until in self._refused_until.items() if until > now}
        self._refused_until[key] = now + REFUSED_FOR_S

    def _start(self) -> subprocess.Popen[bytes]:
        with self._guard:
            if self._closed:
                raise UnavailableError("the server is stopping")
            process = self._process = self._process or _launch()
        if not self.is_running:
            if self._exchange(process, b"", START_S) is None:
                raise UnavailableError("the process that renders adapters' chat templates does not start; try again")
            self.is_running = True
        return process

    def _ask(self, job: bytes) -> dict[str, Any] | None:
        return self._exchange(self._start(), job, ANSWER_S)

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes, limit_s: float) -> dict[str, Any] | None:
        """Send `line` and return the next answer; None if there is none in time, after which the process is gone."""
        assert process.stdin is not None
        assert process.stdout is not None
        # Ends both the writing and the reading, whatever the process is up to.
        watch = threading.Timer(limit_s, self._kill_if_ours, [process])
        watch.daemon = True
        watch.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
        except (OSError, ValueError):
            self._end()
            return None
        finally:
            watch.cancel()
        return answer

    def _kill_if_ours(self, process: subprocess.Popen[bytes]) -> None:
        with self._guard:
            if process is self._process:  # else it has been waited for, and its id may be another's
                _kill(process)

    def _end(self) -> None:
        self.is_running = False
        with self._guard:
            process, self._process = self._process, None
        if process is not None:
            with suppress(OSError), process:  # closing the pipe may find that nobody reads it
                _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    # With its forks, which hold the same pipes.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _failure(problem: str) -> InvalidRequestError:
    return InvalidRequestError.of("chat", f"the chat template does not take this chat: {problem}")


def _launch() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # -P: what lies in the server's working directory is no module.
        [sys.executable, "-P", "-m", "loraplex.server.template_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        # Ctrl-C in the server's terminal is for the server, which then ends this, as a group.
        start_new_session=True,
    )
