"""What goes wrong around training, as typed errors: no memory, no room on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loraplex.adapters.disk import disk_full_is_typed
from loraplex.adapters.errors import LoraplexError, ResourceExhaustedError

# What PyTorch and safetensors say where Python would raise MemoryError, and OSError with ENOSPC.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "DefaultCPUAllocator")
_NO_ROOM = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed", "os error 28")


class TrainingInterruptedError(LoraplexError):
    """A run that was asked to stop; its checkpoint is kept, and `--resume` goes on from it."""


@contextmanager
def failures_are_typed(doing: str, kept: str) -> Iterator[None]:
    """Turn "no memory" and "no space left" into a `ResourceExhaustedError`; `kept` says what is left of the run."""
    try:
        with disk_full_is_typed(f"{doing} ({kept})"):
            yield
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError is a RuntimeError.
        if isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY):
            raise ResourceExhaustedError(
                f"there is not enough memory for {doing}: lower per_device_batch_size (and raise "
                "gradient_accumulation_steps) or max_length, set gradient_checkpointing, or quantize the base to nf4; "
                f"{kept}"
            ) from error
        if any(text in str(error) for text in _NO_ROOM):
            raise _full(doing, kept) from error
        raise
    except Exception as error:  # safetensors' own error is a bare Exception
        if any(text in str(error) for text in _NO_ROOM):
            raise _full(doing, kept) from error
        raise


def _full(doing: str, kept: str) -> ResourceExhaustedError:
    return ResourceExhaustedError(f"the disk is full while {doing} ({kept}); free some space and try again")
