"""What the demo saw: facts, checks and seconds, shown as it goes and written as JSON at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraplex.bench.machine import machine_info
from loraplex.cli.demo_cases import Answer


class Record:
    """Collects what one demo saw and tells it on `console`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.facts: dict[str, Any] = {}
        self.checks: dict[str, bool] = {}
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    @property
    def held(self) -> bool:
        """Whether something was checked and everything that was held."""
        return bool(self.checks) and all(self.checks.values())

    @contextmanager
    def phase(self, name: str, text: str, waiting: str = "") -> Iterator[None]:
        """Announce a phase and measure it; `waiting` is shown beside a spinner as long as it takes."""
        self.console.print(Text.assemble((f"\n{len(self.seconds) + 1}. ", "bold cyan"), (text, "bold")))
        started = time.monotonic()
        with self.console.status(waiting) if waiting else nullcontext():
            yield
        self.seconds[name] = round(time.monotonic() - started, 2)

    def check(self, name: str, held: bool, text: str) -> None:
        """Note under `name` whether what `text` says held, and say so."""
        self.checks[name] = held
        mark = ("   yes  ", "bold green") if held else ("   NO   ", "bold red")
        self.console.print(Text.assemble(mark, text))

    def finish(self, output: Path) -> None:
        """Write everything to `output` and say how it ended."""
        self.seconds["total"] = round(time.monotonic() - self._started, 2)
        document = {
            "held": self.held,
            "checks": self.checks,
            **self.facts,
            "seconds": self.seconds,
            "machine": machine_info(),
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        missed = [name for name, held in self.checks.items() if not held]
        verdict = ("All of it held", "bold green") if self.held else (f"Did not hold: {', '.join(missed)}", "bold red")
        self.console.print(Text.assemble("\n", verdict, f"; {self.seconds['total']:.0f} s in all. Written: {output}"))


def answers_table(answers: Sequence[Answer]) -> Table:
    """Show each adapter's answer beside the base's to the same prompt."""
    table = Table(show_lines=True)
    table.add_column("adapter", style="cyan")
    for column in ("prompt", "with the adapter", "the base alone"):
        table.add_column(column, overflow="fold")
    for answer in answers:
        style = "green" if answer.right else "red"
        table.add_row(
            answer.adapter,
            Text(answer.row.prompt.split("\n", 1)[-1]),
            Text(_short(answer.text), style),
            Text(_short(answer.base_text), "dim"),
        )
    return table


def answers_as_json(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the texts as plain values, with how many are right."""
    rows = [
        {
            "prompt": answer.row.prompt,
            "expected": answer.row.completion,
            "adapter": answer.text,
            "base": answer.base_text,
        }
        for answer in answers
    ]
    right, base_right = (sum(flags) for flags in zip(*((a.right, a.base_right) for a in answers), strict=True))
    return {"asked": len(rows), "right": right, "base_right": base_right, "answers": rows}


def _short(text: str, limit: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
