"""What graphics cards can do at most, as their maker says."""

from __future__ import annotations

from dataclasses import dataclass

REACHED = 0.9
"""Of the bandwidth that a data sheet gives, what a large copy reaches: 3.0 of 3.35 TB/s on an H100 (docs/LOG.md)."""


@dataclass(frozen=True)
class Card:
    """One card: bytes a second of its memory and of its link to the host (one way), and bfloat16 products.

    `flop_s` is for dense matrices: data sheets that count zeros are halved.
    """

    title: str
    memory_gb: int
    bytes_s: float
    flop_s: float
    link_bytes_s: float
    source: str

    @property
    def reached_bytes_s(self) -> float:
        """Bytes a second that a program can count on."""
        return REACHED * self.bytes_s


CARDS = {
    "h100": Card("H100 SXM 80 GB", 80, 3.35e12, 989e12, 64e9, "NVIDIA H100 Tensor Core GPU data sheet, SXM column"),
    "h100-pcie": Card("H100 PCIe 80 GB", 80, 2.0e12, 756e12, 64e9, "NVIDIA H100 Tensor Core GPU data sheet, PCIe"),
    "h200": Card("H200 SXM 141 GB", 141, 4.8e12, 989e12, 64e9, "NVIDIA H200 Tensor Core GPU data sheet, SXM column"),
    "a100": Card("A100 SXM 80 GB", 80, 2.039e12, 312e12, 32e9, "NVIDIA A100 Tensor Core GPU data sheet, 80GB SXM"),
    "l4": Card("L4 24 GB", 24, 300e9, 121e12, 32e9, "NVIDIA L4 Tensor Core GPU data sheet"),
}
