"""What `loraplex bench peers` does: install the other systems, run the contest, have it judged, write it down."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from loraplex.bench import w16
from loraplex.bench.charts import draw_peers
from loraplex.bench.peers.contest import Driver, Outcome, Session, Trial, make_job, run_rounds, start_session
from loraplex.bench.peers.driver import Job
from loraplex.bench.peers.driver_process import DriverProcess, PeerError, driver_imports
from loraplex.bench.peers.environment import EnvironmentMissingError, ensure_environment, own_interpreter
from loraplex.bench.peers.peer import NOT_MEASURED, Peer, environ_of
from loraplex.bench.peers.report import entry, missing, peers_table, reasons
from loraplex.bench.peers.trials import BASE, FIRST_TOKEN, MIXED, ONE_STREAM, Sizes, make_trials
from loraplex.bench.peers.verdict import Verdict, candidates, judge
from loraplex.bench.random_adapter import ModelShape
from loraplex.cli.bench_run import rate_bar, write_result
from loraplex.cli.output import to_stderr, to_stdout

PREPARE_TIMEOUT_S = 3600.0
ORACLE_TIMEOUT_S = 900.0
JUDGED = (BASE, MIXED, ONE_STREAM)


@dataclass(frozen=True)
class PeersBench:
    """What to compare: systems, where theirs is kept, the model in both forms, how often, how much."""

    peers: Sequence[Peer]
    cache: Path
    model: Path
    gguf: Path
    rounds: int
    threads: int
    torch_index: str = ""
    sizes: Sizes = field(default_factory=Sizes)


def run(bench: PeersBench, output: Path, chart: Path) -> bool:
    """Compare, print the table, write `output` and `chart`; return whether ours ran and was right.

    A peer that fails is listed with the reason.
    """
    outcomes = {peer.system: Outcome() for peer in bench.peers}
    with tempfile.TemporaryDirectory(prefix="loraplex-peers-") as scratch, rate_bar() as bar:
        job = make_common_job(bench, Path(scratch))
        drivers = _Drivers(bench, job, _installed(bench, job, outcomes, bar))
        with drivers.oracle() as oracle:
            trials = make_trials(oracle.tokenize, bench.sizes, bench.rounds)
            with ExitStack() as stack, oracle.paused():
                sessions = _start(drivers, stack, trials, outcomes, bar)
                _run(bench, sessions, trials, outcomes, bar)
            verdicts = _judge(oracle, trials, outcomes, list(job.adapters), bar)
    entries = [
        entry(peer.system, peer.ours, outcomes[peer.system], trials, verdicts[peer.system]) for peer in bench.peers
    ]
    entries += [missing(system, reason) for system, reason in NOT_MEASURED.items()]
    _write(bench, entries, output, chart)
    return all(each["correct"] for each in entries if each["ours"])


def make_common_job(bench: PeersBench, scratch: Path) -> Job:
    """Write the adapters below `scratch`; return what all systems have in common."""
    shape = ModelShape.of(bench.model)
    adapters = {
        folder.name: folder for folder in w16.make_adapters(scratch / "adapters", shape=shape)[: bench.sizes.rows]
    }
    sizes = bench.sizes
    return Job(bench.model, bench.gguf, adapters, bench.cache, scratch, bench.threads, sizes.rows, sizes.context, {})


def _installed(bench: PeersBench, job: Job, outcomes: Mapping[str, Outcome], bar: Progress) -> dict[str, Path]:
    """Install every peer; return the interpreters of those that are there, by system."""
    task = bar.add_task("installing", total=len(bench.peers))
    pythons = {}
    for peer in bench.peers:
        bar.update(task, description=f"installing {peer.system}")
        try:
            pythons[peer.system] = (
                own_interpreter()
                if peer.ours
                else ensure_environment(bench.cache / peer.folder, peer.packages, peer.without, bench.torch_index)
            )
        except (EnvironmentMissingError, OSError) as error:
            outcomes[peer.system].reason = f"not installed: {error}"
        bar.advance(task)
    return pythons


class _Drivers:
    """Starts driver processes for what is installed."""

    def __init__(self, bench: PeersBench, job: Job, pythons: Mapping[str, Path]) -> None:
        self._bench = bench
        self._job = job
        self._pythons = pythons
        self._imports = driver_imports(bench.cache / "imports")

    @property
    def peers(self) -> list[Peer]:
        """The peers that are installed."""
        return [peer for peer in self._bench.peers if peer.system in self._pythons]

    def job(self, peer: Peer, with_adapters: bool) -> Job:
        """Return what `peer` is told; its folder is there then."""
        folder = self._bench.cache / peer.folder
        folder.mkdir(parents=True, exist_ok=True)
        return make_job(self._job, folder, self._job.adapters if with_adapters else {}, peer.options)

    def process(self, peer: Peer, what: str) -> DriverProcess:
        """Start a driver of `peer`."""
        log = self._job.scratch / f"{peer.folder}-{what}.log"
        environ = environ_of(peer, self._bench.cache / peer.folder, self._bench.threads)
        imports = None if peer.ours else self._imports
        return DriverProcess(self._pythons[peer.system], peer.driver, log, environ, imports)

    @contextmanager
    def oracle(self) -> Iterator[_Oracle]:
        """Yield PEFT in float32."""
        environ = {"OMP_NUM_THREADS": str(self._bench.threads), "HF_HUB_OFFLINE": "1"}
        with DriverProcess(own_interpreter(), "oracle", self._job.scratch / "oracle.log", environ, None) as process:
            process.ask({"start": self._job.as_plain()}, ORACLE_TIMEOUT_S)
            yield _Oracle(process)


class _Oracle:
    """What `peers.oracle` answers."""

    def __init__(self, process: DriverProcess) -> None:
        self._process = process

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""
        ids: list[list[int]] = self._process.ask({"tokenize": texts}, ORACLE_TIMEOUT_S)["ids"]
        return ids

    def score(self, asked: Sequence[tuple[list[int], list[int], list[str]]]) -> list[list[tuple[float, float]]]:
        """Return (regret, greedy share) for each (prompt, output, adapters), by adapter."""
        scores: list[list[tuple[float, float]]] = self._process.ask({"score": asked}, ORACLE_TIMEOUT_S)["scores"]
        return scores

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let it take no CPU time within the block."""
        self._process.pause()
        try:
            yield
        finally:
            self._process.resume()


