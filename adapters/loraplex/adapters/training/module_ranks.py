"""Ranks of single modules in the seed's proportions, as PEFT's `rank_pattern` and `alpha_pattern`.

PEFT divides each module's own alpha by its own rank. A `rank_pattern` alone would so change the scaling with the rank;
the `alpha_pattern` keeps alpha = 2 * rank everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraplex.adapters.training.architecture import LinearModule
from loraplex.adapters.training.module_role import Role, kind_of, role_of
from loraplex.adapters.training.seed_figures import seed
from loraplex.adapters.training.targets import pattern_of

_AT_RANK = 16
# Modules that are several in one take the rank of the one that asks for most: their A is shared.
_SEED_NAMES: Mapping[Role, tuple[str, ...]] = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "o": ("o_proj",),
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "gate": ("gate_proj",),
    "up": ("up_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@dataclass(frozen=True)
class ModuleRanks:
    """Ranks by full name of the module, and the patterns that say the same to PEFT; empty where `rank` is all."""

    rank: int
    ranks: Mapping[str, int]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, int]


def uniform_ranks(chosen: Sequence[LinearModule], rank: int) -> ModuleRanks:
    """Return the same rank for all."""
    return ModuleRanks(rank, {module.name: rank for module in chosen}, {}, {})


def seed_ranks(chosen: Sequence[LinearModule], everything: Sequence[LinearModule], rank: int) -> ModuleRanks:
    """Return ranks in the seed's proportions around `rank` (which is that of k, o and up), at least 1."""
    ranks = {module.name: max(1, round(rank * factor_of(role_of(module)))) for module in chosen}
    pattern: dict[str, int] = {}
    kinds: dict[str, list[LinearModule]] = {}
    for module in chosen:
        kinds.setdefault(kind_of(module.name), []).append(module)
    for kind in kinds.values():
        own = ranks[kind[0].name]
        if own != rank:
            alike = [name for name, each in ranks.items() if each == own]
            # What is no target has no rank that a pattern could change.
            others = [module.name for module in everything if module.name not in ranks]
            pattern[pattern_of(kind, everything, [*alike, *others])] = own
    alphas = {key: seed("alpha_factor") * each for key, each in pattern.items()}
    return ModuleRanks(rank, ranks, pattern, alphas)


def factor_of(role: Role) -> float:
    """Return how many times the chosen rank a module of this role gets."""
    names = _SEED_NAMES.get(role)
    return max(seed("module_rank")[name] for name in names) / _AT_RANK if names else 1.0
