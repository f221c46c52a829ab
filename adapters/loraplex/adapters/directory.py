"""What every name means at one moment: adapters, versions, aliases, pins, and the errors of those who ask for others.

Immutable values only: a change makes a new `Directory`. Knows nothing about where they are kept.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice

from loraplex.adapters.alias import Alias
from loraplex.adapters.digest import PREFIX
from loraplex.adapters.errors import InvalidRequestError, NotFoundError
from loraplex.adapters.metadata import Metadata
from loraplex.adapters.names import Selector, parse_selector
from loraplex.adapters.traits import AdapterTraits

MIN_DIGEST_PREFIX = len(PREFIX) + 8


@dataclass(frozen=True)
class Version:
    """One content that a name has had.

    Attributes:
        base_fingerprint: the base that it was last found to fit.
        source: where it was registered from.
        number: counts the contents of the name from 1; 0 until the catalog has given it one.
    """

    digest: str
    rank: int
    target_modules: tuple[str, ...]
    size_bytes: int
    base_fingerprint: str
    created_at: datetime
    traits: AdapterTraits = field(default_factory=AdapterTraits)
    source: str = ""
    number: int = 0


@dataclass(frozen=True)
class NamedAdapter:
    """A registered name: its versions from the first to the current one, at least one."""

    name: str
    metadata: Metadata
    versions: tuple[Version, ...]

    @property
    def current(self) -> Version:
        """The version that the bare name means."""
        return self.versions[-1]

    def select(self, wanted: Selector) -> Version | None:
        """Return the version that `wanted` asks for; of several with one digest the latest.

        The first 8 hexadecimal digits of a digest, or more, will do if only one content of the name begins so.
        """
        if wanted.is_bare:
            return self.current
        if wanted.number is not None:
            return next((version for version in self.versions if version.number == wanted.number), None)
        prefix = wanted.digest or ""
        if len(prefix) < MIN_DIGEST_PREFIX:
            return None
        found = [version for version in reversed(self.versions) if version.digest.startswith(prefix)]
        return found[0] if len({version.digest for version in found}) == 1 else None

    def without(self, wanted: Selector) -> NamedAdapter | None:
        """Return the adapter less what `wanted` asks for: all of it, one number, or every version of a digest; or None.

        It may be left without versions, and then is none any more.
        """
        found = self.select(wanted)
        if found is None:
            return None
        if wanted.is_bare:
            return replace(self, versions=())
        by_number = wanted.number is not None
        kept = (v for v in self.versions if (v.number != found.number if by_number else v.digest != found.digest))
        return replace(self, versions=tuple(kept))


Pin = tuple[str, int]
"""A name, and the number of its version that stays on the device; 0 is whichever is current."""


@dataclass(frozen=True)
class Directory:
    """All names, aliases and pins. `digests`, `pinned_digests` and `aliases_of` are derived from them."""

    names: Mapping[str, NamedAdapter] = field(default_factory=dict)
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    pins: frozenset[Pin] = frozenset()
    digests: frozenset[str] = field(init=False)
    pinned_digests: frozenset[str] = field(init=False)
    aliases_of: Mapping[str, tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        """Derive what is looked up for every request."""
        digests = frozenset(version.digest for adapter in self.names.values() for version in adapter.versions)
        object.__setattr__(self, "digests", digests)
        pinned = (self.names[name].select(Selector(name, number or None)) for name, number in self.pins)
        object.__setattr__(self, "pinned_digests", frozenset(version.digest for version in pinned if version))
        aliases_of: dict[str, tuple[str, ...]] = {}
        for alias in sorted(self.aliases):
            for name in self.aliases[alias].names:
                aliases_of[name] = (*aliases_of.get(name, ()), alias)
        object.__setattr__(self, "aliases_of", aliases_of)

    def find(self, selector: str, routing_key: str | None = None) -> tuple[NamedAdapter, Version] | None:
        """Return what `name`, an alias, or either with a version means, or None.

        `routing_key` chooses between the targets of an alias, see `Alias.choose`. An alias takes a version only if all
        its targets are of one name.
        """
        wanted = parse_selector(selector)
        alias = self.aliases.get(wanted.name)
        if alias is not None and wanted.is_bare:
            wanted = parse_selector(alias.choose(routing_key))
        elif alias is not None and len(alias.names) == 1:
            wanted = replace(wanted, name=alias.names[0])
        adapter = self.names.get(wanted.name)
        version = adapter.select(wanted) if adapter else None
        return (adapter, version) if adapter and version else None

    def require(self, selector: str) -> tuple[NamedAdapter, Version]:
        """Like `find`.

        Raises:
            NotFoundError: there is no such thing; says what there is instead.
        """
        found = self.find(selector)
        if found is None:
            raise self.not_found(selector)
        return found

    def adapter(self, name: str) -> NamedAdapter:
        """Return the adapter registered as `name`.

        Raises:
            InvalidRequestError: `name` is an alias.
            NotFoundError: nothing is registered under it.
        """
        if name in self.aliases:
            raise InvalidRequestError.of("name", f"{self.describe_alias(name)}; use the adapter's name")
        if name not in self.names:
            raise self.not_found(name)
        return self.names[name]

    def describe_alias(self, alias: str) -> str:
        """Return a sentence that says what `alias` is."""
        return f"{alias} is an alias of {' and '.join(target.name for target in self.aliases[alias].targets)}"

    def with_adapter(self, adapter: NamedAdapter) -> Directory:
        """Return the directory with `adapter` under its name; without versions its name, and its pins, are gone."""
        names = {**self.names, adapter.name: adapter}
        if not adapter.versions:
            del names[adapter.name]
        numbers = {0, *(version.number for version in adapter.versions)} if adapter.versions else set[int]()
        pins = frozenset(pin for pin in self.pins if pin[0] != adapter.name or pin[1] in numbers)
        return Directory(names, self.aliases, pins)

    def with_alias(self, alias: Alias) -> Directory:
        """Return the directory with `alias` in place of the one of that name, if there is one."""
        return replace(self, aliases={**self.aliases, alias.alias: alias})

    def without_alias(self, alias: str) -> Directory:
        """Return the directory without `alias`."""
        return replace(self, aliases={name: kept for name, kept in self.aliases.items() if name != alias})

    def dangling(self) -> tuple[str, ...]:
        """Return the aliases of which a target means nothing."""
        return tuple(
            name
            for name, alias in sorted(self.aliases.items())
            if not all(self.find(target.name) for target in alias.targets)
        )

    def not_found(self, selector: str) -> NotFoundError:
        """Return the error for a `selector` that finds nothing; it says what there is instead."""
        wanted = parse_selector(selector)
        alias = self.aliases.get(wanted.name)
        if alias is not None and len(alias.names) > 1:
            return NotFoundError(f"{self.describe_alias(wanted.name)}; ask one of them for the version")
        adapter = self.names.get(alias.names[0] if alias else wanted.name)
        if adapter is not None:
            latest = ", ".join(f"{version.number} ({version.digest})" for version in adapter.versions[-3:])
            version = wanted.number or repr(wanted.digest)
            return NotFoundError(f"{wanted.name} has no version {version!s:.100}; its latest are {latest}")
        # The comparison is slow: with thousands of names, look at some.
        some = list(islice((*self.names, *self.aliases), 500))
        close = difflib.get_close_matches(wanted.name, some, n=3)
        hint = (
            f"did you mean {' or '.join(close)}?" if close else f"registered: {', '.join(sorted(some)[:5]) or 'none'}"
        )
        return NotFoundError(f"there is no adapter named {wanted.name!r:.140} ({hint})")
