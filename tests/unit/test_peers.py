"""The contest between systems, with drivers that are scripted instead of real systems."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from loraplex.bench import w16
from loraplex.bench.charts import draw_peers
from loraplex.bench.peers.contest import Outcome, Session, Trial, run_rounds, start_session
from loraplex.bench.peers.driver import Job, Request
from loraplex.bench.peers.driver_process import DriverProcess, PeerError
from loraplex.bench.peers.environment import EnvironmentMissingError, ensure_environment
from loraplex.bench.peers.gguf_adapter import interleave_halves, write_gguf_adapter
from loraplex.bench.peers.peer import PEERS, environ_of
from loraplex.bench.peers.report import entry, missing, peers_table, reasons
from loraplex.bench.peers.trials import Sizes, make_trials
from loraplex.bench.peers.verdict import Verdict, candidates, judge
from loraplex.bench.random_adapter import ModelShape, write_adapter


def job(tmp_path: Path, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "model": tmp_path, "gguf": tmp_path, "adapters": {"a": tmp_path}, "folder": tmp_path, "scratch": tmp_path,
        "threads": 1, "rows": 2, "tokens": 8, "options": {},
    }  # fmt: skip
    return Job(**{**values, **changes})


class FakeDriver:
    """Answers at once; fails at what it is told to."""

    def __init__(self, fails_at: str = "", seconds: float = 2.0, short: bool = False) -> None:
        self.fails_at, self.seconds, self.short = fails_at, seconds, short
        self.asked: list[Mapping[str, Any]] = []
        self.awake = True
        self.slept_while_asked = False

    def ask(self, message: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        self.asked.append(message)
        self.slept_while_asked |= not self.awake
        what = next(iter(message))
        if what == self.fails_at:
            raise PeerError(f"{what}: it broke\nlast line of its log")
        if what == "start":
            return {"version": "1.0", "dtype": "int8", "way": "in process"}
        count = message["max_tokens"] - self.short
        return {"seconds": self.seconds, "tokens": [[7] * count for _ in message["run"]]}

    def pause(self) -> None:
        self.awake = False

    def resume(self) -> None:
        self.awake = True


TRIALS = {
    "base": Trial([[Request([1, 2], ""), Request([3], "")]] * 3, 8),
    "mixed": Trial([[Request([1, 2], "a"), Request([3], "b")]] * 3, 8),
}


def start(driver: FakeDriver, tmp_path: Path) -> tuple[Session | None, Outcome]:
    outcome = Outcome()
    return start_session("it", driver, job(tmp_path), TRIALS, outcome), outcome


def test_systems_take_turns_and_only_one_is_awake(tmp_path: Path) -> None:
    drivers = {"one": FakeDriver(seconds=2.0), "two": FakeDriver(seconds=4.0)}
    outcomes = {name: Outcome() for name in drivers}
    sessions = []
    for name, driver in drivers.items():
        session = start_session(name, driver, job(tmp_path), TRIALS, outcomes[name])
        assert session is not None
        sessions.append(session)
    runs: list[str] = []
    run_rounds(sessions, TRIALS, 2, outcomes, runs.append)
    assert runs == ["one: base", "two: base", "one: mixed", "two: mixed"] * 2
    assert outcomes["two"].seconds == {"base": [4.0, 4.0], "mixed": [4.0, 4.0]}
    assert outcomes["one"].tokens["mixed"] == [[7] * 8, [7] * 8]
    assert not any(driver.awake or driver.slept_while_asked for driver in drivers.values())


def test_a_system_that_does_not_start_is_left_out_with_the_reason(tmp_path: Path) -> None:
    session, outcome = start(FakeDriver("start"), tmp_path)
    assert session is None
    assert outcome.reason.startswith("start: it broke")


def test_a_system_that_breaks_keeps_what_it_had_and_the_others_go_on(tmp_path: Path) -> None:
    breaking, steady = FakeDriver(), FakeDriver()
    sessions, outcomes = [], {"breaking": Outcome(), "steady": Outcome()}
    for name, driver in (("breaking", breaking), ("steady", steady)):
        session = start_session(name, driver, job(tmp_path), TRIALS, outcomes[name])
        assert session is not None
        sessions.append(session)
    run_rounds(sessions, TRIALS, 1, outcomes)
    breaking.fails_at = "run"
    run_rounds(sessions, TRIALS, 2, outcomes)
    assert outcomes["breaking"].seconds == {"base": [2.0], "mixed": [2.0]}
    assert "it broke" in outcomes["breaking"].reason
    assert len(outcomes["steady"].seconds["mixed"]) == 3


def test_too_few_tokens_are_a_failure(tmp_path: Path) -> None:
    session, outcome = start(FakeDriver(short=True), tmp_path)
    assert session is None
    assert "got lengths [3]" in outcome.reason


def test_answers_explained_by_another_adapter_are_wrong() -> None:
    right, tied, elsewhere = [(0.1, 0.9), (0.4, 0.7)], [(0.12, 0.9), (0.1, 0.9)], [(0.4, 0.9), (0.1, 0.9)]
    assert judge([right, tied]).correct
    assert not judge([tied, tied]).correct
    verdict = judge([right, elsewhere])
    assert (verdict.rows, verdict.rows_right, verdict.correct) == (2, 1, False)
    assert not judge([[(2.0, 0.3), (3.0, 0.2)]]).correct, "its own adapter, but hardly the same model"
    with pytest.raises(ValueError, match="no rows"):
        judge([])


def test_rows_are_judged_under_what_they_could_be_mistaken_for() -> None:
    names = ["a", "b", "c"]
    assert candidates("b", names) == ["b", "", "a", "c"]
    assert candidates("a", names) == ["a", "", "b"]
    assert candidates("", names) == ["", "a"]


def entries() -> list[dict[str, Any]]:
    outcome = Outcome({"version": "1.0", "dtype": "int8", "way": "in process"}, 3.0, {"base": [2.0, 4.0, 1.0]})
    outcome.seconds["mixed"] = [16.0]
    good, bad = Verdict(2, 2, 0.1, 0.3, 0.9), Verdict(2, 1, 0.2, 0.1, 0.9)
    return [
        entry("ours", True, outcome, TRIALS, {"base": good, "mixed": good}),
        entry("theirs", False, outcome, TRIALS, {"base": good, "mixed": bad}),
        missing("absent", "not installed: pip said no\nand more"),
    ]


def test_an_entry_has_the_figures_and_the_verdict() -> None:
    ours, theirs, absent = entries()
    assert (ours["base_tok_s"], ours["mixed_tok_s"], ours["one_stream_tok_s"]) == (8.0, 1.0, None)
    assert ours["spread"]["base_tok_s"] == {"lowest": 4.0, "highest": 16.0}
    assert (ours["correct"], theirs["correct"], absent["correct"]) == (True, False, None)
    assert set(ours) == set(absent)
    assert absent["base_tok_s"] is None
    assert reasons([ours, absent]) == ["absent: not installed: pip said no"]
    assert json.loads(json.dumps(ours)) == ours


def test_wrong_answers_are_shown_as_wrong(tmp_path: Path) -> None:
    console = Console(width=140, record=True, quiet=True)
    with console.capture() as capture:
        console.quiet = False
        console.print(peers_table(entries()))
    assert "WRONG (mixed)" in capture.get()
    assert "not judged" in capture.get()
    draw_peers(entries(), tmp_path / "chart.svg")
    drawn = (tmp_path / "chart.svg").read_text()
    draw_peers(entries()[:1], tmp_path / "right.svg")
    assert drawn.count("url(#") > (tmp_path / "right.svg").read_text().count("url(#"), "wrong bars are hatched"


def test_trials_ask_all_systems_for_the_same_ids() -> None:
    def tokenize(texts: list[str]) -> list[list[int]]:
        return [[ord(character) for character in text] for text in texts]

    trials = make_trials(tokenize, Sizes(rows=3, tokens=5, long_prompt=40), rounds=2)
    assert [request.prompt for request in trials["base"].rounds[0]] == [r.prompt for r in trials["mixed"].rounds[0]]
    assert [request.adapter for request in trials["mixed"].rounds[0]] == [w16.adapter_name(i) for i in range(3)]
    assert not trials["base"].names_adapters
    assert [len(requests[0].prompt) for requests in trials["ttft_512"].rounds] == [40, 40, 40]
    assert trials["ttft_512"].max_tokens == 1
    seen = [tuple(request.prompt) for requests in trials["base"].rounds for request in requests]
    assert len(set(seen)) == 9, "no round finds the prompts of another in a cache"


DRIVER = """
from loraplex.bench.peers.driver import Facts, converse

