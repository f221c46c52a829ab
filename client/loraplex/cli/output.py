"""What commands write: results to stdout, everything else to stderr."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


def to_stderr() -> Console:
    """Return a console for what is not a result. Made anew, so that it writes to the stderr of the moment."""
    return Console(stderr=True, highlight=False)


def to_stdout() -> Console:
    """Return a console for results that people read."""
    return Console(highlight=False)


def print_json(value: Any) -> None:
    """Write a result (a dataclass, or a list or dictionary of them) as JSON."""

    def plain(item: Any) -> Any:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return dataclasses.asdict(item)
        if isinstance(item, datetime):
            return item.isoformat()
        if isinstance(item, Path):
            return str(item)
        raise TypeError(f"{type(item).__name__} has no JSON form here")

    typer.echo(json.dumps(value, default=plain, indent=2, ensure_ascii=False))


@contextmanager
def progress_bar(description: str, *, of_bytes: bool = False) -> Iterator[tuple[Progress, TaskID]]:
    """Show a bar on stderr while the block runs, if stderr is a terminal; yields the bar and its task."""
    console = to_stderr()
    counter = DownloadColumn(binary_units=True) if of_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), counter, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar, bar.add_task(description, total=None)
