"""bitsandbytes, imported without a look at a hub."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_import_lock = threading.Lock()


def import_bitsandbytes() -> Any:
    """Return the module `bitsandbytes`.

    Where the package `kernels` is installed and the CPU has AVX512-BF16, importing bitsandbytes downloads a kernel from
    a hub. Hiding `kernels` for the time of the import prevents it; bitsandbytes then uses the kernels it comes with.
    """
    with _import_lock:
        if "bitsandbytes" not in sys.modules:
            with _kernels_hidden(), _nothing_compiled():
                import bitsandbytes  # noqa: F401
    return sys.modules["bitsandbytes"]


@contextmanager
def _kernels_hidden() -> Iterator[None]:
    hidden = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = hidden


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Keep bitsandbytes from asking for `torch.compile`, which imports torch._dynamo: 3.5 s for unused fallbacks.

    It catches the refusal and takes the plain function. Others' compilations at the same time are let through.
    """
    compile_, disable = torch.compile, torch._disable_dynamo  # type: ignore[attr-defined]

    def refuse_bitsandbytes(model: Any = None, **options: Any) -> Any:
        if str(getattr(model, "__module__", "")).startswith("bitsandbytes."):
            raise RuntimeError("not compiled, to save the import of torch._dynamo")
        return compile_(model, **options)

    def leave_as_it_is(function: Any = None, recursive: bool = True) -> Any:
        return disable(function, recursive) if function is None else function

    torch.compile, torch._disable_dynamo = refuse_bitsandbytes, leave_as_it_is  # type: ignore[assignment, attr-defined]
    try:
        yield
    finally:
        torch.compile, torch._disable_dynamo = compile_, disable  # type: ignore[attr-defined]
