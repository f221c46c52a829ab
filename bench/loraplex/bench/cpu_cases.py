"""The runs of `loraplex bench cpu`: W16, and what a row, a rank and a long prompt cost beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from loraplex.bench import w16
from loraplex.bench.random_adapter import ModelShape, write_adapter
from loraplex.bench.workload import Assignment, Workload

MANY = 64
ROW_CASES = {1: "rows1", 4: "rows4", 16: "base", 64: "rows64"}
"""Cases without adapters by rows."""
LONG_PROMPT = 512
SHORT_ROWS = 8
SHORT_TOKENS = 8
SHORT_PROMPT = 48


def rank8_name(index: int) -> str:
    """Return the name of adapter `index` of those of rank 8."""
    return f"r8-{index:02d}"


def cpu_cases(short: bool = False) -> dict[str, Workload]:
    """Return the runs by name. A short form goes through the same code with fewer rows and tokens.

    `one_stream` and `same` use an adapter of rank 64; `rank8` to `rank64` are 16 requests over the four adapters of W16
    that have that rank.
    """
    many = SHORT_ROWS if short else MANY
    tokens = SHORT_TOKENS if short else Workload.max_tokens
    prompt = SHORT_PROMPT if short else LONG_PROMPT
    rank8 = tuple(rank8_name(index) for index in range(many))
    w16_names = [w16.adapter_name(index) for index in range(w16.ADAPTERS)]
    cases = {case: w16.workload_of(case) for case in w16.CASES}
    sixteen = min(Workload.requests, many)
    cases["mixed_r8"] = Workload(requests=sixteen, adapters=rank8, assignment=Assignment.DISTINCT)
    cases["one_stream"] = Workload(1, 1, adapters=(w16_names[-1],), assignment=Assignment.IDENTICAL)
    cases["rows64_r8"] = Workload(many, many, adapters=rank8, assignment=Assignment.DISTINCT)
    for rows, name in ROW_CASES.items():
        cases.setdefault(name, Workload(min(rows, many), min(rows, many)))
    for rank in w16.RANKS:
        names = tuple(name for name in w16_names if name.endswith(f"-r{rank}"))
        cases[f"rank{rank}"] = Workload(adapters=names, assignment=Assignment.ROUND_ROBIN)
    cases = {name: replace(case, max_tokens=tokens) for name, case in cases.items()}
    cases["ttft_512"] = Workload(1, 1, prompt_tokens=prompt, max_tokens=1)
    return cases


def make_cpu_adapters(
    root: Path, short: bool, shape: ModelShape | None = None, on_progress: Callable[[int], None] = lambda _: None
) -> list[Path]:
    """Write the adapters that the cases name below `root`; return their folders."""
    folders = w16.make_adapters(root, on_progress, shape)
    for index in range(SHORT_ROWS if short else MANY):
        folder = root / rank8_name(index)
        write_adapter(folder, rank=8, seed=1000 + index, shape=shape)
        folders.append(folder)
        on_progress(len(folders))
    return folders


def adapter_count(short: bool) -> int:
    """Return how many adapters `make_cpu_adapters` writes."""
    return w16.ADAPTERS + (SHORT_ROWS if short else MANY)


def total_tokens(cases: Mapping[str, Workload]) -> int:
    """Return the output tokens of one run of each case."""
    return sum(case.requests * case.max_tokens for case in cases.values())
