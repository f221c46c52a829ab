"""The order in which integer products read weights: panels of sixteen outputs, and in a panel the inputs pair by pair.

What is packed here comes back exactly. Outputs are filled up to whole panels and inputs to a multiple of 16, all zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from loraplex.server.native.pages import copy_to_huge_pages

OUTPUTS = 16
INPUTS = 16  # rows are filled up to a multiple
STEP = 8  # inputs whose 4-bit codes lie together


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Return integers (out, in), int8 or int16, as (panels, pairs of inputs, 16 outputs, 2)."""
    out_features, in_features = codes.shape
    filled = F.pad(codes, (0, -in_features % INPUTS, 0, -out_features % OUTPUTS))
    return copy_to_huge_pages(filled.view(-1, OUTPUTS, filled.shape[1] // 2, 2).transpose(1, 2))


def unpack(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Return the integers of that shape (out, in) that `pack` was given."""
    rows = packed.transpose(1, 2).reshape(len(packed) * OUTPUTS, -1)
    return rows[: shape[0], : shape[1]].contiguous()


def pack_four_bit(codes: torch.Tensor) -> torch.Tensor:
    """Return 4-bit codes as (panels, steps of 8 inputs, 16 outputs, 4 bytes).

    The four bytes are two words of 16 bits: the codes of inputs 0, 2, 4 and 6 from the low end up, then of 1, 3, 5, 7.

    Args:
        codes: (out, in // 2) uint8, the first of each pair in the high half; `in` is a multiple of 8.
    """
    filled = F.pad(codes, (0, 0, 0, -len(codes) % OUTPUTS))
    a, b, c, d = filled.view(-1, OUTPUTS, filled.shape[1] // 4, 4).transpose(1, 2).unbind(-1)
    words = (a >> 4 | b & 0xF0, c >> 4 | d & 0xF0, a & 0xF | b << 4, c & 0xF | d << 4)
    return copy_to_huge_pages(torch.stack(words, dim=-1))


def unpack_four_bit(packed: torch.Tensor, out_features: int) -> torch.Tensor:
    """Return the codes (out_features, in // 2) that `pack_four_bit` was given."""
    ab, cd, ab_odd, cd_odd = packed.unbind(-1)
    codes = (ab << 4 | ab_odd & 0xF, ab & 0xF0 | ab_odd >> 4, cd << 4 | cd_odd & 0xF, cd & 0xF0 | cd_odd >> 4)
    rows = torch.stack(codes, dim=-1).transpose(1, 2).reshape(len(packed) * OUTPUTS, -1)
    return rows[:out_features].contiguous()


def pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """Return float32 scales (out, blocks) as (panels, blocks, 16)."""
    filled = F.pad(scales, (0, 0, 0, -len(scales) % OUTPUTS))
    return copy_to_huge_pages(filled.view(-1, OUTPUTS, filled.shape[1]).transpose(1, 2))


def unpack_scales(packed: torch.Tensor, out_features: int) -> torch.Tensor:
    """Return the scales (out_features, blocks) that `pack_scales` was given."""
    return packed.transpose(1, 2).reshape(len(packed) * OUTPUTS, -1)[:out_features].contiguous()
