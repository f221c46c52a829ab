"""Adds up what `loraplex bench cpu` measured: the document that it writes and the table that it prints."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from loraplex.bench import w16
from loraplex.bench.cpu_cases import ROW_CASES
from loraplex.bench.cpu_run import Measurement, Measurements

RATES = {
    "base_tok_s": "base",
    "same_tok_s": "same",
    "mixed_tok_s": "mixed",
    "mixed_r8_tok_s": "mixed_r8",
    "one_stream_tok_s": "one_stream",
    "rows64_r8_tok_s": "rows64_r8",
}
"""Keys of the document that are output tokens per second, and their cases."""
TEXTS = {
    "base_tok_s": "16 requests, no adapter, tok/s",
    "same_tok_s": "16 requests, one adapter of rank 64, tok/s",
    "mixed_tok_s": "16 requests, 16 adapters of ranks 8 to 64, tok/s",
    "mixed_r8_tok_s": "16 requests, 16 adapters of rank 8, tok/s",
    "one_stream_tok_s": "one request, one adapter of rank 64, tok/s",
    "rows64_r8_tok_s": "64 requests, 64 adapters of rank 8, tok/s",
    "ttft_512_ms": "first token of a 512-token prompt, idle server, ms",
    "ready_s": "start of the process to serving, s",
    "rss_mb": "resident memory after all of it, MB",
}
LORA_CASES = ("same", "mixed", "mixed_r8")
STEP_SOURCE = "the server's loraplex_step_duration_seconds between 25 % and 90 % of a run's tokens: decode steps only"


def cpu_document(
    measurements: Measurements, ready_s: Mapping[str, Sequence[float]], rss_mb: Mapping[str, float]
) -> dict[str, Any]:
    """Return the figures as plain values: for each key the median by server, `spread` with the best and the worst."""
    values: dict[str, dict[str, Sequence[float]]] = {}
    for key, case in RATES.items():
        values[key] = _by_server(measurements, case, lambda run: run.report.output_throughput)
    values["ttft_512_ms"] = _by_server(measurements, "ttft_512", lambda run: run.report.latency["ttft"].median)
    values["ready_s"] = dict(ready_s)
    document: dict[str, Any] = {key: _medians(found) for key, found in values.items()}
    document["rss_mb"] = {name: round(value, 1) for name, value in rss_mb.items()}
    document["spread"] = {
        key: {name: {"lowest": round(min(runs), 2), "highest": round(max(runs), 2)} for name, runs in found.items()}
        for key, found in values.items()
    }
    document["lora_adds_ms"] = {name: _lora_adds(cases) for name, cases in measurements.items()}
    document["lora_adds_source"] = STEP_SOURCE
    document["of_base"] = {
        key: {name: round(document[key][name] / max(document["base_tok_s"][name], 1e-9), 3) for name in measurements}
        for key in ("same_tok_s", "mixed_tok_s", "mixed_r8_tok_s")
    }
    document["rows_tok_s"] = _sweep(measurements, {str(rows): case for rows, case in ROW_CASES.items()})
    document["ranks_tok_s"] = _sweep(measurements, {str(rank): f"rank{rank}" for rank in w16.RANKS})
    document["prompt_tokens"] = {
        name: cases["ttft_512"][0].report.total_input_tokens for name, cases in measurements.items()
    }
    document["failed_requests"] = sum(
        run.report.failed for cases in measurements.values() for runs in cases.values() for run in runs
    )
    return document


def cpu_table(document: Mapping[str, Any]) -> Table:
    """Show a document of `cpu_document`: medians, with lowest to highest beside them."""
    names = list(document["base_tok_s"])
    table = Table(title="On this CPU, through gRPC from another process: median (lowest to highest)")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for key, text in TEXTS.items():
        spread = document["spread"].get(key, {})
        table.add_row(text, *(_cell(document[key][name], spread.get(name)) for name in names))
    for case in LORA_CASES:
        adds = [document["lora_adds_ms"][name][case] for name in names]
        table.add_row(f"what LoRA adds to a decode step, {case}, ms", *(f"{ms:.2f}" if ms else "-" for ms in adds))
    for key, label in (("rows_tok_s", "rows without adapter"), ("ranks_tok_s", "16 rows over 4 adapters of rank")):
        for x in document[key][names[0]]:
            table.add_row(f"{label}: {x}, tok/s", *(f"{document[key][name][x]:.1f}" for name in names))
    return table


def _cell(value: float, spread: Mapping[str, float] | None) -> str:
    return f"{value:.1f}" + (f" ({spread['lowest']:.1f} to {spread['highest']:.1f})" if spread else "")


def _by_server(
    measurements: Measurements, case: str, figure: Callable[[Measurement], float]
) -> dict[str, Sequence[float]]:
    return {name: [figure(run) for run in cases[case]] for name, cases in measurements.items()}


def _medians(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: round(statistics.median(runs), 2) for name, runs in found.items()}


def _sweep(measurements: Measurements, cases: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Return median tokens per second by server and point."""
    return {
        name: {
            x: round(statistics.median(run.report.output_throughput for run in found[case]), 2)
            for x, case in cases.items()
        }
        for name, found in measurements.items()
    }


def _lora_adds(cases: Mapping[str, Sequence[Measurement]]) -> dict[str, float | None]:
    """Return by case how many milliseconds a decode step is longer than the base's of the same repetition, median."""
    adds: dict[str, float | None] = {}
    for case in LORA_CASES:
        pairs = zip(cases["base"], cases[case], strict=True)
        more = [run.step_ms - base.step_ms for base, run in pairs if run.step_ms and base.step_ms]
        adds[case] = round(statistics.median(more), 3) if more else None
    return adds
