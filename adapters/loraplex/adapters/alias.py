"""Aliases: names for one adapter or for several with weights, and the choice between them.

Immutable values; knows nothing about what the targets mean.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from loraplex.adapters.errors import InvalidRequestError
from loraplex.adapters.names import parse_selector

MAX_TARGETS = 16


@dataclass(frozen=True)
class AliasTarget:
    """A registered name (then its latest version), `name@2` or `name@sha256:...`, and its share of the requests."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Alias:
    """An alias, what it points at and what it pointed at before the last change (empty: it is new)."""

    alias: str
    targets: tuple[AliasTarget, ...]
    previous: tuple[AliasTarget, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the targets without their versions, each once."""
        return tuple(dict.fromkeys(parse_selector(target.name).name for target in self.targets))

    def moved(self, targets: tuple[AliasTarget, ...]) -> Alias:
        """Return the alias with other targets; the same ones again change nothing, so that a repeated call is one."""
        return self if targets == self.targets else Alias(self.alias, targets, self.targets)

    def choose(self, routing_key: str | None = None) -> str:
        """Return the target that answers: one and the same for equal keys, by chance for an empty key.

        None asks for no request's sake: then it is the target with the most weight.

        Weighted rendezvous hashing (Schindelhauer and Schomaker 2005): each target's score is `-weight / ln(u)`, u
        uniform in (0, 1) by a hash of key and target, and the highest wins. A target wins with the probability of its
        share, and when weights change, only keys move that the new shares demand.
        """
        if len(self.targets) == 1:
            return self.targets[0].name
        if routing_key is None:
            return max(self.targets, key=lambda target: target.weight).name
        key = routing_key or str(random.getrandbits(64))
        return max(self.targets, key=lambda target: -target.weight / math.log(self._uniform(key, target.name))).name

    def _uniform(self, key: str, target: str) -> float:
        """Return a number above 0 and below 1; the alias is hashed too, so that two canaries choose independently."""
        # Names contain no zero byte, so that no two triples make one text.
        text = f"{self.alias}\0{target}\0{key}".encode("utf-8", "surrogatepass")
        return (int.from_bytes(blake2b(text, digest_size=6).digest()) + 0.5) / 2**48


def checked_targets(targets: Iterable[AliasTarget]) -> tuple[AliasTarget, ...]:
    """Return `targets` if an alias may have them; the weight of a single one is 1, whatever it says.

    Raises:
        InvalidRequestError: none or too many, one twice, or a weight that is no positive number.
    """
    given = tuple(targets)
    if not 1 <= len(given) <= MAX_TARGETS:
        raise InvalidRequestError.of("targets", f"must be 1 to {MAX_TARGETS}, got {len(given)}")
    if len(given) == 1:
        return (AliasTarget(given[0].name),)
    if len({target.name for target in given}) < len(given):
        raise InvalidRequestError.of("targets", "name one target twice; add its weights up")
    for target in given:
        if not (math.isfinite(target.weight) and target.weight > 0):
            raise InvalidRequestError.of("targets.weight", f"of {target.name} must be above 0, got {target.weight}")
    return given
