"""The merge process as the server runs it: what has said its last word ends by itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loraplex.adapters.merge_job import MergeJob
from loraplex.server.errors import PreconditionError
from loraplex.server.rpc.merge_runner import run_merge

PROGRAM = """#!/bin/sh
trap 'echo terminated > {told}' TERM
cat > /dev/null
echo '{{"error": "PreconditionError", "message": "no such model"}}'
sleep 0.3
[ -e {told} ] || echo left > {told}
"""


async def test_a_process_that_told_an_error_is_not_terminated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, told = tmp_path / "program", tmp_path / "told"
    program.write_text(PROGRAM.format(told=told))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(PreconditionError, match="no such model"):
        async for _ in run_merge(MergeJob(tmp_path, (), tmp_path / "out")):
            pass
    assert told.read_text() == "left\n"
