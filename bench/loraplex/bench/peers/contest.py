"""Runs the same requests on every system in turn and keeps what came of it. Shows nothing, writes nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from loraplex.bench.peers.driver import Job, Request
from loraplex.bench.peers.driver_process import PeerError

WARM_UP_TOKENS = 4
START_TIMEOUT_S = 900.0
RUN_TIMEOUT_S = 900.0
PLAIN, ADAPTED = "plain", "adapted"


@dataclass(frozen=True)
class Trial:
    """One case of the contest: the requests of each round, and how many tokens each is to be answered with."""

    rounds: Sequence[Sequence[Request]]
    max_tokens: int

    @property
    def names_adapters(self) -> bool:
        """Whether any request is for an adapter."""
        return any(request.adapter for requests in self.rounds for request in requests)


class Driver(Protocol):
    """A system's driver; `driver_process.DriverProcess` is one."""

    def ask(self, message: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Send a message and return the answer."""

    def pause(self) -> None:
        """Take all CPU time from the system."""

    def resume(self) -> None:
        """Give it back."""


@dataclass
class Outcome:
    """What came of one system; a failure leaves what there was before.

    Attributes:
        facts: what it said of itself.
        ready_s: start of the driver to answering, adapters loaded.
        seconds: of each round, by case.
        tokens: the answers of the first round, by case.
        reason: why something is missing; empty if nothing is.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    ready_s: float | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    reason: str = ""


@dataclass
class Session:
    """A started system, to be asked for the trials named."""

    system: str
    driver: Driver
    trials: Sequence[str]
    failed: bool = False


def start_session(
    system: str, driver: Driver, job: Job, trials: Mapping[str, Trial], outcome: Outcome
) -> Session | None:
    """Start a system and let it answer a little of each trial; None if it fails, with the reason in `outcome`."""
    started = time.perf_counter()
    session = Session(system, driver, list(trials))
    try:
        outcome.facts = driver.ask({"start": job.as_plain()}, START_TIMEOUT_S)
        if job.adapters or outcome.ready_s is None:
            outcome.ready_s = time.perf_counter() - started
        for trial in trials.values():
            _ask(driver, trial.rounds[-1], min(WARM_UP_TOKENS, trial.max_tokens))
        driver.pause()
    except PeerError as error:
        outcome.reason = str(error)
        return None
    return session


def run_rounds(
    sessions: Sequence[Session],
    trials: Mapping[str, Trial],
    rounds: int,
    outcomes: Mapping[str, Outcome],
    on_run: Callable[[str], None] = lambda _: None,
) -> None:
    """Run every trial on every session `rounds` times; `on_run` hears what runs next.

    Systems take turns within each trial. The others get no CPU time meanwhile. A system that fails is left out of what
    follows.
    """
    for number in range(rounds):
        for case, trial in trials.items():
            for session in sessions:
                if case in session.trials and not session.failed:
                    on_run(f"{session.system}: {case}")
                    _run(session, case, trial, number, outcomes[session.system])


def _run(session: Session, case: str, trial: Trial, number: int, outcome: Outcome) -> None:
    requests = trial.rounds[number]
    try:
        with _awake(session.driver):
            answer = _ask(session.driver, requests, trial.max_tokens)
    except PeerError as error:
        session.failed = True
        outcome.reason = f"{case}: {error}"
        return
    outcome.seconds.setdefault(case, []).append(answer["seconds"])
    outcome.tokens.setdefault(case, answer["tokens"])


def _ask(driver: Driver, requests: Sequence[Request], max_tokens: int) -> dict[str, Any]:
    """Ask and check that the answer has the tokens asked for."""
    message = {"run": [vars(request) for request in requests], "max_tokens": max_tokens}
    answer = driver.ask(message, RUN_TIMEOUT_S)
    counts = {len(tokens) for tokens in answer["tokens"]}
    if len(answer["tokens"]) != len(requests) or counts != {max_tokens}:
        raise PeerError(f"asked for {len(requests)} answers of {max_tokens} tokens, got lengths {sorted(counts)}")
    return answer


@contextlib.contextmanager
def _awake(driver: Driver) -> Iterator[None]:
    driver.resume()
    try:
        yield
    finally:
        driver.pause()


def make_job(base: Job, folder: Path, adapters: Mapping[str, Path], options: Mapping[str, str]) -> Job:
    """Return `base` for one system: its folder and options, and the adapters of this session."""
    return Job(**{**vars(base), "folder": folder, "adapters": dict(adapters), "options": dict(options)})
