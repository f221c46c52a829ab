"""How the analyses are written: a table here, and JSON, PNG and one HTML file in a folder."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from loraplex.adapters.training.figure import png_bytes
from loraplex.adapters.training.html_report import Picture, Report, ReportTable, shown, write_html
from loraplex.cli.output import to_stdout


def command_line() -> str:
    """Return the command as it was given, without where the program lies."""
    return shlex.join(["loraplex", *sys.argv[1:]])


def print_table(table: ReportTable) -> None:
    """Print a table of a report."""
    printed = Table(title=escape(table.title))
    for index, column in enumerate(table.columns):
        text = any(isinstance(row[index], str) for row in table.rows)
        printed.add_column(column, justify="left" if text else "right", overflow="fold")
    for row in table.rows:
        printed.add_row(*(escape(shown(value)) for value in row))
    to_stdout().print(printed)


def write_analysis(
    folder: Path,
    name: str,
    title: str,
    sentences: Sequence[str],
    figure: Any,
    tables: Sequence[ReportTable],
    document: Mapping[str, Any],
) -> None:
    """Write `<name>.json`, `.png` and `.html` to `folder`, and say so."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = png_bytes(figure)
    (folder / f"{name}.png").write_bytes(picture)
    text = json.dumps({**document, "command": command_line()}, indent=2, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    write_html(Report(title, sentences, [Picture(picture, title)], tables, command_line()), folder / f"{name}.html")
    typer.echo(f"written: {folder / name}.json, .png and .html", err=True)
