"""Packing by a plan against packing in full."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraplex.adapters.binding import BoundAdapter, ModuleWeights
from loraplex.server.lora.base import BaseParameters
from loraplex.server.lora.packer import Packer
from loraplex.server.lora.packing import pack_adapter
from loraplex.server.lora.weights import LinearSite, PackedAdapter

CPU = torch.device("cpu")
SITES = (
    LinearSite("0.qkv", 6, 12, {"q": (0, 6), "k": (6, 9), "v": (9, 12)}),
    LinearSite("0.o", 5, 7, {"o": (0, 7)}),
    LinearSite("0.down", 3, 4, {"down": (0, 4)}),
)
TARGETS = {name: (site.in_features, end - start) for site in SITES for name, (start, end) in site.targets.items()}


class Layout:
    """Stands for what adapters of one layout share."""


def adapter(seed: int, ranks: dict[str, int], dtype: torch.dtype, layout: object | None) -> BoundAdapter:
    draw = torch.Generator().manual_seed(seed)
    modules = {}
    for name, rank in ranks.items():
        inputs, outputs = TARGETS[name]
        a = torch.randn(rank, inputs, generator=draw).to(dtype)
        b = torch.randn(outputs, rank, generator=draw).to(dtype)
        modules[name] = ModuleWeights(a, b, scaling=0.3 * rank)
    return BoundAdapter(f"d{seed}", modules, layout=layout)


def no_base() -> BaseParameters:
    """Plain LoRA needs nothing of the base."""
    return None  # type: ignore[return-value]


def assert_same(found: PackedAdapter, expected: PackedAdapter) -> None:
    assert (found.digest, found.nbytes, found.rank) == (expected.digest, expected.nbytes, expected.rank)
    assert found.memory is not None
    assert expected.memory is not None
    assert torch.equal(found.memory, expected.memory)
    assert torch.equal(torch.from_numpy(found.extents), torch.from_numpy(expected.extents))
    addresses = torch.tensor([found.memory.data_ptr(), expected.memory.data_ptr()])
    for index in (0, 1):
        ours = torch.from_numpy(found.table[..., index]) - addresses[0]
        theirs = torch.from_numpy(expected.table[..., index]) - addresses[1]
        assert torch.equal(ours[ours >= 0], theirs[theirs >= 0])
    assert torch.equal(torch.from_numpy(found.table[..., 2:]), torch.from_numpy(expected.table[..., 2:]))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_a_plan_packs_to_the_same_bits(source: torch.dtype, target: torch.dtype) -> None:
    packer, layout = Packer(SITES, target, no_base(), pinned=False), Layout()
    ranks = {"q": 3, "v": 2, "o": 9}
    for seed in range(3):
        bound = adapter(seed, ranks, source, layout)
        assert_same(packer.pack(bound), pack_adapter(bound, SITES, target, CPU))
    assert len(packer._plans) == 1


def test_layouts_do_not_mix_and_go_with_their_owner() -> None:
    packer = Packer(SITES, torch.float32, no_base(), pinned=False)
    first, second = Layout(), Layout()
    for seed in range(2):
        for layout, ranks in ((first, {"q": 3}), (second, {"down": 1, "k": 4}), (None, {"o": 2})):
            bound = adapter(seed, ranks, torch.float32, layout)
            assert_same(packer.pack(bound), pack_adapter(bound, SITES, torch.float32, CPU))
    assert len(packer._plans) == 2
    del first, layout, bound
    assert len(packer._plans) == 1


def test_an_adapter_that_fits_nowhere_is_refused() -> None:
    packer = Packer(SITES, torch.float32, no_base(), pinned=False)
    bound = adapter(0, {"q": 3}, torch.float32, Layout())
    stray = replace(bound, modules={"elsewhere": bound.modules["q"]})
    with pytest.raises(ValueError, match="elsewhere"):
        packer.pack(stray)
