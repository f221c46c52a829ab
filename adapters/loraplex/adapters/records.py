"""What the registry answers with: immutable descriptions of registered adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from loraplex.adapters.directory import NamedAdapter, Version
from loraplex.adapters.metadata import Metadata
from loraplex.adapters.traits import AdapterTraits
from loraplex.adapters.usage import NONE, Usage


@dataclass(frozen=True)
class AdapterRecord:
    """One version of a registered name, as it was at the time of the call.

    Attributes:
        adapter: the name with all its versions.
        version: the one that this is about.
        aliases: those that point at any version of the name.
        pinned: whether its weights are to stay on the device.
        problem: empty, or why it cannot serve requests although it is registered: its base or its stored weights have
            changed since.
        usage: of all versions of the name.
    """

    adapter: NamedAdapter
    version: Version
    active_requests: int = 0
    aliases: tuple[str, ...] = ()
    pinned: bool = False
    problem: str = ""
    has_chat_template: bool = False
    usage: Usage = NONE

    @property
    def name(self) -> str:
        """The registered name."""
        return self.adapter.name

    @property
    def metadata(self) -> Metadata:
        """What is told about the name."""
        return self.adapter.metadata

    @property
    def digest(self) -> str:
        """The version's content."""
        return self.version.digest

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return self.version.rank

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Names without layer numbers."""
        return self.version.target_modules

    @property
    def size_bytes(self) -> int:
        """Size of the stored weights."""
        return self.version.size_bytes

    @property
    def created_at(self) -> datetime:
        """When this version was registered (UTC)."""
        return self.version.created_at

    @property
    def traits(self) -> AdapterTraits:
        """How it wants to be used."""
        return self.version.traits


@dataclass(frozen=True)
class Registration:
    """A successful registration; `previous_digest` is what the name meant before, if it was registered."""

    record: AdapterRecord
    previous_digest: str | None = None


@dataclass(frozen=True)
class Unregistration:
    """A name or one of its versions taken away.

    Attributes:
        name: without the version.
        digest: what it meant.
        active_requests: how many requests still ran on any of the versions that went.
        unnamed: sizes in bytes, by digest, of the weights that no name has any more; they go once no request uses them.
    """

    name: str
    digest: str
    active_requests: int
    unnamed: Mapping[str, int]


@dataclass(frozen=True)
class AdapterFilter:
    """Which adapters a listing is about: names with this text in them, all of these tags, this owner (empty: any)."""

    name_contains: str = ""
    tags: tuple[str, ...] = ()
    owner: str = ""

    def __call__(self, adapter: NamedAdapter) -> bool:
        """Whether `adapter` is one of them."""
        metadata = adapter.metadata
        owned = not self.owner or metadata.owner == self.owner
        return owned and self.name_contains in adapter.name and set(self.tags) <= set(metadata.tags)


@dataclass(frozen=True)
class AdapterPage:
    """Part of a listing, sorted by name; `next_page_token` is empty on the last page."""

    records: tuple[AdapterRecord, ...]
    next_page_token: str = ""
