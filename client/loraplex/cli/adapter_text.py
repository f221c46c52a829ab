"""How adapters and aliases are shown to people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from typing import TYPE_CHECKING

from loraplex.cli.sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from loraplex.client import Adapter, AdapterVersion, AliasTarget, SamplingOptions


def adapter_table(adapters: Sequence[Adapter]) -> Table:
    """Return a row for each adapter."""
    from rich.markup import escape

    table = _table(("name", "aliases", "tags", "description"), ("version", "rank", "size", "state", "active", "used"))
    for adapter in adapters:
        table.add_row(
            escape(adapter.name),
            escape(", ".join(adapter.aliases)),
            escape(", ".join(adapter.tags)),
            escape(adapter.description),
            f"{adapter.version} {_short(adapter.digest)}",
            str(adapter.rank),
            format_size(adapter.size_bytes),
            state(adapter),
            str(adapter.active_requests),
            str(adapter.request_count),
        )
    return table


def version_table(versions: Sequence[AdapterVersion]) -> Table:
    """Return a row for each version of a name."""
    from rich.markup import escape

    table = _table(("source",), ("version", "digest", "registered", "size"))
    for version in versions:
        table.add_row(
            escape(version.source),
            str(version.number),
            _short(version.digest),
            _moment(version.created_at),
            format_size(version.size_bytes),
        )
    return table


def adapter_lines(adapter: Adapter) -> list[str]:
    """Return what is known of one adapter, a line for each thing."""
    used = (
        f"{adapter.request_count} requests, {adapter.prompt_tokens} prompt and {adapter.generation_tokens} new tokens"
    )
    last = f", last {_moment(adapter.last_used_at)}" if adapter.last_used_at else ""
    memory = f"{format_size(adapter.device_bytes)} on the device, {format_size(adapter.host_bytes)} on the host"
    entries = {
        "name": adapter.name,
        "version": str(adapter.version),
        "digest": adapter.digest,
        "problem": adapter.problem,
        "description": adapter.description,
        "tags": ", ".join(adapter.tags),
        "owner": adapter.owner,
        "kind": adapter.kind,
        "rank": str(adapter.rank),
        "target modules": ", ".join(adapter.target_modules),
        "chat template": "its own" if adapter.has_chat_template else "the base's",
        "sampling": sampling_text(adapter.default_sampling),
        "source": adapter.source,
        "size": format_size(adapter.size_bytes),
        "registered": _moment(adapter.created_at),
        "state": state(adapter),
        "memory": memory,
        "active requests": str(adapter.active_requests),
        "used": used + last,
        "aliases": ", ".join(adapter.aliases),
    }
    return [f"{label:<16} {text}" for label, text in entries.items() if text]


def state(adapter: Adapter) -> str:
    """Return where the weights are; a pinned adapter may still be on its way to the device."""
    if adapter.problem:
        return "unusable"
    if adapter.pinned:
        return "pinned" if adapter.resident else "pinned, loading"
    if adapter.resident:
        return "resident"
    return "host" if adapter.host_bytes else "stored"


def sampling_text(sampling: SamplingOptions) -> str:
    """Return the fields that are set."""
    values = {option.name: getattr(sampling, option.name) for option in fields(sampling)}
    # Numbers travel as float32, in which 0.7 is 0.699999988.
    texts = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return ", ".join(f"{name}={text}" for name, text in texts.items() if values[name] not in (None, ()))


def targets_text(targets: Sequence[AliasTarget]) -> str:
    """Return targets with their shares, which a single one does not need."""
    if len(targets) == 1:
        return targets[0].name
    total = sum(target.weight for target in targets)
    return ", ".join(f"{target.name} ({target.weight / total:.1%})" for target in targets)


def _table(folded: Sequence[str], whole: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    # Folded, not cut off: names are typed in again.
    for column in folded:
        table.add_column(column, overflow="fold", min_width=6)
    for column in whole:
        table.add_column(column, no_wrap=True)
    return table


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:8]


def _moment(time: datetime) -> str:
    return time.isoformat(sep=" ", timespec="seconds")
