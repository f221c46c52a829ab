"""The identity of a base model: a hash over its configuration and every byte of its weights.

It does not depend on how the weights are divided into files, on names without meaning, or on the quantization that a
server chooses. Form, version 1: SHA-256 over the lines "loraplex-base-v1", the canonical configuration, and for every
tensor by name `name dtype shape sha256(bytes)`.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from loraplex.server.models.config import DecoderConfig

_VERSION = "loraplex-base-v1"
_THREADS = 2


class Fingerprint:
    """Hashes tensors on threads of its own, while the caller goes on with them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="fingerprint")
        self._digests: dict[str, Future[str]] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Start hashing a tensor, which must not change from now on."""
        self._digests[name] = self._pool.submit(_digest, name, tensor)

    def __enter__(self) -> Fingerprint:
        return self

    def __exit__(self, *error: object) -> None:
        """End the threads; what is still waiting is not hashed any more."""
        self._pool.shutdown(cancel_futures=True)

    def finish(self, config: DecoderConfig) -> str:
        """Wait for all tensors and return "sha256:" and 64 hex digits."""
        lines = [_VERSION, config.canonical()]
        lines += [self._digests[name].result() for name in sorted(self._digests)]
        return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest(name: str, tensor: torch.Tensor) -> str:
    data = hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    shape = "x".join(map(str, tensor.shape))
    return f"{name} {str(tensor.dtype).removeprefix('torch.')} {shape} {data}"
