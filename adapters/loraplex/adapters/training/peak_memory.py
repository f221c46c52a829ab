"""The most memory that a piece of work took: of this process on Linux, or on a GPU."""

from __future__ import annotations

import re
import resource
from contextlib import suppress
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures from when it is made; on a CPU what the process held before counts too."""

    def __init__(self, device: torch.device) -> None:
        """Begin. Where the kernel does not let the peak be reset, it is that of the process's life."""
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                _CLEAR.write_text("5")

    def bytes(self) -> int:
        """Return the peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        with suppress(OSError):
            found = _status_bytes("VmHWM")
            if found:
                return found
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Return the resident set of this process now; 0 where the system does not say."""
    with suppress(OSError):
        return _status_bytes("VmRSS")
    return 0


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
