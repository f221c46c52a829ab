"""The figures of the GPU's targets, measured on the server's own runner, captured steps and engine.

A step is timed from the scheduler's decision to the chosen tokens on the host; what is compared is timed in turn.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.bench.gpu.random_model import random_model
from loraplex.bench.gpu.stage import Captured, Stage, attention_kernels, random_adapter, step
from loraplex.bench.gpu.step_model import ALL_LINEAR, DecoderShape
from loraplex.server.engine.graphed_forward import CaptureBudget
from loraplex.server.engine.sequence import Sequence as EngineSequence
from loraplex.server.lora.weights import PackedAdapter
from loraplex.server.models.loader import LoadedModel


@dataclass(frozen=True)
class BenchSize:
    """What is measured: rows, their context, how often a step is repeated, and what the many adapters get."""

    rows: int = 32
    context: int = 512
    repeat: int = 30
    peft_repeat: int = 3
    adapters: int = 2000
    requests: int = 640
    max_tokens: int = 48

    @property
    def few(self) -> int:
        """Adapters of the smaller mixed step."""
        return self.rows // 4


SHORT = BenchSize(rows=4, context=40, repeat=2, peft_repeat=1, adapters=100, requests=8, max_tokens=3)
"""To see on a CPU that all of it works."""


@dataclass(frozen=True)
class Timed:
    """One way to run a step: its rows, and the adapters in their slots."""

    rows: Sequence[EngineSequence]
    slots: Mapping[int, PackedAdapter]


def measure_steps(shape: DecoderShape, device: torch.device, size: BenchSize) -> dict[str, Any]:
    """Return milliseconds of the steps of the targets, and what follows from them."""
    found = _nf4_steps(shape, device, size)
    _free(device)
    bfloat16 = _bfloat16_ms(shape, device, size)
    _free(device)
    ms = found["steps_ms"]
    ms["32 rows, weights in bfloat16"] = bfloat16
    return found | {
        "step_1_row_ms": ms["1 row"],
        "step_32_rows_ms": ms["32 rows"],
        "nf4_over_bfloat16": ms["32 rows"] / bfloat16,
        "lora_8_adapters_ms": ms["8 adapters of rank 16"] - ms["32 rows"],
        "lora_32_adapters_ms": ms["32 adapters of rank 16"] - ms["32 rows"],
        "mixed_over_base_percent": 100 * ms["32 rows"] / ms["32 adapters of rank 8 on q and v"],
    }


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16; float32 on a CPU, where Triton's interpreter has no bfloat16 to rely on."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _nf4_steps(shape: DecoderShape, device: torch.device, size: BenchSize) -> dict[str, Any]:
    """Return the NF4 steps' milliseconds, and what capturing them took; what they are made of goes with this call."""
    model = random_model(shape, "nf4", attention_kernels(), device, dtype=compute_dtype(device))
    stage = Stage(model, size.rows, size.context)
    captured = stage.capture(CaptureBudget(max_seconds=90))
    cases = _cases(stage, model, size)
    ms = _in_turn(cases, _runner(captured), size.repeat)
    eager = _in_turn({"": cases["32 rows"]}, lambda each: step(stage.eager, each.rows, dict(each.slots)), 5)
    report = captured.report
    return {
        "steps_ms": ms | {"32 rows, not captured": eager[""]},
        "replayed_steps": captured.forward.replays,
        "nf4_product": type(model.decoder.linears[0]).__name__,
        "weight_bytes": model.weight_bytes,
        "capturing": {"steps": len(report.shapes), "seconds": round(report.seconds, 1), "bytes": report.nbytes},
    }


def _cases(stage: Stage, model: LoadedModel, size: BenchSize) -> dict[str, Timed]:
    rank16 = {i: random_adapter(model, 16, ALL_LINEAR, i) for i in range(size.rows)}
    rank8 = {i: random_adapter(model, 8, ("q", "v"), i) for i in range(size.rows)}
    rows = range(size.rows)
    return {
        "1 row": Timed(_rows(stage, [None], size), {}),
        "32 rows": Timed(_rows(stage, [None for _ in rows], size), {}),
        "8 adapters of rank 16": Timed(_rows(stage, [row % size.few for row in rows], size), rank16),
        "32 adapters of rank 16": Timed(_rows(stage, list(rows), size), rank16),
        "32 adapters of rank 8 on q and v": Timed(_rows(stage, list(rows), size), rank8),
    }


def _bfloat16_ms(shape: DecoderShape, device: torch.device, size: BenchSize) -> float:
    model = random_model(shape, "bfloat16", attention_kernels(), device, dtype=compute_dtype(device))
    stage = Stage(model, size.rows, size.context)
    captured = stage.capture(CaptureBudget(max_seconds=20))
    timed = Timed(_rows(stage, [None] * size.rows, size), {})
    return _in_turn({"step": timed}, _runner(captured), size.repeat)["step"]


def _rows(stage: Stage, slots: Sequence[int | None], size: BenchSize) -> list[EngineSequence]:
    """Return rows whose next token is the last of their context."""
    vocab = stage.model.vocab_size
    prompts = [[(row * 97 + at) % vocab for at in range(size.context)] for row in range(len(slots))]
    seqs = stage.sequences(prompts, slots)
    for seq in seqs:
        seq.num_computed_tokens = size.context - 1
    return seqs


def _runner(captured: Captured) -> Callable[[Timed], object]:
    return lambda each: step(captured.runner, each.rows, dict(each.slots))


def _in_turn(cases: Mapping[str, Timed], run: Callable[[Timed], object], repeat: int) -> dict[str, float]:
    """Return the median milliseconds of each case, all run in turn; two turns first do not count."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeat + 2):
        for name, case in cases.items():
            started = time.perf_counter()
            run(case)  # the tokens come back to the host: nothing is left on the device's list
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: round(statistics.median(each), 4) for name, each in times.items()}


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
