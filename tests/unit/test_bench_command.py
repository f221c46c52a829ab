from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from loraplex.cli.bench_run import adapter_names
from loraplex.cli.main import app
from tests.unit.fake_server import FakeServer, fail

RUN = ["--requests", "4", "--concurrency", "2", "--max-tokens", "3"]


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


def test_bench_measures_and_writes_json(server: FakeServer, tmp_path: Path) -> None:
    output = tmp_path / "new" / "bench.json"
    options = ["--server", server.target, "--adapters", "all", "--repeat", "2", "--json", str(output)]
    with server:
        result = CliRunner().invoke(app, ["bench", *RUN, *options])
        requests = [seen.request for seen in server.seen["GenerateStream"]]
    assert result.exit_code == 0, result.output
    assert [request.adapters[0].name for request in requests].count("a") == 4
    assert len({request.text for request in requests}) == 8
    document = json.loads(output.read_text())
    assert document["workload"]["adapters"] == ["a", "b"]
    assert len(document["cases"]["run"]["runs"]) == 2
    assert document["cases"]["run"]["runs"][0]["completed"] == 4
    assert "Output tokens per second" in result.output


def test_all_stands_for_the_registered_adapters(server: FakeServer) -> None:
    with server:
        assert adapter_names(server.target, "base, all") == ("base", "a", "b")
    assert adapter_names("nowhere:1", " x,,y ") == ("x", "y")
    assert adapter_names("nowhere:1", "") == ()


def test_bench_names_no_adapter_unless_told(server: FakeServer) -> None:
    with server:
        # The fake answers with an adapter's digest, which the base must not have.
        result = CliRunner().invoke(app, ["bench", *RUN, "--server", server.target])
        assert {seen.request.adapters[0].name for seen in server.seen["GenerateStream"]} == {""}
    assert result.exit_code == 1
    assert "WRONG_ADAPTER" in result.output


def test_failed_requests_end_the_command_with_status_1(server: FakeServer) -> None:
    with server:
        server.script["GenerateStream"].append(fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full"))
        result = CliRunner().invoke(app, ["bench", *RUN, "--server", server.target, "--adapters", "a"])
    assert result.exit_code == 1
    assert "1 requests failed (RESOURCE_EXHAUSTED)" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapters", "a", "--assignment", "sideways"], "sideways"),
        (["--adapters", "a,b", "--assignment", "distinct"], "need as many adapters"),
    ],
)
def test_impossible_options_are_usage_errors(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *RUN, *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_unknown_case_of_w16_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["bench", "w16", "--cases", "base,other"])
    assert result.exit_code == 2
    assert "no such case: other" in result.output


def test_unknown_system_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["bench", "peers", "--systems", "vllm,other"])
    assert result.exit_code == 2
    assert "no such system: other" in " ".join(result.output.split())


def test_roofline_writes_rates_and_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex.bench.roofline.READ_BYTES", 1 << 16)
    monkeypatch.setattr("loraplex.bench.roofline.SIDE", 32)
    output = tmp_path / "roofline.json"
    result = CliRunner().invoke(app, ["bench", "roofline", "--json", str(output)])
    assert result.exit_code == 0, result.output
    document = json.loads(output.read_text())
    assert document["read_gb_s"] > 0
    assert set(document["product_gflop_s"]) == {"float32", "bfloat16", "int8"}
    assert all(ms > 0 for ms in document["step_bounds_ms"].values())
