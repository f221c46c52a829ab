"""Quantized weights as bitsandbytes and transformers store them in safetensors: reading and writing one module.

A 4-bit module has `weight` (packed codes) and `weight.absmax`, `weight.quant_map`, `weight.nested_absmax`,
`weight.nested_quant_map` and `weight.quant_state.bitsandbytes__nf4`; an 8-bit one has `weight` and `SCB`. Names here
have the module's path taken off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loraplex.adapters import four_bit
from loraplex.adapters.bnb import import_bitsandbytes
from loraplex.adapters.errors import PreconditionError

STATE_PREFIX = "weight.quant_state.bitsandbytes__"
INT8_SCALES = "SCB"
# Bytes for the JSON that describes a weight; its length depends on the values, and blanks at its end mean nothing.
_STATE_BYTES = 256


@dataclass(frozen=True)
class FourBitState:
    """What is known of a stored 4-bit weight beside its codes; `absmax` (blocks,) float32 is restored if nested."""

    kind: str
    block_size: int
    shape: tuple[int, ...]
    absmax: torch.Tensor


def read_state(parts: Mapping[str, torch.Tensor], device: torch.device) -> FourBitState:
    """Return the state in a module's tensors `parts`.

    Raises:
        ValueError: if they are not what bitsandbytes writes.
    """
    functional = import_bitsandbytes().functional
    try:
        state = functional.QuantState.from_dict(
            {name: tensor for name, tensor in parts.items() if name.startswith("weight.")}, device
        )
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        found = FourBitState(state.quant_type, state.blocksize, tuple(state.shape), absmax.float())
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if len(found.shape) != 2:
        raise ValueError(f"a weight of shape {found.shape}, which is no matrix")
    count = math.prod(found.shape)
    codes = parts["weight"].numel() * parts["weight"].element_size()
    if codes != -(-count // 2) or len(found.absmax) != -(-count // found.block_size):
        raise ValueError(f"{codes} bytes and {len(found.absmax)} scales for a weight of shape {found.shape}")
    return found


def read_shape(state: torch.Tensor) -> tuple[int, ...]:
    """Return the shape that the tensor `weight.quant_state...` gives its weight.

    Raises:
        ValueError: if it is not the JSON that bitsandbytes writes.
    """
    try:
        return tuple(int(size) for size in json.loads(bytes(state.tolist()))["shape"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"no shape in the quantization's state: {error}") from error


def restore(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the weights (out, in) float32 that a module's tensors stand for.

    Raises:
        PreconditionError: if they are damaged.
    """
    if INT8_SCALES in parts:
        restored: torch.Tensor = import_bitsandbytes().functional.int8_vectorwise_dequant(
            parts["weight"], parts[INT8_SCALES].float()
        )
        return restored
    try:
        state = read_state(parts, torch.device("cpu"))
    except ValueError as error:
        raise PreconditionError(f"a damaged 4-bit weight: {error}") from error
    packed = parts["weight"].reshape(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)
    codes = torch.nn.functional.pad(codes, (0, len(state.absmax) * state.block_size - len(codes)))
    return four_bit.Blocks(state.kind, state.shape, codes.view(-1, state.block_size), state.absmax).values(state.absmax)


def store_four_bit(weight: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """Quantize `weight` (out, in) with nested scales; return the module's tensors as `Linear4bit` would save them.

    Raises:
        ValueError: if a weight is not finite.
    """
    functional = import_bitsandbytes().functional
    blocks = four_bit.quantize(weight, kind)
    scales = four_bit.nest(blocks.absmax)
    state = functional.QuantState(
        absmax=scales.codes,
        shape=weight.shape,
        code=four_bit.code_values(kind),
        blocksize=four_bit.BLOCK_SIZE,
        quant_type=kind,
        dtype=torch.float32,
        offset=scales.offset,
        state2=scales.state,
    )
    packed: dict[str, torch.Tensor] = state.as_dict(packed=True)
    tensors = {f"weight.{name}": tensor for name, tensor in packed.items()}
    description = tensors[STATE_PREFIX + kind]
    assert description.numel() <= _STATE_BYTES
    blanks = torch.full((_STATE_BYTES - description.numel(),), ord(" "), dtype=torch.uint8)
    return {"weight": blocks.packed(), **tensors, STATE_PREFIX + kind: torch.cat([description, blanks])}


def four_bit_layout(shape: tuple[int, ...], kind: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of each tensor that `store_four_bit` makes of a weight of `shape`."""
    count = math.prod(shape)
    blocks = -(-count // four_bit.BLOCK_SIZE)
    return {
        "weight": (torch.uint8, (-(-count // 2), 1)),
        "weight.absmax": (torch.uint8, (blocks,)),
        "weight.quant_map": (torch.float32, (16,)),
        "weight.nested_absmax": (torch.float32, (-(-blocks // 256),)),
        "weight.nested_quant_map": (torch.float32, (256,)),
        STATE_PREFIX + kind: (torch.uint8, (_STATE_BYTES,)),
    }