class Echo:
    def prepare(self, job):
        print("noise on stdout")
    def start(self, job):
        if job.options.get("fail"):
            raise OSError("no such model")
        return Facts("1", "bf16", f"{job.rows} rows")
    def run(self, requests, max_tokens):
        if not requests:
            raise SystemExit(3)
        return [request.prompt * max_tokens for request in requests]
    def stop(self):
        pass

converse(Echo())
"""


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """What a peer's interpreter imports: the conversation, and a driver that answers with the prompts."""
    package = tmp_path / "imports" / "loraplex" / "bench" / "peers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    import loraplex.bench.peers.driver as driver

    (package / "driver.py").symlink_to(driver.__file__)
    (package / "echo.py").write_text(DRIVER)
    return tmp_path / "imports"


def process(echo: Path, tmp_path: Path) -> DriverProcess:
    return DriverProcess(Path(sys.executable), "echo", tmp_path / "echo.log", {}, echo)


def test_a_driver_process_answers_and_keeps_its_noise_apart(echo: Path, tmp_path: Path) -> None:
    with process(echo, tmp_path) as driver:
        assert driver.ask({"prepare": job(tmp_path).as_plain()}, 30) == {}
        assert driver.ask({"start": job(tmp_path).as_plain()}, 30)["way"] == "2 rows"
        driver.pause()
        driver.resume()
        answer = driver.ask({"run": [{"prompt": [5, 6], "adapter": "a"}], "max_tokens": 2}, 30)
        assert answer["tokens"] == [[5, 6, 5, 6]]
        assert answer["seconds"] > 0
    assert "noise" in (tmp_path / "echo.log").read_text()


