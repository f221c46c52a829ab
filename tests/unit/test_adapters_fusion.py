"""Fused modules and their parts: what is divided or put together computes the same."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.adapters.bound import ModuleWeights
from loraplex.adapters.fusion import Place, in_layout_of, join, places, split

INPUTS = 5
sizes = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def weights(rank: int, outputs: int, seed: int, *, bias: bool = True) -> ModuleWeights:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, INPUTS, generator=generator), torch.randn(outputs, rank, generator=generator)
    magnitude, vector = torch.rand(outputs, generator=generator), torch.randn(outputs, generator=generator)
    return ModuleWeights(a, b, 0.5, magnitude, vector if bias else None)


@settings(deadline=None)
@given(sizes, st.integers(1, 4), st.integers(0, 99))
def test_the_parts_of_a_fused_adapter_add_the_same(outputs: list[int], rank: int, seed: int) -> None:
    whole = weights(rank, sum(outputs), seed)
    parts = split(whole, outputs)
    assert [part.b.shape[0] for part in parts] == outputs
    torch.testing.assert_close(torch.cat([part.b @ part.a for part in parts]), whole.b @ whole.a)
    for name in ("magnitude", "lora_bias"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


@settings(deadline=None)
@given(sizes, st.data())
def test_parts_put_together_add_the_same(outputs: list[int], data: st.DataObject) -> None:
    present = data.draw(st.lists(st.booleans(), min_size=len(outputs), max_size=len(outputs)).filter(any))
    found, expected, start = [], [], 0
    for index, size in enumerate(outputs):
        part = weights(data.draw(st.integers(1, 3)), size, index, bias=index % 2 == 0)
        if present[index]:
            found.append((Place(start, start + size), part))
        start += size
        bias = part.lora_bias if part.lora_bias is not None else torch.zeros(size)
        expected.append((part.b @ part.a, bias) if present[index] else (torch.zeros(size, INPUTS), torch.zeros(size)))
    joined = join(found, start)
    torch.testing.assert_close(joined.b @ joined.a, torch.cat([delta for delta, _ in expected]))
    assert joined.rank == sum(part.rank for _, part in found)
    bias = torch.cat([vector for _, vector in expected])
    assert torch.equal(joined.lora_bias if joined.lora_bias is not None else torch.zeros(start), bias)


def test_parts_of_different_types_keep_their_values() -> None:
    first, second = weights(2, 3, 1), weights(2, 4, 2)
    half = ModuleWeights(first.a.bfloat16(), first.b.bfloat16(), 0.5)
    joined = join([(Place(0, 3), half), (Place(3, 7), ModuleWeights(second.a, second.b, 0.5))], 7)
    assert torch.equal(joined.b[3:, 2:], second.b)
    assert torch.equal(joined.b[:3, :2], half.b.float())


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.sets(st.integers(0, 2), max_size=2))
def test_parts_that_are_left_out_are_found_by_size(queries: int, keys: int, absent: set[int]) -> None:
    rows = [queries, keys, keys]
    known = [None if index in absent else size for index, size in enumerate(rows)]
    expected = (Place(0, queries), Place(queries, queries + keys), Place(queries + keys, queries + 2 * keys))
    assert places(known, sum(rows)) == expected


def test_a_base_takes_on_the_layout_of_the_adapter() -> None:
    fused = ["model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj", "lm_head"]
    parts = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    both = [f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up")]
    assert in_layout_of(["x.layers.3.self_attn.k_proj"], fused) == {*parts, *fused[1:]}
    assert in_layout_of(fused[:1], [*parts, *both, "lm_head"]) == {fused[0], *both, "lm_head"}
    assert in_layout_of(fused, fused) == set(fused)
    assert in_layout_of(parts, [*parts, *both]) == {*parts, *both}
