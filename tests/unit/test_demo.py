from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server
from rich.console import Console

from loraplex.bench.load import RequestResult
from loraplex.bench.scrape import Scrape, scrape
from loraplex.bench.server_process import ServerProcess, ServerProcessError
from loraplex.cli.demo_cases import (
    ADDED,
    AT_START,
    Answer,
    Row,
    adapters_beside_base,
    enough_right,
    find_examples,
    is_right,
    read_example,
)
from loraplex.cli.demo_record import Record, answers_as_json, answers_table
from loraplex.cli.termination import sigterm_raises

REPOSITORY = Path(__file__).parents[2]


def answer(text: str, base_text: str = "", expected: str = "yes") -> Answer:
    return Answer("a", Row("a task\nquestion?", expected), text, base_text)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("positive", True),
        (" positive \n", True),
        ("positive\nBecause ...", True),
        ("positive.", False),
        ("The review is positive", False),
        ("", False),
        ("\n\n", False),
    ],
)
def test_only_the_expected_first_line_is_right(text: str, right: bool) -> None:
    assert is_right(text, "positive") is right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('{"a": 1, "b": 2, "c": 3, "d": 4}', True),
        ('{"d": 4, "c": 3, "b": 2, "a": 0}', True),
        ('{"a": 1, "b": 2, "c": 0, "d": 0}', False),
        ('{"a": 1, "b": 2, "c": 3}', False),
        ('{"a": 1, "b": 2, "c": 3, "d": 4', False),
        ("[1, 2, 3, 4]", False),
    ],
)
def test_a_record_is_right_with_its_keys_and_most_fields(text: str, right: bool) -> None:
    assert is_right(text, '{"a": 1, "b": 2, "c": 3, "d": 4}') is right


def test_half_of_the_answers_and_more_than_the_base_are_enough() -> None:
    yes, no, both = answer("yes"), answer("no"), answer("yes", "yes")
    assert enough_right([yes, yes, no, no])
    assert not enough_right([yes, no, no, no])
    assert not enough_right([both, both])
    assert not enough_right([])


def writing(adapter: str, first: float | None, end: float, error: str = "") -> RequestResult:
    return RequestResult(0, adapter, error, 0.0, first, (), end, 1, 1, "")


def test_adapters_that_write_while_the_base_does_are_counted() -> None:
    base = writing("", 1.0, 5.0)
    assert adapters_beside_base([base, writing("a", 2.0, 3.0), writing("b", 2.5, 6.0), writing("b", 2.5, 6.0)]) == 2


@pytest.mark.parametrize(
    "others",
    [
        [],
        [writing("a", 5.0, 9.0)],
        [writing("a", None, 9.0)],
        [writing("a", 2.0, 3.0, error="UNAVAILABLE")],
    ],
)
def test_what_does_not_write_beside_the_base_is_not_counted(others: list[RequestResult]) -> None:
    assert adapters_beside_base([writing("", 1.0, 5.0), *others]) == 0
    assert adapters_beside_base(others) == 0


def test_adapters_that_take_turns_beside_the_base_do_not_add_up() -> None:
    assert adapters_beside_base([writing("", 1.0, 9.0), writing("a", 2.0, 4.0), writing("b", 4.0, 6.0)]) == 1


def test_examples_are_found_from_anywhere(tmp_path: Path) -> None:
    expected = REPOSITORY / "adapters" / "examples"
    assert find_examples(REPOSITORY / "server" / "loraplex") == expected
    assert find_examples(tmp_path) == expected
    (tmp_path / "adapters" / "examples" / "data").mkdir(parents=True)
    assert find_examples(tmp_path) == tmp_path / "adapters" / "examples"


def test_every_example_of_the_demo_has_held_out_rows(tmp_path: Path) -> None:
    for name in (*AT_START, ADDED):
        example = read_example(REPOSITORY / "adapters" / "examples", name, count=2)
        assert (example.name, len(example.rows)) == (name, 2)
    with pytest.raises(FileNotFoundError, match=r"sql is incomplete: no sql/adapter_config\.json"):
        read_example(tmp_path, "sql")


def test_answers_are_counted_and_shown() -> None:
    answers = [answer("yes", "no"), answer("no", "yes"), answer("yes", "yes"), answer("no", "x" * 200)]
    document = answers_as_json(answers)
    assert (document["asked"], document["right"], document["base_right"]) == (4, 2, 2)
    assert document["answers"][0] == {"prompt": "a task\nquestion?", "expected": "yes", "adapter": "yes", "base": "no"}
    console = Console(width=120)
    with console.capture() as capture:
        console.print(answers_table(answers))
    assert "question?" in capture.get()
    assert "a task" not in capture.get()
    assert "x" * 100 not in capture.get()


def test_record_holds_only_if_everything_did(tmp_path: Path) -> None:
    record = Record(Console(quiet=True))
    assert not record.held
    with record.phase("first", "The first phase", waiting="for nothing"):
        record.check("fine", True, "is fine")
    assert record.held
    record.check("broken", False, "is broken")
    record.facts["answer"] = 42
    record.finish(tmp_path / "results" / "demo.json")
    text = (tmp_path / "results" / "demo.json").read_text()
    document = json.loads(text)
    assert document["held"] is False
    assert document["checks"] == {"fine": True, "broken": False}
    assert document["answer"] == 42
    assert set(document["seconds"]) == {"first", "total"}
    assert str(tmp_path) not in text


def test_scrape_reads_samples_without_labels() -> None:
    registry = CollectorRegistry()
    Gauge("rate", "A rate.", registry=registry).set(12.5)
    Counter("tokens", "Tokens.", ("adapter",), registry=registry).labels("a").inc()
    httpd, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        url = f"http://127.0.0.1:{httpd.server_port}/metrics"
        assert scrape(url) == {"rate": 12.5}
        assert Scrape.of(url).value("tokens_total", adapter="a") == 1
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def test_scrape_finds_labelled_samples_and_quantiles() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("load", "Loads.", ("tier",), buckets=(1, 2, 4), registry=registry)
    for value in (0.5, 1.5, 1.5, 3, 9):
        histogram.labels("host").observe(value)
    histogram.labels("device").observe(3.5)
    found = Scrape.parse(generate_latest(registry).decode())
    assert found.value("load_count", tier="host") == 5
    assert found.value("load_count") == found.value("load_count", tier="none") == 0
    assert found.quantile("load", 0.6, tier="host") == 2
    assert found.quantile("load", 0.4, tier="host") == 1.5
    assert found.quantile("load", 0.99, tier="host") == 4, "beyond the last bound nothing is known"
    assert found.quantile("load", 0.5, tier="none") == 0


def test_server_that_does_not_start_is_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        ServerProcess(["--no-such-option"], tmp_path / "log") as server,
        pytest.raises(ServerProcessError, match="ended with status 2"),
    ):
        server.wait_until_ready(60)
    assert "no-such-option" in capfd.readouterr().err


def test_sigterm_leaves_through_the_contexts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_, sigterm_raises():
        os.kill(os.getpid(), signal.SIGTERM)
    assert exit_.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
