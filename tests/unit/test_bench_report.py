from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console

from loraplex.bench.load import LoadResult, RequestResult
from loraplex.bench.report import (
    Report,
    best_median_worst,
    cases_as_json,
    cases_table,
    latency_table,
    percentile,
    warnings,
)
from loraplex.bench.workload import Workload


def request(
    index: int = 0, error: str = "", ttft: float | None = 0.1, itl: tuple = (), **values: object
) -> RequestResult:
    options: dict = {"started_s": 0.0, "e2el_s": 1.0, "prompt_tokens": 30, "output_tokens": 1, "text": ""} | values
    return RequestResult(0, "", error, ttft_s=ttft, itl_s=itl, **options)


def report_of(*requests: RequestResult, duration: float = 2.0, cpu: float = 0.1) -> Report:
    return Report.of(LoadResult(Workload(), duration, cpu, requests))


def test_counts_and_rates_are_over_completed_requests() -> None:
    report = report_of(
        request(output_tokens=10),
        request(output_tokens=20),
        request(error="UNAVAILABLE", output_tokens=7),
        request(error="UNAVAILABLE"),
        request(error="WRONG_ADAPTER"),
    )
    assert (report.completed, report.failed) == (2, 3)
    assert report.failed_by == {"UNAVAILABLE": 2, "WRONG_ADAPTER": 1}
    assert (report.total_input_tokens, report.total_output_tokens) == (60, 30)
    assert report.request_throughput == 1.0
    assert report.output_throughput == 15.0
    assert report.total_token_throughput == 45.0
    assert report.client_cpu_share == pytest.approx(0.05)


def test_latencies_in_milliseconds() -> None:
    report = report_of(
        request(ttft=0.1, itl=(0.05, 0.15), e2el_s=0.3, output_tokens=3),
        request(ttft=0.3, itl=(0.1,), e2el_s=0.4, output_tokens=2),
        request(error="CANCELLED", ttft=9.0, itl=(9.0,)),
    )
    ttft, tpot, itl, e2el = (report.latency[name] for name in ("ttft", "tpot", "itl", "e2el"))
    assert (ttft.mean, ttft.median, ttft.std) == pytest.approx((200, 200, 100))
    assert (tpot.mean, tpot.median) == pytest.approx((100, 100))
    assert (itl.mean, itl.median) == pytest.approx((100, 100))
    assert (e2el.mean, e2el.p99) == pytest.approx((350, 399))


def test_one_token_has_no_time_per_output_token() -> None:
    report = report_of(request(ttft=0.1, e2el_s=0.1, output_tokens=1), request(ttft=None, e2el_s=0.1, output_tokens=0))
    assert report.latency["ttft"].mean == pytest.approx(100)
    assert report.latency["tpot"].mean == 0.0


def test_json_has_the_field_names_of_vllm() -> None:
    document = report_of(request(output_tokens=10)).as_json()
    names = {"duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput"}
    names |= {"output_throughput", "total_token_throughput"}
    for latency in ("ttft", "tpot", "itl", "e2el"):
        names |= {f"{statistic}_{latency}_ms" for statistic in ("mean", "median", "std", "p99")}
    assert names <= set(document)
    assert document["output_throughput"] == 5.0


@pytest.mark.parametrize("percent", [0, 1, 37, 50, 99, 100])
def test_percentile_is_numpys(percent: float) -> None:
    values = [5.0, 1.0, 4.0, 9.0, 2.5, 7.0]
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))
    assert percentile([3.0], percent) == 3.0


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_cases_show_best_median_and_worst() -> None:
    cases = {
        "base": [report_of(request(output_tokens=tokens)) for tokens in (200, 400, 300)],
        "mixed": [report_of(request(output_tokens=tokens)) for tokens in (100, 120)],
    }
    assert best_median_worst(cases["base"]) == (200.0, 150.0, 100.0)
    assert cases_as_json(cases)["mixed"]["output_throughput"] == {"best": 60.0, "median": 55.0, "worst": 50.0}
    assert len(cases_as_json(cases)["base"]["runs"]) == 3
    console = Console(width=160, record=True, file=None, quiet=True)
    with console.capture() as capture:
        console.quiet = False
        console.print(cases_table(cases))
        console.print(latency_table(cases["base"][0]))
    assert "150.0" in capture.get()
    assert "37%" in capture.get()


def test_what_lessens_the_numbers_is_said() -> None:
    assert warnings([report_of(request())]) == []
    failed, busy = report_of(request(error="UNAVAILABLE")), report_of(request(), cpu=1.9)
    assert [text.split(" ")[0] for text in warnings([failed])] == ["1"]
    assert "UNAVAILABLE" in warnings([failed])[0]
    assert "95%" in warnings([busy])[0]


def test_a_run_in_which_all_failed_adds_up_to_nothing() -> None:
    report = report_of(request(error="UNAVAILABLE"))
    assert report.output_throughput == 0.0
    assert cases_table({"run": [report]}).row_count == 1
