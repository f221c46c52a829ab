"""A device that is not there: it records what torch is asked to do, and does it again, or later, when told to.

As a CUDA graph, a record holds the operations, their numbers and the memory that they were given, and nothing of the
Python around them; and reading a tensor's content back is refused while recording.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS_BACK = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


@dataclass(frozen=True)
class Operation:
    function: Any
    args: Any
    kwargs: Any
    outputs: tuple[torch.Tensor, ...]

    def again(self) -> None:
        for kept, new in zip(self.outputs, _tensors(self.function(*self.args, **self.kwargs)), strict=True):
            if kept.data_ptr() != new.data_ptr():
                kept.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in READS_BACK:
            raise RuntimeError(f"{func} waits for the device, which a capture cannot")
        out = func(*args, **(kwargs or {}))
        self.operations.append(Operation(func, args, kwargs or {}, tuple(_tensors(out))))
        return out


def _tensors(value: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@dataclass(frozen=True)
class Recorded:
    operations: list[Operation]
    backend: RecordingBackend

    def replay(self) -> None:
        self.backend.launched.append(self)
        self.backend.queue.append(self._run)
        self.backend.progress()

    def _run(self) -> None:
        for operation in self.operations:
            operation.again()


@dataclass
class RecordingBackend:
    """Implements `CaptureBackend`. Lazy, it works only when somebody waits; each capture takes `bytes_each`."""

    lazy: bool = False
    bytes_each: int = 100
    captures: int = 0
    fail_at: int | None = None
    launched: list[Recorded] = field(default_factory=list)
    queue: list[Callable[[], object]] = field(default_factory=list)

    def capture(self, step: Callable[[], object]) -> Recorded:
        if self.captures == self.fail_at:
            raise torch.OutOfMemoryError("the fake device is full")
        self.captures += 1
        step()
        with Recorder() as recorder:
            step()
        return Recorded(recorder.operations, self)

    def staging(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def upload(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.queue.append(partial(target.copy_, source))
        self.progress()

    def mark(self) -> Callable[[], None]:
        position = len(self.queue)
        done = False
        self.queue.append(lambda: None)

        def wait() -> None:
            nonlocal done
            if not done and position < len(self.queue):
                self.finish()
            done = True

        self.progress()
        return wait

    def reserved_bytes(self) -> int:
        return self.bytes_each * self.captures

    def progress(self) -> None:
        if not self.lazy:
            self.finish()

    def finish(self) -> None:
        while self.queue:
            self.queue.pop(0)()