def _start(
    drivers: _Drivers, stack: ExitStack, trials: Mapping[str, Trial], outcomes: Mapping[str, Outcome], bar: Progress
) -> list[Session]:
    """Prepare and start every system; those that are faster without adapters twice."""
    task = bar.add_task("starting", total=len(drivers.peers))
    sessions = []
    for peer in drivers.peers:
        bar.update(task, description=f"starting {peer.system}")
        plain = {BASE, FIRST_TOKEN} if peer.plain_apart else set()
        parts = [(False, plain), (True, {BASE, MIXED, ONE_STREAM, FIRST_TOKEN} - plain)]
        try:
            with drivers.process(peer, "prepare") as process:
                process.ask({"prepare": drivers.job(peer, True).as_plain()}, PREPARE_TIMEOUT_S)
        except PeerError as error:
            outcomes[peer.system].reason = str(error)
            parts = []
        for with_adapters, names in parts:
            chosen = {name: trial for name, trial in trials.items() if name in names}
            if not chosen:
                continue
            driver: Driver = stack.enter_context(drivers.process(peer, "adapted" if with_adapters else "plain"))
            job = drivers.job(peer, with_adapters)
            session = start_session(peer.system, driver, job, chosen, outcomes[peer.system])
            sessions += [session] if session else []
        bar.advance(task)
    return sessions


def _run(
    bench: PeersBench,
    sessions: Sequence[Session],
    trials: Mapping[str, Trial],
    outcomes: Mapping[str, Outcome],
    bar: Progress,
) -> None:
    task = bar.add_task("running", total=bench.rounds * sum(len(session.trials) for session in sessions))
    run_rounds(sessions, trials, bench.rounds, outcomes, lambda what: bar.update(task, description=what, advance=1))


def _judge(
    oracle: _Oracle,
    trials: Mapping[str, Trial],
    outcomes: Mapping[str, Outcome],
    adapters: Sequence[str],
    bar: Progress,
) -> dict[str, dict[str, Verdict]]:
    """Return the verdicts on the first round, by system and case."""
    task = bar.add_task("judging", total=len(outcomes) * len(JUDGED))
    verdicts: dict[str, dict[str, Verdict]] = {system: {} for system in outcomes}
    for system, outcome in outcomes.items():
        for case in JUDGED:
            bar.update(task, description=f"judging {system}: {case}")
            if case in outcome.tokens:
                rows = zip(trials[case].rounds[0], outcome.tokens[case], strict=True)
                asked = [(row.prompt, output, candidates(row.adapter, adapters)) for row, output in rows]
                verdicts[system][case] = judge(oracle.score(asked))
            bar.advance(task)
    return verdicts


def _write(bench: PeersBench, entries: Sequence[Mapping[str, Any]], output: Path, chart: Path) -> None:
    """Write the list of systems to `output`, and what it was measured on beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    document = [{**each, "threads": bench.threads} for each in entries]
    output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    about = {"rounds": bench.rounds, "sizes": asdict(bench.sizes), "load_average": round(os.getloadavg()[0], 2)}
    write_result(about, output.with_name(f"{output.stem}-machine.json"))
    console = to_stderr()
    to_stdout().print(peers_table(entries))
    for line in reasons(entries):
        console.print(line, style="yellow", markup=False)
    draw_peers(entries, chart)
    console.print(f"wrote {output} and {chart}", markup=False)
