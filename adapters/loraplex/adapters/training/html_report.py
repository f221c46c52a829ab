"""A report as one HTML file that needs nothing else: no script, no style sheet, no picture from anywhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; }
th { text-align: left; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } pre { background: #f4f4f4; padding: .7rem; overflow-x: auto; }
"""


@dataclass(frozen=True)
class ReportTable:
    """Rows of cells under named columns; numbers are set flush right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]


@dataclass(frozen=True)
class Picture:
    """A PNG file and what it shows."""

    png: bytes
    caption: str


@dataclass(frozen=True)
class Report:
    """What is told: sentences, pictures and tables in this order; `command` is what made it."""

    title: str
    sentences: Sequence[str]
    pictures: Sequence[Picture]
    tables: Sequence[ReportTable]
    command: str


def write_html(report: Report, path: Path) -> None:
    """Write the report to `path`."""
    title = html.escape(report.title)
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>",
        *(f"<p>{html.escape(sentence)}</p>" for sentence in report.sentences),
        *map(_picture, report.pictures),
        *map(_table, report.tables),
        f"<h2>Made by</h2><pre>{html.escape(report.command)}</pre></body></html>\n",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")


def shown(value: str | float | int | None) -> str:
    """Return a cell's text: three digits of a fraction, all of a whole number, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    caption = html.escape(picture.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _table(table: ReportTable) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return f"<h2>{html.escape(table.title)}</h2><table><tr>{head}</tr>{rows}</table>"


def _cell(value: str | float | int | None) -> str:
    kind = "" if isinstance(value, str) else ' class="number"'
    return f"<td{kind}>{html.escape(shown(value))}</td>"
