"""Importing bitsandbytes must not reach for a hub."""

from __future__ import annotations

import subprocess
import sys

# On CPUs with AVX512-BF16, bitsandbytes imports `kernels` while it is imported itself and downloads through it. The
# finder below sees each of bitsandbytes' modules just before it runs, on any CPU.
PROGRAM = """
import importlib.abc, sys, types

seen = []

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.startswith("bitsandbytes"):
            seen.append(sys.modules.get("kernels", "visible"))

sys.meta_path.insert(0, Watch())
sys.modules["kernels"] = kernels = types.ModuleType("kernels")
from loraplex.adapters.bnb import import_bitsandbytes
module = import_bitsandbytes()
assert module.__name__ == "bitsandbytes" and import_bitsandbytes() is module
assert len(seen) > 10 and set(seen) == {None}, seen
assert sys.modules["kernels"] is kernels
del sys.modules["kernels"]
import_bitsandbytes()
assert "kernels" not in sys.modules
"""


def test_kernels_is_hidden_during_the_import_and_back_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
