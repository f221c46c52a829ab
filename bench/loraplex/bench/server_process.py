"""Starts a server of one's own as a process, waits until it serves, and stops it as an operator would."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from loraplex.client import Client, DeadlineError

READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
_LOG_LINES = 20


class ServerProcessError(ChildProcessError):
    """The server ended before it served, or did not serve in time; the end of its log went to stderr."""


class ServerProcess:
    """`loraplex serve` on two free ports of this machine, its output in a file; leaving it as a context stops it."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        """Start `loraplex serve` with `arguments` (ports aside); `log` takes its output."""
        self.port, self.metrics_port = free_ports(2)
        self.target = f"127.0.0.1:{self.port}"
        self.metrics_url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        self._log = log
        self._started = time.monotonic()
        ports = ["--port", str(self.port), "--metrics-port", str(self.metrics_port)]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "loraplex.cli", "serve", *arguments, *ports],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def wait_until_ready(self, timeout: float = READY_TIMEOUT_S) -> float:
        """Wait until the server says SERVING; return the seconds since its start.

        Raises:
            ServerProcessError: if it ends before, or `timeout` seconds pass.
        """
        with Client(self.target) as client:
            while time.monotonic() - self._started < timeout:
                status = self._process.poll()
                if status is not None:
                    raise self._error(f"the server ended with status {status} before it served")
                try:
                    client.wait_until_ready(0.25)
                except DeadlineError:
                    continue
                return time.monotonic() - self._started
        raise self._error(f"the server was not ready within {timeout:g} s")

    def stop(self, timeout: float = STOP_TIMEOUT_S) -> int:
        """Ask the server to stop, as a service manager does; return its exit status.

        One that has not ended within `timeout` seconds is killed, and returns minus the number of that signal.
        """
        self._process.terminate()
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _error(self, message: str) -> ServerProcessError:
        print_tail(self._log)
        return ServerProcessError(message)

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the process if it still runs."""
        if self._process.poll() is None:
            self.stop()


def print_tail(log: Path) -> None:
    """Write the last lines of `log` to stderr."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    print(*lines[-_LOG_LINES:], sep="\n", file=sys.stderr)


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback interface that nothing listens on now; nothing keeps them free."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
