"""LoRA for a fused linear module (`qkv_proj`) on a base that has its parts, and the reverse; exact both ways.

The outputs of the parts stand side by side in the fused module's. So the rows of a fused B divide among the parts,
which share A. The other way the parts' A stand one below the other, and B has each part's own B where that part's
outputs cross that part's rows of A, and zeros elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from loraplex.adapters.bound import ModuleWeights

# The order of the parts is that of the fused module's outputs.
FUSED: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True)
class Place:
    """A part's rows `start:end` of its fused module's outputs."""

    start: int
    end: int


def parts_of(module: str) -> tuple[str, ...]:
    """Return the modules that `module` is fused from, or nothing if it is not a fused one."""
    for fused, parts in FUSED.items():
        if module.endswith(f".{fused}"):
            prefix = module[: -len(fused)]
            return tuple(prefix + part for part in parts)
    return ()


def fused_with(module: str) -> str:
    """Return the fused module that `module` is a part of, or an empty string."""
    for fused, parts in FUSED.items():
        part = next((part for part in parts if module.endswith(f".{part}")), None)
        if part is not None:
            return module[: -len(part)] + fused
    return ""


def in_layout_of(adapted: Iterable[str], base: Iterable[str]) -> frozenset[str]:
    """Return the modules of `base`, fused or in parts as the `adapted` modules are."""
    adapted, found = set(adapted), set(base)
    for fused, parts in FUSED.items():
        has_fused = any(name.endswith(f".{fused}") for name in adapted)
        has_parts = any(name.endswith(tuple(f".{part}" for part in parts)) for name in adapted)
        for name in tuple(found):
            if has_fused and name.endswith(f".{parts[0]}"):
                whole = fused_with(name)
                found.difference_update(parts_of(whole))
                found.add(whole)
            elif has_parts and name.endswith(f".{fused}"):
                found.remove(name)
                found.update(parts_of(name))
    return frozenset(found)


def split(weights: ModuleWeights, sizes: Sequence[int]) -> tuple[ModuleWeights, ...]:
    """Divide the LoRA of a fused module among parts with `sizes` outputs; A is shared, not copied."""

    def rows(vector: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
        return [None] * len(sizes) if vector is None else torch.split(vector, list(sizes))

    return tuple(
        ModuleWeights(weights.a, b, weights.scaling, magnitude, bias)
        for b, magnitude, bias in zip(
            torch.split(weights.b, list(sizes)), rows(weights.magnitude), rows(weights.lora_bias), strict=True
        )
    )


def places(rows: Sequence[int | None], total: int) -> tuple[Place, ...] | None:
    """Return where each part's outputs stand in the `total` of the fused module.

    `rows` are the outputs of the parts in order, None where the adapter leaves a part out. Keys and values have one
    size, and so have gate and up; a part that is left out has it too, or what the others leave. None if that cannot be.
    """
    sizes = list(rows)
    if len(sizes) == 3 and sizes[0] is None:
        sizes[1:] = [sizes[1] or sizes[2], sizes[2] or sizes[1]]
    missing = sizes.count(None)
    rest = total - sum(size for size in sizes if size is not None)
    if rest < 0 or (rest > 0) != (missing > 0) or (missing and rest % missing):
        return None
    found: list[Place] = []
    start = 0
    for size in sizes:
        end = start + (rest // missing if size is None else size)
        found.append(Place(start, end))
        start = end
    return tuple(found)


def join(parts: Sequence[tuple[Place, ModuleWeights]], total: int) -> ModuleWeights:
    """Put the LoRA of parts together to that of their fused module with `total` outputs.

    All parts have one scaling, and with magnitudes they fill the module. Outputs of no part get a bias of zero. The
    ranks add up.
    """
    a = torch.cat([weights.a for _, weights in parts])
    dtype = functools.reduce(torch.promote_types, (weights.b.dtype for _, weights in parts))
    b = torch.zeros((total, a.shape[0]), dtype=dtype)
    column = 0
    for place, weights in parts:
        b[place.start : place.end, column : column + weights.rank] = weights.b
        column += weights.rank
    magnitudes = [weights.magnitude for _, weights in parts if weights.magnitude is not None]
    bias = None
    if any(weights.lora_bias is not None for _, weights in parts):
        bias = torch.zeros(total, dtype=dtype)
        for place, weights in parts:
            if weights.lora_bias is not None:
                bias[place.start : place.end] = weights.lora_bias
    return ModuleWeights(a, b, parts[0][1].scaling, torch.cat(magnitudes) if magnitudes else None, bias)
