"""One adapter, or the weighted sum of several, as one of smaller rank, by the singular value decomposition per module.

The best approximation of B A of a given rank keeps its largest singular values (Eckart and Young, 1936). They come from
the factors: with B = Q R and A^T = P S, the singular values of B A are those of the small R S^T. The full matrix is
never made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from loraplex.adapters.errors import FieldViolation, InvalidRequestError, PreconditionError


@dataclass(frozen=True)
class Factors:
    """A product of two thin matrices, factor * b a; `a` (r, in), `b` (out, r), of any float dtype."""

    a: torch.Tensor
    b: torch.Tensor
    factor: float


@dataclass(frozen=True)
class Budget:
    """How much is kept: `rank` singular values of each module at most, or a share of each one's `energy`, or both.

    The energy is the sum of the squared singular values, that is, the squared Frobenius norm.
    """

    rank: int | None = None
    energy: float | None = None

    def check(self) -> None:
        """Check the values.

        Raises:
            InvalidRequestError: neither is given, or one is out of range.
        """
        violations = []
        if self.rank is None and self.energy is None:
            violations.append(FieldViolation("rank", "or energy: give at least one of them"))
        if self.rank is not None and self.rank < 1:
            violations.append(FieldViolation("rank", f"must be at least 1, got {self.rank}"))
        if self.energy is not None and not 0 < self.energy <= 1:
            violations.append(FieldViolation("energy", f"must be above 0 and at most 1, got {self.energy}"))
        if violations:
            raise InvalidRequestError(violations)

    def rank_of(self, singular: torch.Tensor) -> int:
        """Return how many of the `singular` values, largest first, are kept; at least one."""
        kept = len(singular)
        if self.energy is not None:
            squares = singular.double().square()
            total = float(squares.sum())
            # A share of 1 means what is not rounding error.
            enough = torch.cumsum(squares, 0) >= min(self.energy, 1 - 1e-12) * total
            kept = int(enough.long().argmax()) + 1 if total > 0 else 1
        return max(1, min(kept, len(singular) if self.rank is None else self.rank))


@dataclass(frozen=True)
class Compressed:
    """A module's new factors, whose product stands by itself (scaling 1), and what they cost.

    Attributes:
        a: (rank, in) and `b` (out, rank), in the dtype that was asked for.
        source_rank: the ranks of all sources together.
        norm: Frobenius norm of the exact product.
        error: Frobenius norm of the difference, rounding to the dtype included.
    """

    a: torch.Tensor
    b: torch.Tensor
    source_rank: int
    norm: float
    error: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    @property
    def relative_error(self) -> float:
        """The error in units of the norm; 0 for a product that is 0."""
        return self.error / self.norm if self.norm else 0.0

    @property
    def is_finite(self) -> bool:
        """Whether neither a value of A or B nor the error is infinite or NaN."""
        return bool(self.a.isfinite().all() and self.b.isfinite().all()) and math.isfinite(self.error)


def compress(sources: Mapping[str, Sequence[Factors]], budget: Budget, dtype: torch.dtype) -> dict[str, Compressed]:
    """Compress the sum of each module's `sources`.

    Raises:
        InvalidRequestError: the budget makes no sense.
        PreconditionError: a module's sum is too large, by itself or for `dtype`.
    """
    budget.check()
    found = {}
    for name, factors in sources.items():
        try:
            found[name] = compress_module(factors, budget, dtype)
        except OverflowError as error:
            raise PreconditionError(f"{name} is too large: choose smaller weights") from error
        if not found[name].is_finite:
            raise PreconditionError(f"the compressed {name} is too large for {dtype}: choose a dtype of larger range")
    return found


def compress_module(factors: Sequence[Factors], budget: Budget, dtype: torch.dtype) -> Compressed:
    """Compress the sum of `factors`, which have the same inputs and outputs; computed in float64.

    Raises:
        OverflowError: the sum itself is beyond float64.
    """
    a, b = _stacked(factors)
    left, small_left = torch.linalg.qr(b)
    right, small_right = torch.linalg.qr(a.t())
    u, singular, v = torch.linalg.svd(_finite(small_left @ small_right.t()), full_matrices=False)
    rank = budget.rank_of(singular)
    # Split evenly, so that neither factor needs a larger range than the other.
    root = singular[:rank].sqrt()
    new_a = (root.unsqueeze(1) * (v[:rank] @ right.t())).to(dtype)
    new_b = (left @ u[:, :rank] * root).to(dtype)
    difference = _norm(torch.cat([b, -new_b.double()], dim=1), torch.cat([a, new_a.double()]))
    return Compressed(
        new_a.contiguous(), new_b.contiguous(), a.shape[0], float(torch.linalg.norm(singular)), difference
    )


def singular_values(factors: Sequence[Factors]) -> torch.Tensor:
    """Return the singular values of the sum of `factors`, largest first, float64: as many as all ranks together.

    Raises:
        OverflowError: the sum itself is beyond float64.
    """
    a, b = _stacked(factors)
    found = torch.linalg.svdvals(_finite(torch.linalg.qr(b).R @ torch.linalg.qr(a.t()).R.t()))
    # A rank beyond the module's own width has values that are 0.
    return torch.nn.functional.pad(found, (0, a.shape[0] - len(found)))


def total_error(modules: Sequence[Compressed]) -> float:
    """Return the error over all modules, relative to the norm of all."""
    norm = math.hypot(*(each.norm for each in modules))
    return math.hypot(*(each.error for each in modules)) / norm if norm else 0.0


def _stacked(factors: Sequence[Factors]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of the sum, in float64."""
    a = torch.cat([each.a.double() for each in factors])
    return a, torch.cat([each.b.double() * each.factor for each in factors], dim=1)


def _finite(small: torch.Tensor) -> torch.Tensor:
    if not small.isfinite().all():
        raise OverflowError("the sum is not finite")
    return small


def _norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """Return the Frobenius norm of b a, by way of the small factors."""
    return float(torch.linalg.norm(torch.linalg.qr(b).R @ torch.linalg.qr(a.t()).R.t()))
