"""What the Triton LoRA kernels read in one step: segments cut into tiles, laid out as records.

Plain numbers on the CPU; knows nothing of launches or devices. How a segment is cut depends on that segment alone, so
that a token's result does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from loraplex.server.lora.segments import Segment

# The fields of a tile's record, as triton_kernel reads them.
TILE_FIELDS = 7
UNIT_RADIX = 65536


@dataclass(frozen=True)
class TileShape:
    """How one kind of tile is computed. The sizes of matrix products are at least 16: Triton's `dot` takes no less.

    Attributes:
        tokens: of a tile.
        ranks: rows of A that one program takes.
        inner: inputs that it takes at a time.
        chunk: inputs from which on another program helps; `max_splits` of them at most.
        columns: outputs that one program of expand takes.
        warps: of 32 threads, for shrink and expand.
        stages: loads under way at a time in shrink.
    """

    tokens: int
    ranks: int
    inner: int
    chunk: int
    max_splits: int
    columns: int
    warps: tuple[int, int]
    stages: int

    def splits(self, in_features: int) -> tuple[int, int]:
        """Return how many programs share the inputs, and how many inputs each takes, a multiple of `inner`."""
        wanted = min(self.max_splits, max(1, -(-in_features // self.chunk)))
        each = -(-in_features // (wanted * self.inner)) * self.inner
        return -(-in_features // each), each


# Decode rows are bound by reading A and B once, with enough programs to keep all of the memory busy; chunks of prompts
# by the matrix products. Chosen by counting bytes and programs for an H100, not measured yet.
SHORT = TileShape(16, 16, 128, 512, 8, 128, warps=(2, 4), stages=4)
LONG = TileShape(64, 32, 64, 1024, 4, 128, warps=(4, 8), stages=3)
TILE_SHAPES = (SHORT, LONG)
# Tokens of a segment from which on it is cut into long tiles.
MIN_LONG_TOKENS = 65


@dataclass(frozen=True)
class TileLimits:
    """What one kind of tile may come to in a step."""

    tiles: int = 0
    units: int = 0
    hidden: int = 0
    """Float32 of workspace for one split."""

    def holds(self, other: TileLimits) -> bool:
        """Whether a step that needs `other` is within this."""
        return self.tiles >= other.tiles and self.units >= other.units and self.hidden >= other.hidden


@dataclass(frozen=True)
class LoraLimits:
    """What a step may hold; the launches of a captured step are made for these numbers.

    Attributes:
        kinds: for `SHORT` and `LONG` tiles.
        slices: of any adapter at any site.
        sites: those that have launches; None is all.
        aligned: whether every slice begins and ends at a multiple of 16 columns.
        plain: whether no adapter does what needs launches of its own (weights and biases in the base's place).
    """

    kinds: tuple[TileLimits, ...]
    slices: int
    sites: frozenset[int] | None
    aligned: bool
    plain: bool

    def holds(self, other: LoraLimits) -> bool:
        """Whether a step that needs `other` is within this."""
        return (
            all(mine.holds(theirs) for mine, theirs in zip(self.kinds, other.kinds, strict=True))
            and self.slices >= other.slices
            and (self.sites is None or (other.sites is not None and self.sites >= other.sites))
            and self.aligned <= other.aligned
            and self.plain <= other.plain
        )


@dataclass(frozen=True)
class Reserved:
    """What the adapters of captured steps may be like; a step with others is not replayed.

    Attributes:
        dtype: of their matrices.
        max_rank: of any slice; it costs workspace, not time.
        slices: modules in one site.
        aligned: whether modules must have multiples of 16 outputs, which loads weights 16 bytes at a time.
    """

    dtype: torch.dtype = torch.bfloat16
    max_rank: int = 256
    slices: int = 3
    aligned: bool = True

    def limits(self, tokens: int, segments: int, sites: frozenset[int] | None = None) -> LoraLimits:
        """Return what up to `segments` segments of such adapters in `tokens` tokens may come to at `sites` (None: all).

        Each site costs two launches.
        """
        long = min(segments, tokens // MIN_LONG_TOKENS)
        # A segment has at most one tile that is not full.
        counts = (segments + tokens // SHORT.tokens, long + tokens // LONG.tokens if long else 0)
        kinds = []
        for shape, tiles in zip(TILE_SHAPES, counts, strict=True):
            blocks = -(-self.max_rank // shape.ranks)
            kinds.append(TileLimits(tiles, tiles * blocks, tiles * shape.tokens * blocks * shape.ranks * self.slices))
        return LoraLimits(tuple(kinds), self.slices, sites, self.aligned, plain=True)


@dataclass(frozen=True)
class TableInfo:
    """What the records say of an adapter: where its table lies on the device, and sizes."""

    address: int
    slices: int
    rank: int


@dataclass
class KindRecords:
    """The tiles and units of one kind."""

    shape: TileShape
    tiles: list[tuple[int, ...]] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    hidden: int = 0

    @property
    def limits(self) -> TileLimits:
        """What these need."""
        return TileLimits(len(self.tiles), len(self.units), self.hidden)

    def add(self, segment: Segment, table: TableInfo) -> None:
        """Cut a segment into tiles; nothing is added for an adapter without matrices."""
        blocks = -(-table.rank // self.shape.ranks)
        pad = blocks * self.shape.ranks
        scale = int(np.float32(segment.scale).view(np.int32))
        for start in range(segment.start, segment.end, self.shape.tokens) if blocks else ():
            count = min(self.shape.tokens, segment.end - start)
            self.units.extend(len(self.tiles) * UNIT_RADIX + block for block in range(blocks))
            self.tiles.append((start, count, table.address, table.slices, self.hidden, pad, scale))
            self.hidden += self.shape.tokens * pad * table.slices


def cut(segments: Sequence[tuple[Segment, TableInfo]]) -> tuple[KindRecords, ...]:
    """Return the records of a step's segments, by kind of tile."""
    kinds = tuple(KindRecords(shape) for shape in TILE_SHAPES)
    for segment, table in segments:
        kinds[segment.end - segment.start >= MIN_LONG_TOKENS].add(segment, table)
    return kinds


def record_size(limits: Sequence[TileLimits]) -> int:
    """Return the int64 numbers that the records of a step within these limits take."""
    return sum(kind.tiles * TILE_FIELDS + 1 + kind.units for kind in limits)


def write_records(kinds: Sequence[KindRecords], limits: Sequence[TileLimits], to: npt.NDArray[np.int64]) -> None:
    """Write the tiles and, after their number, the units of all kinds; tiles up to the limits are empty."""
    to[:] = 0
    for kind, (first, units, _) in zip(kinds, offsets(limits), strict=True):
        if kind.tiles:
            to[first : first + len(kind.tiles) * TILE_FIELDS] = np.asarray(kind.tiles, dtype=np.int64).reshape(-1)
        to[units] = len(kind.units)
        to[units + 1 : units + 1 + len(kind.units)] = kind.units


def offsets(limits: Sequence[TileLimits]) -> Iterator[tuple[int, int, int]]:
    """Yield for each kind where its tiles begin, where its units begin (with their number) and where they end."""
    at = 0
    for kind in limits:
        units = at + kind.tiles * TILE_FIELDS
        yield at, units, units + 1 + kind.units
        at = units + 1 + kind.units
