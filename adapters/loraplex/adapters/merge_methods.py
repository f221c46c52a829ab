"""How the low-rank updates of several adapters become one: the weighted sum, TIES and DARE.

TIES (Yadav et al., 2023) and DARE (Yu et al., 2023) are PEFT's own functions, given each adapter's whole update of a
matrix, as PEFT's `ties_svd` and `dare_*_svd` do before they cut the rank. Knows nothing about base models.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from loraplex.adapters.bnb import import_bitsandbytes
from loraplex.adapters.errors import FieldViolation

DEFAULT_DENSITY = 0.5
MAX_ADAPTERS = 64
"""In one merge. TIES and DARE hold every adapter's update of a matrix at once, in float32."""


class MergeMethod(StrEnum):
    """How several adapters become one; the last three keep only a share of each one's values."""

    LINEAR = "linear"
    TIES = "ties"
    DARE_LINEAR = "dare-linear"
    DARE_TIES = "dare-ties"


@dataclass(frozen=True)
class Mixing:
    """A method with its settings; None stands for the default, 0.5 and 0.

    Attributes:
        density: share of each adapter's values that TIES and DARE keep, in (0, 1].
        seed: of DARE's random choice.
    """

    method: MergeMethod = MergeMethod.LINEAR
    density: float | None = None
    seed: int | None = None

    def violations(self, adapters: int) -> list[FieldViolation]:
        """Return what is wrong with the settings for this number of adapters."""
        found = []
        if self.method is not MergeMethod.LINEAR and adapters < 2:
            found.append(FieldViolation("method", f"{self.method} needs two adapters or more; one is simply added"))
        if self.density is not None and self.method is MergeMethod.LINEAR:
            found.append(FieldViolation("density", "has no meaning for the weighted sum"))
        elif self.density is not None and not 0 < self.density <= 1:
            found.append(FieldViolation("density", f"must be above 0 and at most 1, not {self.density}"))
        if self.seed is not None and self.method not in (MergeMethod.DARE_LINEAR, MergeMethod.DARE_TIES):
            found.append(FieldViolation("seed", "has a meaning for DARE only"))
        elif self.seed is not None and not 0 <= self.seed < 2**64:
            found.append(FieldViolation("seed", "must be an unsigned 64-bit number"))
        return found

    def describe(self) -> str:
        """Return the method with the settings that count."""
        if self.method is MergeMethod.LINEAR:
            return str(self.method)
        settings = f"density {DEFAULT_DENSITY if self.density is None else self.density:g}"
        if self.method is not MergeMethod.TIES:
            settings += f", seed {self.seed or 0}"
        return f"{self.method} ({settings})"


def weight_violations(weights: Sequence[float]) -> list[FieldViolation]:
    """Return what is wrong with the adapters' weights."""
    if not weights:
        return [FieldViolation("adapters", "are none: name at least one")]
    if len(weights) > MAX_ADAPTERS:
        return [FieldViolation("adapters", f"are {len(weights)}; at most {MAX_ADAPTERS} are merged at once")]
    return [FieldViolation("scale", f"must be finite, not {weight}") for weight in weights if not math.isfinite(weight)]


def mix(mixing: Mixing, subject: str, updates: Iterable[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the updates of one matrix as one: the shape of each, float32. The weighted sum holds one at a time.

    Only the adapters that have an update of the matrix take part, as in PEFT. `subject` names the matrix: what DARE
    draws depends on the seed and on it, not on the order in which matrices come.
    """
    if mixing.method is MergeMethod.LINEAR:
        first, *others = weights
        remaining = iter(updates)
        total = next(remaining) * first
        for update, weight in zip(remaining, others, strict=True):
            total.add_(update, alpha=weight)
        return total
    import_bitsandbytes()  # before PEFT does
    from peft.utils import merge_utils

    density = DEFAULT_DENSITY if mixing.density is None else mixing.density
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject_seed(mixing.seed or 0, subject))
        factors = torch.tensor(weights)
        if mixing.method is MergeMethod.TIES:
            mixed: torch.Tensor = merge_utils.ties(list(updates), factors, density)
        elif mixing.method is MergeMethod.DARE_LINEAR:
            mixed = merge_utils.dare_linear(list(updates), factors, density)
        else:
            mixed = merge_utils.dare_ties(list(updates), factors, density)
    return mixed


def subject_seed(seed: int, subject: str) -> int:
    """Return the seed for one matrix: 63 bits that depend on both."""
    digest = hashlib.sha256(f"{seed}\0{subject}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
