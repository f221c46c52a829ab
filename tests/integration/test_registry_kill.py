"""kill -9 at any instant leaves a registry that opens, at the state before or after what was being done.

KILL_POINTS is how many instants are tried (a fifth more are chosen by the clock), KILL_SEED chooses others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

POINTS = int(os.environ.get("KILL_POINTS", "45"))
SEED = int(os.environ.get("KILL_SEED", "1"))


@pytest.mark.timeout(60 + 3 * POINTS)
def test_kill_9_leaves_the_registry_before_or_after(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integration.registry_killer", str(tmp_path), str(POINTS), str(SEED)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    told = json.loads(ended.stdout)
    assert told["kills"] >= POINTS
    # Both sides were seen, or the points would prove nothing.
    assert told["before"] > 0
    assert told["after"] > 0
