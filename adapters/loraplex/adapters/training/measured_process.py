"""Starts a process of its own for work whose peak of memory is to be measured. Knows no work."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from loraplex.adapters.child import send_job

# So that a peak is what was in use, and not what malloc kept for later (glibc).
_RETURNED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def start_measured(module: str, job: dict[str, Any], stderr: int) -> subprocess.Popen[str]:
    """Run `module` as a program, with `job` on its standard input and its standard output to be read from a pipe.

    Args:
        module: what `python -m` runs.
        job: plain values.
        stderr: where its standard error goes, as `Popen` takes it.
    """
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, **_RETURNED_AT_ONCE},
    )
    assert child.stdin is not None, "it was opened as a pipe"
    send_job(child.stdin, job)
    child.stdin = None
    return child
