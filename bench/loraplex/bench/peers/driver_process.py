"""Our side of the conversation with a driver: starts it in its interpreter and asks it one thing at a time."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_PACKAGE = "loraplex.bench.peers"
_LOG_LINES = 6


class PeerError(ChildProcessError):
    """A system failed, ended, or took too long; the message says at what, and what its log ended with."""


class DriverProcess:
    """One driver; leaving it as a context ends it and what it started."""

    def __init__(self, python: Path, module: str, log: Path, environ: Mapping[str, str], imports: Path | None) -> None:
        """Start driver `module` with interpreter `python`; `log` takes what it prints.

        `imports` is put before the interpreter's own packages; a peer's needs it to find its driver and nothing else of
        ours (see `driver_imports`).
        """
        self._log = log
        self._name = module
        own = {**os.environ, **environ}
        own.pop("PYTHONPATH", None)
        if imports is not None:
            own["PYTHONPATH"] = str(imports)
        self._output = log.open("wb")
        self._process = subprocess.Popen(
            [python, "-m", f"{_PACKAGE}.{module}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env=own,
            # A group of its own, so that what it started can be ended with it.
            start_new_session=True,
        )
        self._rest = b""

    def ask(self, message: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Send one message and return the answer, within `timeout` seconds.

        Raises:
            PeerError: if the driver answers with an error, ends, or does not answer in time.
        """
        assert self._process.stdin is not None
        what = next(iter(message))
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._error(f"{what}: the driver has ended") from error
        answer: dict[str, Any] = json.loads(self._read_line(what, timeout))
        if "error" in answer:
            raise self._error(f"{what}: {answer['error']}")
        return answer

    def pause(self) -> None:
        """Take all CPU time from the driver and what it started, until `resume`."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Give the CPU back."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def _read_line(self, what: str, timeout: float) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._error(f"{what}: no answer within {timeout:g} s")
            chunk = os.read(self._process.stdout.fileno(), 1 << 20)
            if not chunk:
                raise self._error(f"{what}: the driver ended with status {self._process.wait()}")
            self._rest += chunk
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def _error(self, message: str) -> PeerError:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return PeerError("\n".join([message, *lines[-_LOG_LINES:]]))

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the driver end what it started, then end its whole group."""
        assert self._process.stdin is not None
        with contextlib.suppress(ProcessLookupError):
            self.resume()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()


def driver_imports(folder: Path) -> Path:
    """Return `folder` after putting into it what a peer's interpreter may import of ours: the drivers alone."""
    package = folder / "loraplex" / "bench"
    package.mkdir(parents=True, exist_ok=True)
    link = package / "peers"
    target = Path(__file__).parent
    if link.is_symlink() and link.resolve() != target.resolve():
        link.unlink()
    if not link.is_symlink():
        link.symlink_to(target, target_is_directory=True)
    return folder
