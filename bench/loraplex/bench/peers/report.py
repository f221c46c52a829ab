"""Adds the contest up: an entry for each system, right or wrong, there or not, and the table that people read."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from loraplex.bench.peers.contest import Outcome, Trial
from loraplex.bench.peers.trials import BASE, FIRST_TOKEN, MIXED, ONE_STREAM
from loraplex.bench.peers.verdict import Verdict, verdicts_as_json

RATES = {"base_tok_s": BASE, "mixed_tok_s": MIXED, "one_stream_tok_s": ONE_STREAM}


def entry(
    system: str, ours: bool, outcome: Outcome, trials: Mapping[str, Trial], verdicts: Mapping[str, Verdict]
) -> dict[str, Any]:
    """Return a system's figures: medians, None for what was not measured; `correct` is None if nothing was judged."""
    rates = {key: _rates(outcome, case, trials) for key, case in RATES.items()}
    seconds = outcome.seconds.get(FIRST_TOKEN, [])
    return {
        "system": system,
        "ours": ours,
        "version": outcome.facts.get("version", ""),
        "dtype": outcome.facts.get("dtype", ""),
        "way": outcome.facts.get("way", ""),
        **{key: round(statistics.median(values), 2) if values else None for key, values in rates.items()},
        "ttft_512_ms": round(1000 * statistics.median(seconds), 1) if seconds else None,
        "ready_s": round(outcome.ready_s, 2) if outcome.ready_s is not None else None,
        "correct": all(verdict.correct for verdict in verdicts.values()) if verdicts else None,
        "judged": verdicts_as_json(verdicts),
        "spread": {
            key: {"lowest": round(min(values), 2), "highest": round(max(values), 2)}
            for key, values in rates.items()
            if values
        },
        "reason": outcome.reason,
    }


def missing(system: str, reason: str) -> dict[str, Any]:
    """Return the entry of a system that did not run."""
    return entry(system, False, Outcome(reason=reason), {}, {})


def peers_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Show the entries; a wrong answer is shown as wrong."""
    table = Table(title="The same requests on every system: output tokens per second, medians")
    table.add_column("system")
    for column in ("base", "mixed", "one stream", "first token of 512, ms", "ready, s", "answers"):
        table.add_column(column, justify="right")
    for each in entries:
        figures = (each[key] for key in ("base_tok_s", "mixed_tok_s", "one_stream_tok_s", "ttft_512_ms", "ready_s"))
        table.add_row(
            each["system"], *(f"{value:.1f}" if value is not None else "-" for value in figures), _answers(each)
        )
    return table


def reasons(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each system of which something is missing."""
    return [f"{each['system']}: {each['reason'].splitlines()[0]}" for each in entries if each["reason"]]


def _answers(entry: Mapping[str, Any]) -> str:
    if entry["correct"] is None:
        return "not judged"
    if entry["correct"]:
        return "right"
    wrong = [case for case, judged in entry["judged"].items() if not judged["correct"]]
    return f"WRONG ({', '.join(wrong)})"


def _rates(outcome: Outcome, case: str, trials: Mapping[str, Trial]) -> list[float]:
    """Return output tokens per second of each round."""
    seconds = outcome.seconds.get(case, [])
    return [len(trials[case].rounds[0]) * trials[case].max_tokens / each for each in seconds]
