"""What every name means at one moment: adapters, their versions, aliases, and the errors of those who ask for others.

Immutable values only: a change makes a new `Directory`. Knows nothing about where they are kept.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice

from loraplex.adapters.errors import InvalidRequestError, NotFoundError
from loraplex.adapters.names import split_selector


@dataclass(frozen=True)
class Version:
    """One content that a name has had. `base_fingerprint` is the base that it was last found to fit."""

    digest: str
    rank: int
    target_modules: tuple[str, ...]
    size_bytes: int
    base_fingerprint: str
    created_at: datetime


@dataclass(frozen=True)
class NamedAdapter:
    """A registered name: its versions from the first to the current one."""

    name: str
    description: str
    versions: tuple[Version, ...]

    @property
    def current(self) -> Version:
        """The version that the bare name means."""
        return self.versions[-1]


@dataclass(frozen=True)
class Directory:
    """All names and aliases; an alias maps to a name. `digests` and `aliases_of` are derived from them."""

    names: Mapping[str, NamedAdapter] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    digests: frozenset[str] = field(init=False)
    aliases_of: Mapping[str, tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        """Derive what is looked up for every request."""
        digests = frozenset(version.digest for adapter in self.names.values() for version in adapter.versions)
        object.__setattr__(self, "digests", digests)
        aliases_of: dict[str, tuple[str, ...]] = {}
        for alias, name in sorted(self.aliases.items()):
            aliases_of[name] = (*aliases_of.get(name, ()), alias)
        object.__setattr__(self, "aliases_of", aliases_of)

    def find(self, selector: str) -> tuple[NamedAdapter, Version] | None:
        """Return what `name`, an alias, or either with `@sha256:...` means, or None."""
        name, digest = split_selector(selector)
        adapter = self.names.get(self.aliases.get(name, name))
        if adapter is None:
            return None
        if digest is None:
            return adapter, adapter.current
        return next(((adapter, version) for version in adapter.versions if version.digest == digest), None)

    def adapter(self, name: str) -> NamedAdapter:
        """Return the adapter registered as `name`.

        Raises:
            InvalidRequestError: `name` is an alias.
            NotFoundError: nothing is registered under it.
        """
        if name in self.aliases:
            raise InvalidRequestError.of("name", f"{name} is an alias of {self.aliases[name]}; use the adapter's name")
        if name not in self.names:
            raise self.not_found(name)
        return self.names[name]

    def not_found(self, selector: str) -> NotFoundError:
        """Return the error for a `selector` that finds nothing; it says what there is instead."""
        name, digest = split_selector(selector)
        adapter = self.names.get(self.aliases.get(name, name))
        if adapter is not None:
            latest = ", ".join(version.digest for version in adapter.versions[-3:])
            return NotFoundError(f"{name} has no version {digest!r:.100}; its latest are {latest}")
        # The comparison is slow: with thousands of names, look at some.
        some = list(islice((*self.names, *self.aliases), 500))
        close = difflib.get_close_matches(name, some, n=3)
        hint = (
            f"did you mean {' or '.join(close)}?" if close else f"registered: {', '.join(sorted(some)[:5]) or 'none'}"
        )
        return NotFoundError(f"there is no adapter named {name!r:.140} ({hint})")
