"""Which commit a measurement belongs to."""

from __future__ import annotations

import subprocess
from pathlib import Path


def current_commit(folder: Path = Path(__file__).parent) -> str:
    """Return the commit checked out around `folder`, with "+changes" if files differ from it; "" outside a checkout."""
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{commit}+changes" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, check=True, encoding="utf-8")
    return result.stdout.strip()
