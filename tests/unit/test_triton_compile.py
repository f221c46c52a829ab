"""Every Triton kernel compiled for an H100, which needs none: what the interpreter cannot tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
# A thread block of an H100 may have this much, in bytes.
SHARED_MEMORY = 227 * 1024
WITHOUT_PRODUCTS = ("write_kernel", "reduce_kernel", "add_parts_kernel")


def test_every_kernel_compiles_for_an_h100(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.compile_kernels"],
        cwd=Path(__file__).parents[2],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert kernels
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY, kernel
        # Numbers that have no register any more would lie on the stack, in memory.
        assert kernel["stack"] == 0, kernel
        assert kernel["atomics"] == 0, kernel
        assert not kernel["specialized"], kernel
        assert kernel["wide_loads"] > 0, kernel
        assert kernel["narrow_loads"] == 0, kernel
        if not any(name in kernel["name"] for name in WITHOUT_PRODUCTS):
            assert kernel["matrix_products"] > 0, kernel
