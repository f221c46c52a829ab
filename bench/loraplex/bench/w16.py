"""W16, the reference workload: 16 requests for 16 adapters on SmolLM2-135M, beside one adapter and none.

16 concurrent requests, prompts of about 30 tokens, 128 new tokens each, greedy, end of sequence ignored. The adapters
have ranks 8, 16, 32 and 64 in turn on all seven projections. Their weights are random: speed does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraplex.bench.load import run_load
from loraplex.bench.random_adapter import ModelShape, write_adapter
from loraplex.bench.report import Report
from loraplex.bench.workload import Assignment, Workload
from loraplex.client import AsyncClient

RANKS = (8, 16, 32, 64)
ADAPTERS = 16
CASES: Mapping[str, Assignment] = {
    "base": Assignment.BASE,
    "same": Assignment.IDENTICAL,
    "mixed": Assignment.DISTINCT,
}
"""No adapter; one adapter for all requests; another adapter for each."""
WARM_UP_TOKENS = 8


def adapter_name(index: int) -> str:
    """Return the name of adapter `index`, which says its rank."""
    return f"w16-{index:02d}-r{RANKS[index % len(RANKS)]}"


def make_adapters(
    root: Path, on_progress: Callable[[int], None] = lambda _: None, shape: ModelShape | None = None
) -> list[Path]:
    """Write the adapters below `root` and return their folders; `on_progress` hears how many there are."""
    folders = []
    for index in range(ADAPTERS):
        folder = root / adapter_name(index)
        write_adapter(folder, RANKS[index % len(RANKS)], seed=index, shape=shape)
        folders.append(folder)
        on_progress(index + 1)
    return folders


def workload_of(case: str, seed: int = 0) -> Workload:
    """Return one case of W16; "same" takes a largest adapter.

    Raises:
        ValueError: for an unknown case.
    """
    if case not in CASES:
        raise ValueError(f"unknown case {case!r}: choose from {', '.join(CASES)}")
    names = tuple(adapter_name(index) for index in range(ADAPTERS))
    adapters = {"base": (), "same": names[-1:], "mixed": names}[case]
    return Workload(adapters=adapters, assignment=CASES[case], seed=seed)


async def run_cases(
    client: AsyncClient,
    cases: Sequence[str],
    repeat: int,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> dict[str, list[Report]]:
    """Run each case `repeat` times and return the reports by case; `on_tokens` hears of tokens as they come.

    The cases take turns, so that whatever else the machine does meets all of them. A short run of each comes first and
    is not counted: it brings the adapters onto the device and the kernels into shape.
    """
    for case in cases:
        await run_load(client, replace(workload_of(case, seed=-1), max_tokens=WARM_UP_TOKENS))
    reports: dict[str, list[Report]] = {case: [] for case in cases}
    for repetition in range(repeat):
        for case in cases:
            reports[case].append(Report.of(await run_load(client, workload_of(case, repetition), on_tokens)))
    return reports


async def upload_adapters(
    client: AsyncClient, folders: Sequence[Path], on_progress: Callable[[int], None] = lambda _: None
) -> None:
    """Register the adapters in `folders` under their folders' names, wherever the server runs."""
    for number, folder in enumerate(folders):
        await client.upload_adapter(folder.name, folder)
        on_progress(number + 1)


async def server_summary(client: AsyncClient) -> dict[str, Any]:
    """Return what of the server's description belongs beside a measurement: no paths."""
    info = await client.server_info()
    names = ("version", "architecture", "quantization", "dtype", "device", "max_num_seqs", "kv_blocks", "kv_block_size")
    return {name: getattr(info, name) for name in (*names, "adapter_device_memory_bytes", "vocab_size")}
