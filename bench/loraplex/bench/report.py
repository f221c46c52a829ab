"""Adds a run up, under the names that vLLM's serving benchmark uses, and shows it. Knows nothing about gRPC."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from loraplex.bench.load import LoadResult, RequestResult

LATENCIES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token, the first left out",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
CPU_SHARE_WARNING = 0.8


@dataclass(frozen=True)
class Latency:
    """One kind of latency over a run, in milliseconds; zeros if nothing was measured."""

    mean: float
    median: float
    std: float
    p99: float


@dataclass(frozen=True)
class Report:
    """One run added up. Counts and rates are over the requests that completed; `duration` is in seconds.

    Attributes:
        failed_by: failed requests by gRPC status.
        client_cpu_share: of one core, spent by the process that made the load; near 1 it measures itself.
        latency: by the keys of LATENCIES.
    """

    duration: float
    completed: int
    failed: int
    failed_by: Mapping[str, int]
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    client_cpu_share: float
    latency: Mapping[str, Latency]

    @classmethod
    def of(cls, result: LoadResult) -> Report:
        """Add one run up."""
        done = [request for request in result.requests if not request.error]
        failed_by = Counter(request.error for request in result.requests if request.error)
        inputs = sum(request.prompt_tokens for request in done)
        outputs = sum(request.output_tokens for request in done)
        return cls(
            duration=result.duration_s,
            completed=len(done),
            failed=failed_by.total(),
            failed_by=dict(failed_by),
            total_input_tokens=inputs,
            total_output_tokens=outputs,
            request_throughput=len(done) / result.duration_s,
            output_throughput=outputs / result.duration_s,
            total_token_throughput=(inputs + outputs) / result.duration_s,
            client_cpu_share=result.cpu_s / result.duration_s,
            latency={name: _latency(values) for name, values in _latencies(done).items()},
        )

    def as_json(self) -> dict[str, Any]:
        """Return the run as plain values, latencies flat as vLLM writes them (`mean_ttft_ms`)."""
        flat = asdict(self)
        del flat["latency"]
        for name, latency in self.latency.items():
            flat |= {f"{statistic}_{name}_ms": value for statistic, value in asdict(latency).items()}
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in flat.items()}


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the `percent`-th percentile, between two values linearly (as NumPy does by default).

    Raises:
        ValueError: if there are no values.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    lower = math.floor(position)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (ordered[upper] - ordered[lower]) * (position - lower)


def best_median_worst(reports: Sequence[Report]) -> tuple[float, float, float]:
    """Return the output tokens per second of several equal runs: best, median, worst."""
    rates = [report.output_throughput for report in reports]
    return max(rates), statistics.median(rates), min(rates)


def cases_as_json(cases: Mapping[str, Sequence[Report]]) -> dict[str, Any]:
    """Return runs by case as plain values, with best, median and worst output tokens per second."""
    document: dict[str, Any] = {}
    for name, reports in cases.items():
        best, median, worst = (round(rate, 2) for rate in best_median_worst(reports))
        runs = [report.as_json() for report in reports]
        document[name] = {"output_throughput": {"best": best, "median": median, "worst": worst}, "runs": runs}
    return document


def cases_table(cases: Mapping[str, Sequence[Report]]) -> Table:
    """Show output tokens per second by case, and each case's share of the first one's median."""
    table = Table(title="Output tokens per second")
    table.add_column("case")
    for column in ("runs", "best", "median", "worst", "of the first", "failed", "ttft p50 ms", "itl p50 ms"):
        table.add_column(column, justify="right")
    reference = 0.0
    for name, reports in cases.items():
        best, median, worst = best_median_worst(reports)
        reference = reference or median
        table.add_row(
            name,
            str(len(reports)),
            *(f"{rate:.1f}" for rate in (best, median, worst)),
            f"{median / reference:.0%}" if reference else "-",
            str(sum(report.failed for report in reports)),
            *(f"{statistics.median(r.latency[key].median for r in reports):.1f}" for key in ("ttft", "itl")),
        )
    return table


def latency_table(report: Report) -> Table:
    """Show the latencies of one run."""
    table = Table(title="Latency in milliseconds")
    table.add_column("")
    for column in ("mean", "median", "std", "p99"):
        table.add_column(column, justify="right")
    for name, text in LATENCIES.items():
        table.add_row(f"{text} ({name})", *(f"{value:.1f}" for value in asdict(report.latency[name]).values()))
    return table


def warnings(reports: Sequence[Report]) -> list[str]:
    """Return what makes the numbers worth less than they seem."""
    found = []
    if failed := sum(report.failed for report in reports):
        statuses = sorted({status for report in reports for status in report.failed_by})
        found.append(f"{failed} requests failed ({', '.join(statuses)}): throughput counts the others only")
    share = max((report.client_cpu_share for report in reports), default=0.0)
    if share > CPU_SHARE_WARNING:
        found.append(f"this client used {share:.0%} of a core: it may have been the bottleneck")
    return found


def _latencies(done: Sequence[RequestResult]) -> dict[str, list[float]]:
    """Return the seconds of each kind; tpot is per request and needs two tokens."""
    values: dict[str, list[float]] = {name: [] for name in LATENCIES}
    for request in done:
        values["e2el"].append(request.e2el_s)
        values["itl"] += request.itl_s
        if request.ttft_s is not None:
            values["ttft"].append(request.ttft_s)
            if request.output_tokens > 1:
                values["tpot"].append((request.e2el_s - request.ttft_s) / (request.output_tokens - 1))
    return values


def _latency(seconds: Sequence[float]) -> Latency:
    if not seconds:
        return Latency(0.0, 0.0, 0.0, 0.0)
    values = [1000 * value for value in seconds]
    return Latency(
        mean=statistics.fmean(values),
        median=statistics.median(values),
        std=statistics.pstdev(values),
        p99=percentile(values, 99),
    )
