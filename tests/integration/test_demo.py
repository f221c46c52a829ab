"""`loraplex demo` as `make demo` runs it: everything that it checks must hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_demo_holds(tmp_path: Path) -> None:
    output = tmp_path / "demo.json"
    command = [sys.executable, "-m", "loraplex.cli", "demo", "--output", str(output)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads(output.read_text())
    assert document["held"]
    assert all(document["checks"].values())
    assert set(document["adapters"]) == {"sentiment", "sql", "date", "json"}
    assert document["adapters_in_largest_shared_batch"] >= 3
    assert document["tokens_per_second"] > 0
    assert document["merge"]["merged_text_equal"]
    assert str(REPOSITORY) not in output.read_text()
