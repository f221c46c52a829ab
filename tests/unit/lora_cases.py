"""Calls of the LoRA operators that several tests make: sites, adapters, segments, and what a call gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from loraplex.adapters.binding import BoundAdapter, ModuleWeights
from loraplex.server.lora.ops.interface import LoraOps
from loraplex.server.lora.packing import pack_adapter
from loraplex.server.lora.segments import Segment
from loraplex.server.lora.weights import LinearSite, PackedAdapter

CPU = torch.device("cpu")
FLOATS = [torch.float32, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """Sites of one model, adapters for them, and what a call looks like."""

    sites: tuple[LinearSite, ...]
    slots: Mapping[int, PackedAdapter]
    segments: tuple[Segment, ...]
    tokens: int


def site(name: str, in_features: int, *widths: int) -> LinearSite:
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    targets = {f"{name}.{i}": (end - width, end) for i, (width, end) in enumerate(zip(widths, ends, strict=True))}
    return LinearSite(name, in_features, ends[-1], targets)


def adapter(
    sites: Sequence[LinearSite],
    rank: int,
    seed: int,
    dtype: torch.dtype,
    skip: frozenset[str] = frozenset(),
    device: torch.device = CPU,
) -> PackedAdapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: ModuleWeights(
            torch.randn(rank, s.in_features, generator=generator) / s.in_features**0.5,
            torch.randn(end - start, rank, generator=generator) / rank**0.5,
            1.0,
        )
        for s in sites
        for name, (start, end) in s.targets.items()
        if name not in skip
    }
    return pack_adapter(BoundAdapter(f"sha256:{seed}", modules), sites, dtype, device)


SITES = (site("qkv", 48, 48, 16, 16), site("o", 48, 48), site("gate_up", 48, 100, 100), site("down", 100, 48))


def slots_of(
    ranks: Sequence[int], dtype: torch.dtype, sites: Sequence[LinearSite] = SITES, device: torch.device = CPU
) -> dict[int, PackedAdapter]:
    return {slot: adapter(sites, rank, slot, dtype, device=device) for slot, rank in enumerate(ranks)}


def rows_by_popularity(popularity: str, rows: int) -> list[int]:
    """The slot of each row."""
    return {
        "distinct": list(range(rows)),
        "identical": [0] * rows,
        "uniform": [(7 * row) % max(1, rows // 2) for row in range(rows)],
        "skewed": [0 if row % 3 else row for row in range(rows)],
    }[popularity]


def call(ops: LoraOps, case: Case, index: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    result = y.clone()
    ops.add(result, x, index, ops.prepare(case.segments, case.slots))
    return result


@st.composite
def cases(draw: st.DrawFn, device: torch.device = CPU) -> Case:
    """Any sizes, odd ones too; adapters that leave out modules; gaps between segments."""
    sizes = st.integers(1, 80)
    sites = tuple(
        site(f"s{i}", draw(sizes), *draw(st.lists(sizes, min_size=1, max_size=3)))
        for i in range(draw(st.integers(1, 3)))
    )
    names = sorted(name for s in sites for name in s.targets)
    dtype = draw(st.sampled_from(FLOATS))
    slots = {
        slot: adapter(sites, draw(st.integers(1, 70)), slot, dtype, draw(st.frozensets(st.sampled_from(names))), device)
        for slot in range(draw(st.integers(1, 4)))
    }
    position, segments = 0, []
    for _ in range(draw(st.integers(0, 6))):
        start = position + draw(st.integers(0, 2))
        position = start + draw(st.integers(0, 40))
        scale = draw(st.floats(-2, 2, width=32))
        segments.append(Segment(start, position, draw(st.sampled_from(sorted(slots))), scale))
    return Case(sites, slots, tuple(segments), position + draw(st.integers(0, 2)))
