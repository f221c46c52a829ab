"""Normalizations, each with the residual addition that comes before it. Computed in float32 whatever the dtype."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from loraplex.server.models.config import NormKind


class Norm(Protocol):
    """Normalizes over the last dimension."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized `x`, in its shape and dtype."""
        ...

    def add(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Add `delta` to `x` in place and return the normalized sum."""
        ...


class RmsNorm:
    """`x / sqrt(mean(x^2) + eps) * weight`; the weight may have more leading dimensions, for a norm per head."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps
        self._size = (weight.shape[-1],)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized `x`."""
        if self._weight.ndim == 1 and self._weight.dtype == x.dtype:
            return F.rms_norm(x, self._size, self._weight, self._eps)
        normalized = F.rms_norm(x.to(self._weight.dtype), self._size, None, self._eps)
        return (normalized * self._weight).to(x.dtype)

    def add(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Add `delta` to `x` in place and return the normalized sum."""
        return self(x.add_(delta))


class LayerNorm:
    """`(x - mean) / sqrt(variance + eps) * weight + bias`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._bias = bias
        self._eps = eps
        self._size = (weight.shape[-1],)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized `x`."""
        return F.layer_norm(x, self._size, self._weight, self._bias, self._eps)

    def add(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Add `delta` to `x` in place and return the normalized sum."""
        return self(x.add_(delta))


def norm_tensors(
    kind: NormKind, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Return what a norm reads when it runs: its weights (features,) as the checkpoint has them, ready for `dtype`."""
    if kind == "layer":
        assert bias is not None, "a LayerNorm has a bias"
        return weight.to(dtype), bias.to(dtype)
    # Gemma multiplies by 1 + w in float32.
    return (1 + weight.float(),) if kind == "rms_plus_one" else (weight.to(dtype),)


def make_norm(kind: NormKind, eps: float, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> Norm:
    """Return the norm of that kind for activations in `dtype`, on the device of its `norm_tensors`."""
    if kind == "layer":
        weight, bias = tensors
        return LayerNorm(weight, bias, eps)
    (weight,) = tensors
    if weight.device.type == "cpu":
        from loraplex.server.models.pointwise import CpuRmsNorm

        return CpuRmsNorm(weight, eps, dtype)
    return RmsNorm(weight, eps)
