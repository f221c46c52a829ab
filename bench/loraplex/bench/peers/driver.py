"""A driver's side of the conversation: one JSON object a line in, one out. Standard library only.

Whatever a system prints goes to stderr; the answers alone go to stdout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Job:
    """What a system is to serve.

    Attributes:
        model: a Hugging Face folder.
        gguf: the same weights as llama.cpp reads them.
        adapters: folders as PEFT saves them, by name; empty where none will be asked for.
        folder: the system's own, kept between runs: builds and conversions of the model go there.
        scratch: for this run only.
        threads: of the CPU.
        rows: requests in flight at most.
        tokens: prompt and output of one request together, at most.
    """

    model: Path
    gguf: Path
    adapters: dict[str, Path]
    folder: Path
    scratch: Path
    threads: int
    rows: int
    tokens: int
    options: dict[str, str]

    @classmethod
    def parse(cls, plain: dict[str, Any]) -> Job:
        """Read what `as_plain` wrote."""
        paths = {name: Path(plain[name]) for name in ("model", "gguf", "folder", "scratch")}
        adapters = {name: Path(folder) for name, folder in plain["adapters"].items()}
        return cls(**{**plain, **paths, "adapters": adapters})

    def as_plain(self) -> dict[str, Any]:
        """Return it as values that JSON has."""
        plain = {name: str(getattr(self, name)) for name in ("model", "gguf", "folder", "scratch")}
        adapters = {name: str(folder) for name, folder in self.adapters.items()}
        return {**vars(self), **plain, "adapters": adapters}


@dataclass(frozen=True)
class Request:
    """Token ids to go on from, and the adapter's name; empty for the base."""

    prompt: list[int]
    adapter: str


@dataclass(frozen=True)
class Facts:
    """What a started system says of itself; `way` is how requests reach it: in process, or through which server."""

    version: str
    dtype: str
    way: str


class System(Protocol):
    """What a driver puts around a system."""

    def prepare(self, job: Job) -> None:
        """Build or convert what is not there yet; its time is not counted."""

    def start(self, job: Job) -> Facts:
        """Load model and adapters; return when requests can be answered."""

    def run(self, requests: Sequence[Request], max_tokens: int) -> list[list[int]]:
        """Answer all requests at once, greedily, end of sequence ignored; return `max_tokens` new ids for each."""

    def stop(self) -> None:
        """End what `start` began."""


def converse(system: System) -> None:
    """Do what is asked on stdin until it ends.

    `{"prepare": job}` and `{"start": job}` answer with facts, `{"run": [requests], "max_tokens": n}` with the ids and
    the seconds that they took; what fails answers `{"error": text}`.
    """

    def prepare(asked: dict[str, Any]) -> dict[str, Any]:
        system.prepare(Job.parse(asked["prepare"]))
        return {}

    def start(asked: dict[str, Any]) -> dict[str, Any]:
        return vars(system.start(Job.parse(asked["start"])))

    def run(asked: dict[str, Any]) -> dict[str, Any]:
        requests = [Request(**request) for request in asked["run"]]
        started = time.perf_counter()
        tokens = system.run(requests, asked["max_tokens"])
        return {"seconds": time.perf_counter() - started, "tokens": tokens}

    try:
        answer_lines({"prepare": prepare, "start": start, "run": run})
    finally:
        system.stop()


def answer_lines(methods: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Answer each line of stdin with the method that it names, until stdin ends."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        asked = json.loads(line)
        method = next(name for name in methods if name in asked)
        try:
            answer = methods[method](asked)
        except Exception as error:  # a peer's failure of any kind is a result here, not the end
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)
