"""What the registry answers with: immutable descriptions of registered adapters."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class AdapterRecord:
    """One version of a registered name, as it was at the time of the call.

    `target_modules` are names without layer numbers; `size_bytes` is the size of the stored weights; `created_at` is
    when this version was registered (UTC). `problem` is empty, or says why the adapter cannot serve requests although
    it is registered: its base or its stored weights have changed since.
    """

    name: str
    digest: str
    description: str
    rank: int
    target_modules: tuple[str, ...]
    size_bytes: int
    created_at: datetime
    active_requests: int = 0
    aliases: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Registration:
    """A successful registration; `previous_digest` is what the name meant before, if it was registered."""

    record: AdapterRecord
    previous_digest: str | None = None


@dataclass(frozen=True)
class Unregistration:
    """A name taken away: what it meant, and how many requests still run on any of its versions."""

    digest: str
    active_requests: int


@dataclass(frozen=True)
class AdapterPage:
    """Part of a listing, sorted by name; `next_page_token` is empty on the last page."""

    records: tuple[AdapterRecord, ...]
    next_page_token: str = ""
