"""Packing an adapter: what is folded, where it lies, what is refused."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from loraplex.adapters.binding import BoundAdapter, ModuleWeights
from loraplex.server.lora.buffer import ALIGNMENT_BYTES, moved
from loraplex.server.lora.packing import pack_adapter, packed_nbytes
from loraplex.server.lora.weights import LinearSite, PackedAdapter

CPU = torch.device("cpu")
SITES = (
    LinearSite("layers.0.qkv", 10, 14, {"0.q": (0, 8), "0.k": (8, 11), "0.v": (11, 14)}),
    LinearSite("layers.0.o", 8, 10, {"0.o": (0, 10)}),
    LinearSite("layers.1.qkv", 10, 14, {"1.q": (0, 8), "1.k": (8, 11), "1.v": (11, 14)}),
)


def module(name: str, rank: int, scaling: float = 1.0, dtype: torch.dtype = torch.float32) -> ModuleWeights:
    site, (start, end) = next((site, site.targets[name]) for site in SITES if name in site.targets)
    generator = torch.Generator().manual_seed(sum(name.encode()))
    a = torch.randn(rank, site.in_features, generator=generator).to(dtype)
    return ModuleWeights(a, torch.randn(end - start, rank, generator=generator).to(dtype), scaling)


def adapter(**ranks: int) -> BoundAdapter:
    names = {f"{key[1]}.{key[0]}": rank for key, rank in ranks.items()}
    return BoundAdapter("sha256:1", {name: module(name, rank, 0.5) for name, rank in names.items()})


def slices_of(packed: PackedAdapter) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(s.a, s.b_t) for slices in packed.sites for s in slices]


def test_slices_hold_a_and_the_scaled_transpose_of_b_in_the_order_of_the_output() -> None:
    bound = adapter(v0=2, q0=3, o0=5)
    packed = pack_adapter(bound, SITES, torch.float32, CPU)
    assert [[(s.start, s.end, s.rank) for s in slices] for slices in packed.sites] == [
        [(0, 8, 3), (11, 14, 2)],
        [(0, 10, 5)],
        [],
    ]
    for name, (a, b_t) in zip(("0.q", "0.v", "0.o"), slices_of(packed), strict=True):
        weights = bound.modules[name]
        assert torch.equal(a, weights.a)
        assert torch.equal(b_t, 0.5 * weights.b.T)
        assert a.is_contiguous()
        assert b_t.is_contiguous()
    assert packed.rank == 5
    assert packed.digest == "sha256:1"


def test_scaling_is_folded_before_the_rounding() -> None:
    weights = module("0.o", 4, scaling=1 / 3, dtype=torch.bfloat16)
    packed = pack_adapter(BoundAdapter("d", {"0.o": weights}), SITES, torch.bfloat16, CPU)
    (_, b_t) = slices_of(packed)[0]
    once = (weights.b.float() / 3).bfloat16().T
    assert torch.equal(b_t, once)
    assert packed.dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_lies_in_one_buffer_on_cache_lines(dtype: torch.dtype) -> None:
    bound = adapter(q0=3, k0=1, v0=7, o0=2, q1=256)
    packed = pack_adapter(bound, SITES, dtype, CPU)
    tensors = [t for pair in slices_of(packed) for t in pair]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
    assert tensors[0].untyped_storage().nbytes() == packed.nbytes == packed_nbytes(bound, SITES, dtype)
    assert all(t.data_ptr() % ALIGNMENT_BYTES == 0 for t in tensors)
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_the_table_points_at_the_weights() -> None:
    packed = pack_adapter(adapter(q0=3, v0=2, o0=5), SITES, torch.float32, CPU)
    assert packed.table.shape == (3, 2, 7)
    assert packed.extents.tolist() == [[10, 14], [8, 10], [0, 0]]
    assert packed.table[2].tolist() == [[0] * 7] * 2
    for site, slices in enumerate(packed.sites):
        for position, s in enumerate(slices):
            a, b_t, rank, start, width, *vectors = (int(x) for x in packed.table[site, position])
            assert vectors == [0, 0]
            assert (rank, start, width) == (s.rank, s.start, s.end - s.start)
            assert ctypes.c_float.from_address(a).value == s.a[0, 0].item()
            assert ctypes.c_float.from_address(b_t).value == s.b_t[0, 0].item()


def test_an_adapter_without_weights() -> None:
    packed = pack_adapter(BoundAdapter("d", {}), SITES, torch.float32, CPU)
    assert (packed.rank, packed.nbytes, packed.sites) == (0, 0, ((), (), ()))
    assert packed.dtype is torch.float32


def test_a_module_that_the_model_does_not_have_is_named() -> None:
    bound = BoundAdapter("d", {"0.o": module("0.o", 1), "7.o": module("0.o", 1)})
    for attempt in (
        lambda: pack_adapter(bound, SITES, torch.float32, CPU),
        lambda: packed_nbytes(bound, SITES, torch.float32),
    ):
        with pytest.raises(ValueError, match=r"7\.o"):
            attempt()


@pytest.mark.parametrize(("a_shape", "b_shape"), [((2, 9), (10, 2)), ((2, 8), (9, 2)), ((2, 8), (10, 3))])
def test_shapes_that_do_not_fit_the_site(a_shape: tuple[int, int], b_shape: tuple[int, int]) -> None:
    bound = BoundAdapter("d", {"0.o": ModuleWeights(torch.zeros(a_shape), torch.zeros(b_shape), 1.0)})
    with pytest.raises(ValueError, match=r"layers\.0\.o"):
        pack_adapter(bound, SITES, torch.float32, CPU)


def test_an_adapter_moves_as_one_block() -> None:
    packed = pack_adapter(adapter(q0=3, v0=2, o0=5), SITES, torch.bfloat16, CPU)
    assert packed.to(CPU) is packed
    away = packed.to(torch.device("meta"))
    assert away.digest == packed.digest
    assert away.nbytes == packed.nbytes
    assert away.memory is not None
    assert away.memory.device.type == "meta"
    assert packed.memory is not None
    copy = packed.memory.clone()
    for (a, b_t), (far_a, far_b_t) in zip(slices_of(packed), slices_of(away), strict=True):
        for here, there in ((a, far_a), (b_t, far_b_t)):
            assert there.device.type == "meta"
            assert (there.shape, there.dtype, there.storage_offset()) == (here.shape, here.dtype, here.storage_offset())
            assert torch.equal(moved(here, copy), here)
            assert moved(here, copy).untyped_storage().data_ptr() == copy.data_ptr()
