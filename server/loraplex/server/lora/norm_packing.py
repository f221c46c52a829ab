"""Packs the norms that an adapter has trained."""

from __future__ import annotations

import torch

from loraplex.adapters.binding import BoundAdapter
from loraplex.server.lora.base import BaseNorm, BaseParameters
from loraplex.server.lora.buffer import Buffer
from loraplex.server.lora.changes import ReplacedNorm


class NormPacker:
    """One norm of which an adapter has trained something. `taken` is all of the adapter that has its place here."""

    def __init__(self, bound: BoundAdapter, base: BaseNorm) -> None:
        """Check that everything fits.

        Raises:
            ValueError: saying what does not.
        """
        replaced = {name: bound.parameters[name] for name in base.parameters if name in bound.parameters}
        for name, tensor in replaced.items():
            if tensor.shape != base.parameters[name].shape:
                expected = tuple(base.parameters[name].shape)
                raise ValueError(f"adapter {bound.digest}, {name}: {tuple(tensor.shape)} instead of {expected}")
        self.taken = {("parameters", name) for name in replaced}
        self._make = base.make
        self._tensors = base.prepare({name: tensor.cpu() for name, tensor in {**base.parameters, **replaced}.items()})

    def pack(self, buffer: Buffer) -> ReplacedNorm:
        """Put the norm's tensors into `buffer`."""
        return ReplacedNorm(tuple(self._put(tensor, buffer) for tensor in self._tensors), self._make)

    @staticmethod
    def _put(tensor: torch.Tensor, buffer: Buffer) -> torch.Tensor:
        return buffer.put(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def changed_norms(bound: BoundAdapter, base: BaseParameters) -> dict[str, NormPacker]:
    """Return the norms that `bound` changes, by their place."""
    return {
        place: NormPacker(bound, norm)
        for place, norm in base.norms.items()
        if norm.parameters.keys() & bound.parameters
    }
