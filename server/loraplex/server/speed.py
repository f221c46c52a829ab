"""How fast our engine answers with base and adapter apart, and with the merged model: both alike, in turn.

`python -m loraplex.server.speed SETTINGS` is a program as `loraplex.adapters.speed_command` describes it. The settings
say how a server holds the base; the merged model is held in the same way. All prompts are answered at once, greedily.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from loraplex.adapters.binding import BoundAdapter, bind
from loraplex.adapters.formats import read_adapter
from loraplex.adapters.speed_command import SpeedFigures, SpeedJob
from loraplex.server.config import EngineConfig, ModelConfig
from loraplex.server.engine.build import build_engine
from loraplex.server.engine.client import EngineClient
from loraplex.server.engine.request import GenerationRequest, SamplingParams
from loraplex.server.engine.stats import NullObserver
from loraplex.server.errors import LoraplexError
from loraplex.server.models.loader import load_model
from loraplex.server.tokenizer import Tokenizer

RUNS = 3
TOKENS = 48
_PROMPT_TOKENS = 64
_CONTEXT = 256


@dataclass(frozen=True)
class SpeedSettings:
    """How the models are held, as in `ModelConfig`, and the threads that compute (0: PyTorch's choice)."""

    quantization: str = "none"
    dtype: str = "auto"
    device: str = "cpu"
    weight_execution: str = "auto"
    threads: int = 0

    @classmethod
    def of(cls, config: ModelConfig, threads: int) -> SpeedSettings:
        """Take the settings of a server."""
        return cls(config.quantization, config.dtype, config.device, config.weight_execution, threads)

    def command(self) -> tuple[str, ...]:
        """Return the program that measures with these settings."""
        return (sys.executable, "-P", "-m", "loraplex.server.speed", json.dumps(asdict(self)))


@dataclass(frozen=True)
class _Run:
    """One run: its seconds, and for each request the time of each token since the start."""

    duration_s: float
    token_times: Sequence[Sequence[float]]


@dataclass(frozen=True)
class _Side:
    """A model that answers: its engine, the prompts' tokens, the adapter if there is one, and tokens to answer."""

    engine: EngineClient
    prompts: Sequence[tuple[int, ...]]
    adapter: BoundAdapter | None
    scale: float
    tokens: int


async def measure(
    job: SpeedJob, settings: SpeedSettings, progress: Callable[[int, int], None]
) -> tuple[SpeedFigures, SpeedFigures]:
    """Return the figures of the unmerged and of the merged side: medians of three runs, after one that warms up.

    The sides take turns, so that whatever else the machine does meets both; both models are in memory meanwhile.

    Raises:
        LoraplexError: if one of the models or the adapter cannot be served.
    """
    async with AsyncExitStack() as stack:
        unmerged = await stack.enter_async_context(_serving(job.model, job.adapter, job, settings))
        merged = await stack.enter_async_context(_serving(job.merged, None, job, settings))
        runs: tuple[list[_Run], list[_Run]] = ([], [])
        for number in range(RUNS + 1):
            for side, own in zip((unmerged, merged), runs, strict=True):
                own.append(await _run(side, number))
                progress(len(runs[0]) + len(runs[1]), 2 * (RUNS + 1))
    return _figures("unmerged", runs[0][1:]), _figures("merged", runs[1][1:])


@asynccontextmanager
async def _serving(folder: Path, adapter: Path | None, job: SpeedJob, settings: SpeedSettings) -> AsyncIterator[_Side]:
    model = load_model(
        str(folder),
        quantization=_quantization(folder, settings.quantization),
        dtype=settings.dtype,
        device=settings.device,
        weight_execution=settings.weight_execution,
    )
    bound = None if adapter is None else bind(read_adapter(adapter), model.base)
    tokenizer = Tokenizer.load(model.path)
    context = min(_CONTEXT, model.max_model_len)
    rows = len(job.prompts)
    config = EngineConfig(max_num_seqs=rows, max_num_batched_tokens=max(512, rows), max_model_len=context)
    prompts = [tuple(tokenizer.encode(text)[: min(_PROMPT_TOKENS, context // 2)]) for text in job.prompts]

    def load(digest: str) -> BoundAdapter:
        assert bound is not None
        return bound

    engine = EngineClient(lambda publish: build_engine(model, tokenizer, config, load, NullObserver(), publish))
    engine.start()
    try:
        yield _Side(engine, prompts, bound, job.scale, min(TOKENS, context // 2))
    finally:
        await engine.close()


async def _run(side: _Side, number: int) -> _Run:
    started = time.perf_counter()

    async def answer(index: int, prompt: tuple[int, ...]) -> list[float]:
        request = GenerationRequest(
            f"{number}-{index}",
            prompt,
            SamplingParams(max_tokens=side.tokens, ignore_eos=True, seed=0),
            adapter_digest=None if side.adapter is None else side.adapter.digest,
            adapter_scale=side.scale if side.adapter is not None else 1.0,
            # No run finds the prompts of the one before.
            cache_salt=str(number),
        )
        times: list[float] = []
        async for output in side.engine.generate(request):
            times += [time.perf_counter() - started] * sum(len(choice.token_ids) for choice in output.choices)
        return times

    times = await asyncio.gather(*(answer(index, prompt) for index, prompt in enumerate(side.prompts)))
    return _Run(time.perf_counter() - started, times)


def _figures(name: str, runs: Sequence[_Run]) -> SpeedFigures:
    rates = [sum(len(times) for times in run.token_times) / run.duration_s for run in runs]
    first = [times[0] for run in runs for times in run.token_times]
    between = [later - earlier for run in runs for times in run.token_times for earlier, later in pairwise(times)]
    return SpeedFigures(
        name,
        statistics.median(rates),
        1000 * statistics.median(first),
        1000 * statistics.median(between),
    )


def _quantization(folder: Path, wanted: str) -> str:
    """Return what to ask the loader for: a merged model that is stored quantized is held as it is."""
    stored = json.loads((folder / "config.json").read_bytes()).get("quantization_config")
    return "none" if stored else wanted


def main() -> int:
    """Measure what standard input describes, with the settings of the first argument; return the exit status."""
    # Whatever the libraries print, the reader gets JSON alone.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(**event: object) -> None:
        print(json.dumps(event), file=out, flush=True)

    settings = SpeedSettings(**json.loads(sys.argv[1]))
    job = SpeedJob.from_json(json.load(sys.stdin))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        figures = asyncio.run(measure(job, settings, lambda done, total: tell(done=done, total=total)))
    except LoraplexError as error:
        tell(error=str(error))
        return 1
    tell(speed=[asdict(each) for each in figures])
    return 0


if __name__ == "__main__":
    sys.exit(main())
