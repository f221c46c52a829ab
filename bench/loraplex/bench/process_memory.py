"""How much memory a process has in use, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def resident_mb(pid: int) -> float:
    """Return the resident set of process `pid` in MB (10^6 bytes); 0 where the system does not say."""
    status = Path(f"/proc/{pid}/status")
    if not status.is_file():
        return 0.0
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0
