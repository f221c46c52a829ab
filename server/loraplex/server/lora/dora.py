"""DoRA's column factors: a trained magnitude over the norm of the merged weight (Liu et al., arXiv 2402.09353).

Knows nothing of packing or segments.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from loraplex.adapters.binding import ModuleWeights

CACHED_BYTES = 64 * 2**20
"""An adapter on all seven projections of SmolLM2-135M takes 0.6 MB, one of an 8B model about 5 MB."""


class BaseWeight(Protocol):
    """A frozen weight of the base."""

    def dequantize(self) -> torch.Tensor:
        """Return a new tensor (out_features, in_features) float32: what the stored weights stand for."""
        ...


def column_factors(weight: torch.Tensor, modules: Sequence[tuple[ModuleWeights, int, int]]) -> torch.Tensor:
    """Return magnitude / ||W + scaling * B A|| for every output of a packed product, 1 where there is no magnitude.

    B A is added to the one dequantized copy of W that there has to be: exact, and no more memory or arithmetic than the
    expanded form, ||W||^2 + 2 s W A^T B + s^2 ||B A||^2, which loses digits where the terms cancel.

    Args:
        weight: W (out_features, in_features) float32, the product's; it is used up.
        modules: (weights, start, end) of the adapter's modules in it.

    Returns:
        (out_features,) float32, on the device of `weight`.
    """
    factors = torch.ones(weight.shape[0], dtype=torch.float32, device=weight.device)
    for module, start, end in modules:
        if module.magnitude is not None:
            a, b = (matrix.to(weight.device, torch.float32) for matrix in (module.a, module.b))
            norms = weight[start:end].addmm_(b, a, alpha=module.scaling).norm(dim=1)
            factors[start:end] = module.magnitude.to(weight.device, torch.float32).reshape(-1) / norms
    return factors


class FactorCache:
    """The factors of the adapters used last, so that one that was evicted need not read all weights of the base again.

    Belongs to one base model; the scale is the adapter's own, since DoRA holds for no other. Thread-safe.
    """

    def __init__(self, capacity_bytes: int = CACHED_BYTES) -> None:
        self._capacity = capacity_bytes
        self._entries: OrderedDict[tuple[str, int], torch.Tensor] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self.nbytes = 0
        """Held now."""

    def get(self, digest: str, site: int, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the factors of an adapter at a site, computed if they are not here."""
        key = (digest, site)
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        factors = compute()
        with self._lock:
            if key not in self._entries:
                self._entries[key] = factors
                self.nbytes += factors.nbytes
            while self.nbytes > self._capacity:
                self.nbytes -= self._entries.popitem(last=False)[1].nbytes
        return factors
