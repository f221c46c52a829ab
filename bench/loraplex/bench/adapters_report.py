"""Adds up what `loraplex bench adapters` measured: the document that it writes and the table that it prints."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from loraplex.bench.adapters import FEW, AdapterBench, Runs
from loraplex.bench.report import Report, cases_as_json
from loraplex.bench.scrape import Scrape

TARGET_KEPT = 0.90
MAX_WASTE = 0.25
MAX_GROWTH = 0.05


def memory_figures(scrape: Scrape) -> dict[str, Any]:
    """Return what the larger server says of its tiers at the end, over all runs."""
    figures: dict[str, Any] = {}
    for tier in ("device", "host"):
        for key, name in (
            ("bytes_budget", "adapter_memory_capacity_bytes"),
            ("bytes_peak", "adapter_memory_peak_bytes"),
            ("evictions", "adapter_evictions_total"),
        ):
            figures[f"{tier}_{key}"] = int(scrape.value(f"loraplex_{name}", tier=tier))
    for percent in (50, 99):
        seconds = scrape.quantile("loraplex_adapter_load_seconds", percent / 100, tier="host")
        figures[f"load_ms_p{percent}"] = round(1000 * seconds, 2)
    return figures


def warm_figures(runs: Runs) -> dict[str, int]:
    """Return how often the larger server had to bring an adapter in the runs that count."""

    def since(name: str, **labels: str) -> int:
        return int(runs.ended.value(name, **labels) - runs.filled.value(name, **labels))

    return {
        "requests": sum(report.completed for report in runs.many),
        "loads_from_disk": since("loraplex_adapter_loads_total", tier="host"),
        "loads_to_device": since("loraplex_adapter_loads_total", tier="device"),
        "cold_starts": since("loraplex_adapter_cold_starts_total"),
    }


def adapters_document(bench: AdapterBench, runs: Runs, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures as plain values; `more` is what was measured beside the runs."""
    ratios = [many.output_throughput / few.output_throughput for few, many in zip(runs.few, runs.many, strict=True)]
    document: dict[str, Any] = {
        f"throughput_{FEW}": _median(runs.few),
        f"throughput_{bench.adapters}": _median(runs.many),
        "kept": round(statistics.median(ratios), 4),
        "kept_runs": [round(ratio, 4) for ratio in ratios],
        "cold": {
            f"throughput_{FEW}": _median([runs.cold_few]),
            f"throughput_{bench.adapters}": _median([runs.cold_many]),
            "kept": round(runs.cold_many.output_throughput / runs.cold_few.output_throughput, 4),
            "ttft_ms_p50": round(runs.cold_many.latency["ttft"].median, 1),
        },
        "warm": warm_figures(runs),
        **memory_figures(runs.ended),
        **more,
        "failed_requests": sum(report.failed for report in runs.all),
        "cases": cases_as_json({"few": runs.few, "many": runs.many}),
    }
    document["bench"] = {key: value for key, value in asdict(bench).items() if key not in ("model", "serve_args")}
    return document


def held(document: Mapping[str, Any]) -> list[str]:
    """Return what is not as it must be whatever the machine's speed."""
    wrong = []
    if document["failed_requests"]:
        wrong.append(f"{document['failed_requests']} requests failed")
    for tier in ("device", "host"):
        if not 0 < document[f"{tier}_bytes_peak"] <= document[f"{tier}_bytes_budget"]:
            wrong.append(f"the {tier}'s adapter memory left its budget")
    if document["waste_mixed_ranks"] > MAX_WASTE:
        wrong.append(f"a mixed population wastes {document['waste_mixed_ranks']:.0%} of its memory")
    return wrong


def _median(reports: Sequence[Report]) -> float:
    return round(statistics.median(report.output_throughput for report in reports), 2)


def adapters_table(document: Mapping[str, Any]) -> Table:
    """Show a document of `adapters_document`."""
    count = document["bench"]["adapters"]
    table = Table(title=f"{count} adapters beside {FEW}, {document['bench']['rows']} rows, Zipf")
    table.add_column("")
    table.add_column("", justify="right")
    few, many, cold = document[f"throughput_{FEW}"], document[f"throughput_{count}"], document["cold"]
    spread = f"{min(document['kept_runs']):.3f} to {max(document['kept_runs']):.3f}"
    growth = document["rounds_growth"]
    rows = (
        (f"{FEW} adapters, tiers filled, output tok/s", f"{few:.1f}"),
        (f"{count} adapters, tiers filled, output tok/s", f"{many:.1f}"),
        ("kept (median of pairs of runs; lowest to highest)", f"{document['kept']:.3f} ({spread})"),
        (f"{FEW} adapters, nothing loaded", f"{cold[f'throughput_{FEW}']:.1f}"),
        (f"{count} adapters, nothing loaded", f"{cold[f'throughput_{count}']:.1f} ({cold['kept']:.3f})"),
        ("device memory, peak of budget, MB", _of_budget(document, "device")),
        ("host memory, peak of budget, MB", _of_budget(document, "host")),
        ("requests of those runs, loads from the disk, loads onto the device", _loads(document["warm"])),
        ("load from the disk, ms, p50 and p99", f"{document['load_ms_p50']:.1f}, {document['load_ms_p99']:.1f}"),
        ("... of these requests, those that waited for their adapter", str(document["warm"]["cold_starts"])),
        ("memory that ranks 8 to 64 waste", f"{document['waste_mixed_ranks']:.2%}"),
        (f"growth over {document['bench']['rounds']} rounds of register, use, unregister", f"{growth:+.2%}"),
        (f"registering {count} adapters, s", f"{document['register_s']:.1f}"),
    )
    for row in rows:
        table.add_row(*row)
    return table


def _loads(warm: Mapping[str, int]) -> str:
    return f"{warm['requests']}, {warm['loads_from_disk']}, {warm['loads_to_device']}"


def _of_budget(document: Mapping[str, Any], tier: str) -> str:
    return f"{document[f'{tier}_bytes_peak'] / 1e6:.1f} of {document[f'{tier}_bytes_budget'] / 1e6:.1f}"
