"""The quick 4-bit quantizer against bitsandbytes' own, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.adapters import four_bit, stored_quantized
from loraplex.adapters.bnb import import_bitsandbytes
from loraplex.adapters.quantized_values import round_trip

import_bitsandbytes()
KINDS = pytest.mark.parametrize("kind", four_bit.KINDS)


def theirs(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, Any]:
    import bitsandbytes.functional as functional

    packed, state = functional.quantize_4bit(weight.float(), blocksize=64, compress_statistics=False, quant_type=kind)
    return packed, state


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(128, 192), (33, 77), (3, 5), (1, 1), (4096, 65)])
def test_codes_and_scales_are_bitsandbytes(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    weight[0] = 0
    packed, state = theirs(weight, kind)
    blocks = four_bit.quantize(weight, kind)
    assert torch.equal(blocks.packed(), packed)
    assert torch.equal(blocks.absmax, state.absmax)


@KINDS
def test_values_on_the_bounds_take_the_same_side(kind: str) -> None:
    values = four_bit.code_values(kind).sort().values
    bounds = (values[1:] + values[:-1]) / 2
    down, up = (torch.nextafter(bounds, torch.full_like(bounds, end)) for end in (-2.0, 2.0))
    weight = torch.cat([bounds, down, up, values, torch.tensor([1.0, 0.0, -0.0])])[None]
    packed, _ = theirs(weight, kind)
    assert torch.equal(four_bit.quantize(weight, kind).packed(), packed)


@KINDS
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_finite_weights(kind: str, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 200))
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    weight = torch.tensor([data.draw(st.lists(numbers, min_size=size, max_size=size))])
    packed, state = theirs(weight, kind)
    blocks = four_bit.quantize(weight, kind)
    assert torch.equal(blocks.packed(), packed)
    assert torch.equal(blocks.absmax, state.absmax)


@KINDS
def test_what_cannot_be_quantized_is_refused(kind: str) -> None:
    for bad in (float("nan"), float("inf")):
        for place in (5, 70):
            weight = torch.ones(1, 80)
            weight[0, place] = bad
            with pytest.raises(ValueError, match="NaN or infinite"):
                four_bit.quantize(weight, kind)
    with pytest.raises(ValueError, match="must be one of"):
        four_bit.quantize(torch.ones(1, 64), "int4")


@pytest.mark.parametrize("shape", [(64, 128), (33, 77), (5, 3)])
def test_stored_as_linear4bit_stores_it(shape: tuple[int, int]) -> None:
    nn: Any = import_bitsandbytes().nn
    weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(2))
    module = nn.Linear4bit(shape[1], shape[0], bias=False, quant_type="nf4")
    module.weight = nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    expected = module.to("cpu").state_dict()
    stored = stored_quantized.store_four_bit(weight, "nf4")
    assert list(stored) == list(stored_quantized.four_bit_layout(shape, "nf4"))
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}
    assert layout == stored_quantized.four_bit_layout(shape, "nf4")
    assert set(stored) == set(expected)
    for name, tensor in expected.items():
        if name.startswith(stored_quantized.STATE_PREFIX):
            # Ours has blanks at its end, so that its length does not depend on the values.
            assert bytes(stored[name].tolist()).rstrip() == bytes(tensor.tolist())
        else:
            assert torch.equal(stored[name], tensor), name
    assert torch.equal(stored_quantized.restore(stored), round_trip(weight, "nf4"))
