"""Runs a compiled kernel on several threads at once: torch's own OpenMP threads.

A decode step alternates between torch's matrix products and our kernels more than a hundred times. A second pool of
threads (Numba's `parallel=True` brings one: it links an OpenMP library of its own, or none) wakes up while torch's
threads still spin for their next task: measured 6 us a call at best and 20 in the median, against 2 us for calling the
OpenMP library that torch itself has loaded, whose threads are awake already; Numba's "workqueue" layer took 70.
Kernels divide their work themselves, by an atomic counter, so any number of threads is right.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from numba import cfunc

# void GOMP_parallel(void (*fn)(void *), void *data, unsigned num_threads, unsigned flags): what GCC's `#pragma omp
# parallel` becomes. Intel's and LLVM's OpenMP libraries export it too on Linux.
_GOMP_PARALLEL = "GOMP_parallel"


class KernelCalls(threading.local):
    """What becomes of this thread's calls: they are made, or given to `take` with the address of their arguments."""

    take: Callable[[Kernel, int], None] | None = None


kernel_calls = KernelCalls()


class Kernel:
    """A compiled function of one int64: the address of its argument block.

    Calls hold no lock and release the GIL; several threads may call one kernel with different argument blocks.
    """

    def __init__(self, function: Callable[[int], None], num_arguments: int) -> None:
        """Compile `function`, or load it from Numba's cache on disk; its block has `num_arguments` int64.

        The cache lies beside the function's file or, where that is read-only, in the user's cache folder
        (NUMBA_CACHE_DIR overrides both). Where nothing can be written, every process compiles anew.
        """
        compile_c: Any = cfunc
        signature, options, versioned = "void(int64)", {"error_model": "numpy"}, _with_version(function)
        try:
            self._compiled: Any = compile_c(signature, cache=True, **options)(versioned)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            self._compiled = compile_c(signature, **options)(versioned)
        self.num_arguments = num_arguments
        self.address: int = self._compiled.address
        self._serial = self._compiled.ctypes
        self._parallel = find_gomp_parallel()

    def __call__(self, arguments: int, threads: int) -> None:
        """Run once on each of up to `threads` threads, with the same `arguments`, and wait for all."""
        if kernel_calls.take is not None:
            kernel_calls.take(self, arguments)
        elif threads > 1 and self._parallel is not None:
            self._parallel(self.address, arguments, threads, 0)
        else:
            self._serial(arguments)


def _with_version(function: Callable[[int], None]) -> Callable[[int], None]:
    """Return a copy of `function` whose name tells the version of this package's code.

    Numba recompiles when the function's own file has changed, but does not see the files that it imports from.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    copy = FunctionType(function.__code__, function.__globals__, function.__name__)
    copy.__qualname__ = f"{function.__qualname__}_{digest.hexdigest()[:12]}"
    copy.__module__ = function.__module__
    return copy


@functools.cache
def find_gomp_parallel() -> Callable[[int, int, int, int], None] | None:
    """Return the entry point of the OpenMP library that torch uses, None where there is none of that kind.

    What is loaded globally (a preloaded OpenMP library) comes first, because torch's calls go there too.
    """
    for path in (None, Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"):
        try:
            entry: Any = getattr(ctypes.CDLL(None if path is None else str(path)), _GOMP_PARALLEL)
        except (OSError, AttributeError):
            continue
        entry.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        entry.restype = None
        found: Callable[[int, int, int, int], None] = entry
        return found
    return None
