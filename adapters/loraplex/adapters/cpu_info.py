"""What this machine's CPU can do, as Linux tells it."""

from __future__ import annotations

from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def cpu_has_bf16(cpu_info: Path = CPU_INFO) -> bool:
    """Return whether the CPU multiplies in bfloat16; one that does not emulates it many times slower than float32."""
    try:
        lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return bool(_BF16_FLAGS & set(flags.split()))
