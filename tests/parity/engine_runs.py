"""Drives a real engine step by step, on the test's own thread, and keeps what it publishes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from loraplex.adapters.binding import BaseModel, BoundAdapter, bind
from loraplex.adapters.formats import read_adapter
from loraplex.server.config import EngineConfig
from loraplex.server.engine.build import build_engine
from loraplex.server.engine.commands import AddRequest, PinAdapter, Stop
from loraplex.server.engine.engine import Engine, EngineOutput
from loraplex.server.engine.request import ChoiceDelta, FinishReason, GenerationRequest, Logprobs, RequestOutput
from loraplex.server.engine.stats import LoadStats, MemoryStats, NullObserver, RequestStats, StepStats
from loraplex.server.errors import LoraplexError
from loraplex.server.models.loader import LoadedModel
from loraplex.server.tokenizer import Tokenizer

_PATIENCE_S = 240.0


class Outputs:
    """What the engine has published, by request."""

    def __init__(self) -> None:
        self._by_request: dict[str, list[RequestOutput]] = {}

    def __call__(self, outputs: Sequence[EngineOutput]) -> None:
        for output in outputs:
            if isinstance(output, RequestOutput):
                self._by_request.setdefault(output.request_id, []).append(output)

    def tokens(self, request_id: str, choice: int = 0) -> list[int]:
        return [token for delta in self._deltas(request_id, choice) for token in delta.token_ids]

    def text(self, request_id: str, choice: int = 0) -> str:
        return "".join(delta.text for delta in self._deltas(request_id, choice))

    def logprobs(self, request_id: str, choice: int = 0) -> list[Logprobs]:
        return [entry for delta in self._deltas(request_id, choice) for entry in delta.logprobs]

    def finish_reason(self, request_id: str, choice: int = 0) -> FinishReason | None:
        return next((d.finish_reason for d in self._deltas(request_id, choice) if d.finish_reason), None)

    def finished(self, request_id: str) -> bool:
        return any(output.finished for output in self._by_request.get(request_id, ()))

    def error(self, request_id: str) -> LoraplexError | None:
        return next((o.error for o in self._by_request.get(request_id, ()) if o.error is not None), None)

    def _deltas(self, request_id: str, choice: int) -> list[ChoiceDelta]:
        return [d for o in self._by_request.get(request_id, ()) for d in o.choices if d.index == choice]


class Recorder(NullObserver):
    """Keeps what the engine tells its observer."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.requests: list[RequestStats] = []
        self.memory: MemoryStats | None = None

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_request(self, stats: RequestStats) -> None:
        self.requests.append(stats)

    def on_memory(self, stats: MemoryStats, loads: Sequence[LoadStats]) -> None:
        self.memory = stats


class EngineRun:
    """An engine with its outputs and its observer."""

    def __init__(self, engine: Engine, outputs: Outputs, recorder: Recorder) -> None:
        self.engine = engine
        self.outputs = outputs
        self.recorder = recorder

    def step(self) -> None:
        """Do one step; give a load in the background a moment where there was nothing to run."""
        if not self.engine.step():
            time.sleep(0.0002)

    def make_resident(self, digests: Sequence[str]) -> None:
        """Pin adapters and wait until all of them are loaded."""
        for digest in digests:
            self.engine.submit(PinAdapter(digest))
        self._step_until(lambda: self.engine.resident >= set(digests), "the adapters are not resident")

    def finish(self, *requests: GenerationRequest) -> None:
        """Add `requests` together and step until nothing is left to do."""
        for request in requests:
            self.engine.submit(AddRequest(request))
        self.step()
        self._step_until(lambda: not self.engine.has_work, "the engine still has work")

    def check_integrity(self) -> None:
        parts = self.engine._parts
        parts.blocks.check_integrity(list(parts.scheduler.sequences()))
        parts.slots.check_integrity()

    def _step_until(self, done: Callable[[], bool], problem: str) -> None:
        end = time.monotonic() + _PATIENCE_S
        while not done():
            if time.monotonic() > end:
                pytest.fail(f"{problem} after {_PATIENCE_S} s")
            self.step()


@contextmanager
def running_engine(
    model: LoadedModel, tokenizer: Tokenizer, config: EngineConfig, load: Callable[[str], BoundAdapter]
) -> Iterator[EngineRun]:
    """Yield an engine, and stop it in the end."""
    outputs, recorder = Outputs(), Recorder()
    engine = build_engine(model, tokenizer, config, load, recorder, outputs)
    try:
        yield EngineRun(engine, outputs, recorder)
    finally:
        engine.submit(Stop())
        engine.run()


def bound_adapters(folders: Mapping[str, Path], base: BaseModel) -> dict[str, BoundAdapter]:
    """Read and bind the adapter in each folder; by name."""
    return {name: bind(read_adapter(folder), base) for name, folder in folders.items()}
