"""Rotary position embedding: frequencies, and the rotation of a batch's queries and keys.

The formulas are those of transformers' `modeling_rope_utils`, operation by operation, so that fp32 results agree bit
for bit; sources: RoFormer (Su et al. 2021), YaRN (Peng et al. 2023), LongRoPE (Ding et al. 2024), Llama 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from loraplex.server.models.config import RopeConfig

_FIRST_ROWS = 4096


class Rotation(Protocol):
    """The rotation of a batch's T tokens, each by its position."""

    def apply(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotate the first `rotary_dim` numbers of every head; (T, heads, head_dim), may change `heads` in place."""
        ...


@dataclass(frozen=True)
class TorchRotation:
    """`cos` and `sin` are (T, 1, rotary_dim) in the compute dtype, the first half of `sin` negated."""

    cos: torch.Tensor
    sin: torch.Tensor

    def apply(self, heads: torch.Tensor) -> torch.Tensor:
        """See `Rotation`."""
        size = self.cos.shape[-1]
        if size == heads.shape[-1]:
            return torch.addcmul(heads * self.cos, heads.roll(size // 2, -1), self.sin)
        part = heads[..., :size]
        part.copy_(torch.addcmul(part * self.cos, part.roll(size // 2, -1), self.sin))
        return heads


class Rotary:
    """Makes the Rotation of a batch: looks its positions up in a table that grows with the longest context so far.

    Computed anew in every step (tried), cosines and sines cost little alone, but PyTorch wakes all threads for them.
    """

    def __init__(self, config: RopeConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._frequencies = rope_frequencies(config).to(device)  # (rotary_dim / 2,) float32
        self._factor = config.attention_factor
        self._dtype = dtype
        self._table = self._rows(_FIRST_ROWS)

    def rotation(self, positions: torch.Tensor, longest: int) -> Rotation:
        """Return the rotation of tokens at `positions` (T,), all less than `longest`."""
        table = self._table
        if longest > len(table):
            table = self._table = self._rows(max(longest, 2 * len(table)))
        rows = F.embedding(positions, table)
        if rows.device.type == "cpu":
            from loraplex.server.models.pointwise import CpuRotation

            return CpuRotation(rows)
        cos, sin = rows.unsqueeze(1).chunk(2, -1)
        return TorchRotation(cos, sin)

    def _rows(self, count: int) -> torch.Tensor:
        """Return the cosines and sines of the first positions, as the Rotation of this device needs them."""
        positions = torch.arange(count, device=self._frequencies.device)
        angles = positions[:, None].float() * self._frequencies  # (count, rotary_dim / 2)
        cos, sin = angles.cos() * self._factor, angles.sin() * self._factor
        if angles.device.type == "cpu":
            return torch.cat((cos, sin), -1)
        return torch.cat((cos, cos, -sin, sin), -1).to(self._dtype)


def rope_frequencies(config: RopeConfig) -> torch.Tensor:
    """Return the angle per position of each pair of numbers: (rotary_dim / 2,) float32."""
    powers = config.theta ** (torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim)
    match config.kind:
        case "default":
            return 1.0 / powers
        case "linear":
            return 1.0 / powers / config.factor
        case "longrope":
            return 1.0 / (torch.tensor(config.factors, dtype=torch.float32) * powers)
        case "llama3":
            return _llama3(1.0 / powers, config)
        case "yarn":
            return _yarn(powers, config)


def _llama3(frequencies: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Keep fast frequencies, divide slow ones by the factor, and blend between."""
    wavelengths = 2 * math.pi / frequencies
    longest = config.original_max_positions / config.low_freq_factor
    shortest = config.original_max_positions / config.high_freq_factor
    scaled = torch.where(wavelengths > longest, frequencies / config.factor, frequencies)
    smooth = (config.original_max_positions / wavelengths - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    blended = (1 - smooth) * scaled / config.factor + smooth * scaled
    between = ~(wavelengths < shortest) & ~(wavelengths > longest)
    return torch.where(between, blended, scaled)


def _yarn(powers: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Keep dimensions that turn often within the original context, stretch those that turn less than once."""
    dim = config.rotary_dim

    def dimension_of(rotations: float) -> float:
        return (dim * math.log(config.original_max_positions / (rotations * 2 * math.pi))) / (
            2 * math.log(config.theta)
        )

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp needs a width
    stretch = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - stretch
    return 1.0 / (config.factor * powers) * (1 - kept) + 1.0 / powers * kept
