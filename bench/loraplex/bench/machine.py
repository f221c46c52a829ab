"""What a measurement ran on, without names or paths: enough to compare two results, nothing to find the machine by."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")
_PACKAGES = ("loraplex", "torch", "transformers", "bitsandbytes", "peft", "numba", "grpcio")


def machine_info() -> dict[str, Any]:
    """Return processor kind, count, vector capabilities and memory, and the versions of what computes."""
    cpu = _cpu_info()
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_model": cpu.get("model name", ""),
        "cpu_capabilities": [flag for flag in _CPU_FLAGS if flag in cpu.get("flags", cpu.get("Features", "")).split()],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3, 1),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _cpu_info(path: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Return what the kernel says about the first processor; empty where it does not say."""
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
