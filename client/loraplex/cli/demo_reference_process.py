"""The other end of `demo_reference`: starts that process and reads the texts that it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loraplex.bench.server_process import print_tail


class ReferenceProcess:
    """Computes reference texts beside everything else; leaving it as a context ends it."""

    def __init__(self, job: Mapping[str, Any], log: Path) -> None:
        """Start on `job` (see `demo_reference.main`); `log` takes what the libraries print."""
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "loraplex.cli.demo_reference"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                # Two threads that give way wait for each other: beside a busy server one is several times as fast.
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self._tell(json.dumps(job))

    def unmerged(self) -> list[str]:
        """Return what base and adapter, apart, write to the job's prompts.

        Raises:
            ChildProcessError: if the process failed; the end of its log went to stderr.
        """
        return self._texts()

    def merged(self, folder: Path) -> list[str]:
        """Return what the merged model in `folder` writes; to be called after `unmerged`, once.

        Raises:
            ChildProcessError: if the process failed; the end of its log went to stderr.
        """
        self._tell(str(folder))
        return self._texts()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def _texts(self) -> list[str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            print_tail(self._log)
            raise ChildProcessError(f"the reference process ended with status {self._process.wait()}")
        texts: list[str] = json.loads(line)
        return texts

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process if it still runs."""
        with self._process:
            self._process.kill()
