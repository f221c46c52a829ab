"""The generated parts of docs/PERFORMANCE.md: every figure comes from a document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraplex.bench.cpu_report import TEXTS, cpu_document, cpu_table
from loraplex.bench.cpu_run import Measurement, common_share
from loraplex.bench.load import LoadResult, RequestResult
from loraplex.bench.performance_page import PERFORMANCE_PARTS, README_PARTS, PageError, fill
from loraplex.bench.process_memory import budgets_mb, resident_mb
from loraplex.bench.random_adapter import ModelShape
from loraplex.bench.report import Report
from loraplex.bench.roofline import step_bounds
from loraplex.bench.step_meter import StepMeter
from loraplex.bench.workload import Workload

PAGE = Path(__file__).parents[2] / "docs" / "PERFORMANCE.md"
README = Path(__file__).parents[2] / "README.md"
MACHINE = {"usable_cpus": 2, "cpu_model": "a CPU", "cpu_capabilities": ["avx2"]}
CASES = ("base", "same", "mixed", "mixed_r8", "one_stream", "rows64_r8", "rows1", "rows4", "rows64", "ttft_512")


def result(index: int = 0, tokens: tuple[int, ...] = (1, 2), error: str = "", ttft: float = 0.1) -> RequestResult:
    return RequestResult(index, "", error, 0.0, ttft, (0.1,), 1.0, 30, len(tokens), "", tokens)


def measurement(duration: float, step_ms: float | None) -> Measurement:
    return Measurement(Report.of(LoadResult(Workload(), duration, 0.1, (result(),))), step_ms)


def cpu() -> dict[str, Any]:
    cases = {
        case: [measurement(1.0, 10.0), measurement(0.5, 20.0)]
        for case in (*CASES, *map("rank{}".format, (8, 16, 32, 64)))
    }
    cases["mixed"] = [measurement(2.0, 14.0), measurement(1.0, 30.0)]
    cases["mixed_r8"] = [measurement(2.0, None), measurement(1.0, 21.0)]
    document = cpu_document({"nf4": cases}, {"nf4": [3.0, 5.0]}, {"nf4": 1500.04})
    return document | {
        "machine": MACHINE,
        "commit": "abc",
        "budgets_mb": {"nf4": {"weights": 100.0, "kv_cache": 500.0}},
    }


def test_the_document_has_medians_spread_and_what_lora_adds() -> None:
    document = cpu()
    assert document["base_tok_s"] == {"nf4": 3.0}
    assert document["spread"]["base_tok_s"]["nf4"] == {"lowest": 2.0, "highest": 4.0}
    assert document["lora_adds_ms"]["nf4"] == {"same": 0.0, "mixed": 7.0, "mixed_r8": 1.0}
    assert document["of_base"]["mixed_tok_s"] == {"nf4": 0.5}
    assert document["rows_tok_s"]["nf4"] == {"1": 3.0, "4": 3.0, "16": 3.0, "64": 3.0}
    assert document["ttft_512_ms"] == {"nf4": 100.0}
    assert document["ready_s"] == {"nf4": 4.0}
    assert document["rss_mb"] == {"nf4": 1500.0}
    assert set(TEXTS) <= set(document)
    assert cpu_table(document).row_count > len(TEXTS)


def test_the_page_has_every_part_and_takes_figures_from_documents_only() -> None:
    page = PAGE.read_text()
    assert fill(page, {}, PERFORMANCE_PARTS) == page
    filled = fill(page, {"cpu": cpu()}, PERFORMANCE_PARTS)
    assert "| mixed, 16 adapters of ranks 8 to 64 |  | >= 470 tok/s | 1.5 |" in filled
    assert "| memory beside weights and budgets |  | <= 600 MB (NF4) | 900.0 |" in filled
    assert "at abc on 2 cores of a CPU (avx2)" in filled
    assert fill(filled, {"cpu": cpu()}, PERFORMANCE_PARTS) == filled, "filling twice changes nothing"
    for text, parts in ((page, PERFORMANCE_PARTS), (README.read_text(), README_PARTS)):
        assert all(f"<!-- generated: {name} -->" in text for name in parts)
    with pytest.raises(PageError, match="targets"):
        fill("no parts", {"cpu": cpu()}, PERFORMANCE_PARTS)


def test_only_right_peers_compete() -> None:
    entry: dict[str, Any] = {
        "ours": False,
        "base_tok_s": 50.0,
        "mixed_tok_s": 90.0,
        "one_stream_tok_s": None,
        "ttft_512_ms": 5.0,
    }
    entry |= {"ready_s": 1.0, "version": "1", "way": "in process", "reason": ""}
    right, wrong = {"correct": True}, {"correct": False}
    peers = [
        {**entry, "system": "wrong", "correct": False, "judged": {"base": right, "mixed": wrong}},
        {
            **entry,
            "system": "right",
            "mixed_tok_s": 40.0,
            "base_tok_s": 45.0,
            "correct": True,
            "judged": {"mixed": right},
        },
    ]
    filled = fill(PAGE.read_text(), {"cpu": cpu(), "peers": peers}, PERFORMANCE_PARTS)
    assert "40.0 (right)" in filled
    assert "90.0 (wrong)" not in filled
    assert "50.0 (wrong)" in filled, "its base is right"
    assert "| wrong | 50.0 | 90.0 | - | 5.0 | 1.0 | **wrong** | 1; in process |" in filled


def test_the_readme_says_where_its_chart_comes_from() -> None:
    about = {"machine": MACHINE, "commit": "abc"}
    filled = fill(README.read_text(), {"peers": [], "peers-machine": about}, README_PARTS)
    assert "(docs/images/peers.png)" in filled
    assert "`make bench-peers` at abc on 2 cores of a CPU" in filled


def test_bounds_are_work_over_rate() -> None:
    bounds = step_bounds({"read_gb_s": 40.0, "product_gflop_s": {"int8": 1000.0}})
    assert bounds["reading 16 adapters, ranks 8 to 64"] == pytest.approx(2 * 146.5344 / 40, abs=0.01)
    assert bounds["reading int8 weights"] == pytest.approx(134.48 / 40, abs=0.01)
    assert bounds["products in int8"] == pytest.approx(2 * 16 * 134.48e-3, abs=0.01)


def test_budgets_are_those_of_the_shape() -> None:
    server = {"dtype": "bfloat16", "quantization": "int8", "kv_blocks": 10, "kv_block_size": 16, "vocab_size": 49152}
    budgets = budgets_mb({**server, "adapter_device_memory_bytes": 2_000_000}, ModelShape())
    assert budgets == {"weights": round((106.168320 + 2 * 28.311552), 1), "kv_cache": 3.7, "adapters": 2.0}
    assert resident_mb(10**9) == 0.0


def test_agreement_ends_at_the_first_difference() -> None:
    load = Workload(2, 2, max_tokens=4)
    one = LoadResult(load, 1.0, 0.1, (result(0, (1, 2, 3, 4)), result(1, (5, 6, 7, 8))))
    two = LoadResult(load, 1.0, 0.1, (result(0, (1, 2, 9, 4)), result(1, (5, 6, 7, 8))))
    failed = LoadResult(load, 1.0, 0.1, (result(0, (1, 2, 3, 4)), result(1, (), error="UNAVAILABLE")))
    assert (common_share(one, one), common_share(one, two), common_share(one, failed)) == (1.0, 0.75, 0.5)


async def test_steps_are_counted_between_two_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(10.0, 100.0), (10.6, 130.0)])

    def scrape(url: str) -> dict[str, float]:
        seconds, count = next(readings)
        name = "loraplex_step_duration_seconds"
        return {f"{name}_sum": seconds, f"{name}_count": count}

    monkeypatch.setattr("loraplex.bench.step_meter.scrape", scrape)
    meter = StepMeter("there", 100)
    for _ in range(10):
        meter.on_tokens(10)
    assert await meter.step_ms() == pytest.approx(20.0)
    assert await StepMeter("there", 100).step_ms() is None