def test_what_fails_in_a_driver_is_said(echo: Path, tmp_path: Path) -> None:
    with process(echo, tmp_path) as driver:
        with pytest.raises(PeerError, match="start: OSError: no such model"):
            driver.ask({"start": job(tmp_path, options={"fail": "1"}).as_plain()}, 30)
        assert driver.ask({"start": job(tmp_path).as_plain()}, 30)["version"] == "1"
        with pytest.raises(PeerError, match="ended with status 3"):
            driver.ask({"run": [], "max_tokens": 2}, 30)


def test_a_driver_that_does_not_answer_is_given_up(echo: Path, tmp_path: Path) -> None:
    with process(echo, tmp_path) as driver:
        driver.ask({"prepare": job(tmp_path).as_plain()}, 30)
        driver.pause()
        with pytest.raises(PeerError, match=r"no answer within 0\.1 s"):
            driver.ask({"prepare": job(tmp_path).as_plain()}, 0.1)


@pytest.fixture
def borrowed(tmp_path: Path) -> Path:
    """A folder whose venv is this interpreter, so that nothing has to be made."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return tmp_path


def test_what_pip_says_is_the_reason(borrowed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(EnvironmentMissingError, match="no-such-package"):
        ensure_environment(borrowed, ["no-such-package==1.0"])
    assert not (borrowed / "installed.json").exists()


def test_an_installed_environment_is_left_alone_until_its_packages_change(
    borrowed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (borrowed / "installed.json").write_text('[["a==1"], ["b"]]')
    assert ensure_environment(borrowed, ["a==1"], ["b"]) == borrowed / "venv" / "bin" / "python"
    with pytest.raises(EnvironmentMissingError):
        ensure_environment(borrowed, ["a==2"], ["b"])


def test_only_vllm_preloads_libraries(tmp_path: Path) -> None:
    (tmp_path / "venv" / "lib").mkdir(parents=True)
    (tmp_path / "venv" / "lib" / "libiomp5.so").touch()
    preloads = {peer.folder: environ_of(peer, tmp_path, 2).get("LD_PRELOAD", "") for peer in PEERS}
    assert preloads.pop("vllm").endswith("libiomp5.so")
    assert not any(preloads.values())


def test_rows_of_q_and_k_follow_llama_cpps_order() -> None:
    rows = np.arange(12).reshape(12, 1)
    assert interleave_halves(rows, 2).ravel().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_a_gguf_adapter_has_every_tensor_and_its_alpha(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    shape = ModelShape(layers=1, hidden=16, intermediate=24, key_value=8)
    write_adapter(tmp_path / "a", rank=4, seed=0, shape=shape)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2, "num_key_value_heads": 1}')
    output = write_gguf_adapter(tmp_path / "a", tmp_path, tmp_path / "a.gguf")
    read = gguf.GGUFReader(output)
    tensors = {tensor.name: tensor.data for tensor in read.tensors}
    source = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(tensors) == len(source) == 14
    down = source["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"]
    assert np.array_equal(tensors["blk.0.ffn_down.weight.lora_a"], down)
    k = source["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"]
    assert np.array_equal(tensors["blk.0.attn_k.weight.lora_b"], interleave_halves(k, 1))
    assert read.get_field("adapter.lora.alpha").contents() == 8.0
