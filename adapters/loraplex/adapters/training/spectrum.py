"""What an adapter's ranks are used for: the singular values of every module's update, from A and B alone.

The *effective rank* is exp of the entropy of the normalized singular values (Roy and Vetterli, 2007): r equal ones give
r, one large one gives 1. What it takes to keep 99 % of the energy is what `loraplex adapter compress --energy 0.99`
would leave; the rest of the rank is wasted. The full product is never made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex.adapters.compress import Budget, Factors, singular_values
from loraplex.adapters.formats import read_adapter
from loraplex.adapters.training.architecture import LinearModule
from loraplex.adapters.training.module_role import Role, role_of

KEPT_ENERGY = 0.99


@dataclass(frozen=True)
class ModuleSpectrum:
    """One module's update.

    Attributes:
        module: its full name.
        role: what it does in its block.
        singular: values of scaling * B A, largest first; as many as A has rows.
        effective: the effective rank; 0 for an update that is 0.
        needed: how many of them keep `KEPT_ENERGY` of the energy.
        parameters: numbers in A and B, and `kept` those that are left at the needed rank.
    """

    module: str
    role: Role
    singular: tuple[float, ...]
    effective: float
    needed: int
    parameters: int
    kept: int

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.singular)

    @property
    def wasted(self) -> int:
        """Rank that could go."""
        return self.rank - self.needed


@dataclass(frozen=True)
class AdapterSpectrum:
    """All modules of the adapter with that digest, in the order of their names."""

    source: str
    digest: str
    modules: tuple[ModuleSpectrum, ...]

    @property
    def rank(self) -> int:
        """The ranks of all modules together."""
        return sum(module.rank for module in self.modules)

    @property
    def needed(self) -> int:
        """What of it keeps `KEPT_ENERGY` of each module's energy."""
        return sum(module.needed for module in self.modules)

    @property
    def size_left(self) -> float:
        """Share of the numbers in A and B that is left at the needed ranks."""
        return sum(module.kept for module in self.modules) / sum(module.parameters for module in self.modules)

    @property
    def largest_rank(self) -> int:
        """Of any module."""
        return max(module.rank for module in self.modules)


def read_spectrum(folder: Path) -> AdapterSpectrum:
    """Compute the spectrum of the adapter in `folder`: LoRA of any kind; what DoRA does beside it is left out.

    Raises:
        AdapterFormatError: the folder holds no adapter; says what is wrong.
    """
    adapter = read_adapter(folder)
    pairs = {**adapter.pairs, **adapter.embeddings}
    modules = []
    for path in sorted(pairs, key=_by_layer):
        pair = pairs[path]
        factors = [Factors(pair.a, pair.b, adapter.spec.scaling_of(path))]
        modules.append(_module_spectrum(path, singular_values(factors), pair.a.shape[1], pair.b.shape[0]))
    return AdapterSpectrum(str(folder), adapter.digest, tuple(modules))


def effective_rank(singular: torch.Tensor) -> float:
    """Return exp of the entropy of the `singular` values, normalized to sum 1; 0 if all are 0."""
    total = float(singular.sum())
    if total <= 0:
        return 0.0
    shares = singular / total
    entropy = -torch.special.xlogy(shares, shares).sum()
    return float(entropy.exp())


def _module_spectrum(path: str, singular: torch.Tensor, inputs: int, outputs: int) -> ModuleSpectrum:
    needed = Budget(energy=KEPT_ENERGY).rank_of(singular)
    return ModuleSpectrum(
        module=path,
        role=role_of(LinearModule(path, inputs, outputs)),
        singular=tuple(map(float, singular)),
        effective=effective_rank(singular),
        needed=needed,
        parameters=len(singular) * (inputs + outputs),
        kept=needed * (inputs + outputs),
    )


def _by_layer(path: str) -> list[tuple[int, int, str]]:
    """Order numbers in names as numbers: layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split(".")]
