"""Times the CPU kernels at the shapes of SmolLM2-135M: `python -m loraplex.bench.kernels`.

One line is the work of all 30 layers in one decode step, each layer with weights and cache of its own, so that they
come from memory as they do when serving. "in step" is the same between the base model's float32 matrix products,
those products taken off: what waking threads and displacing each other's data costs is in it. "torch" is a loop
over segments, or torch's fused attention over a dense float32 cache. GB/s counts each adapter once a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from loraplex.adapters.binding import BoundAdapter, ModuleWeights
from loraplex.server.attention.cpu import CpuAttention
from loraplex.server.attention.interface import AttentionParams
from loraplex.server.engine.batch import Batch
from loraplex.server.engine.kv_cache import KVCache, KVCacheShape
from loraplex.server.lora.base import BaseParameters
from loraplex.server.lora.ops.cpu import CpuLoraOps
from loraplex.server.lora.ops.reference import ReferenceLoraOps
from loraplex.server.lora.packing import pack_adapter
from loraplex.server.lora.segments import Segment, build_segments
from loraplex.server.lora.weights import LinearSite, PackedAdapter
from loraplex.server.models.linear import DenseLinear

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 576, 1536, 30, 9, 3, 64
CONTEXT, BLOCK = 160, 16
ADAPTERS = 16
RANKS = {"8": (8,), "8-64": (8, 16, 32, 64)}
DORA = ("8-64",)  # also timed with DoRA's factors
ROWS = (1, 4, 16, 64)


@dataclass(frozen=True)
class Line:
    """Milliseconds a step, and the bytes that it must read."""

    what: str
    dtype: torch.dtype
    rows: int
    alone_ms: float
    in_step_ms: float | None
    loop_ms: float | None
    nbytes: int

    def cells(self) -> list[str]:
        """Return the line's columns as text."""
        times = [f"{ms:.2f}" if ms is not None else "-" for ms in (self.alone_ms, self.in_step_ms, self.loop_ms)]
        name = str(self.dtype).removeprefix("torch.")
        return [self.what, name, str(self.rows), *times, f"{self.nbytes / self.alone_ms / 1e6:.1f}"]


HEADER = ["what", "weights", "rows", "ms", "in step ms", "torch ms", "GB/s"]


def model_sites() -> tuple[LinearSite, ...]:
    """Return the four packed products of each layer."""
    sites: list[LinearSite] = []
    for i in range(LAYERS):
        kv, packed = KV_HEADS * HEAD_DIM, HIDDEN + 2 * KV_HEADS * HEAD_DIM
        qkv = {f"{i}.q": (0, HIDDEN), f"{i}.k": (HIDDEN, HIDDEN + kv), f"{i}.v": (HIDDEN + kv, packed)}
        gate_up = {f"{i}.gate": (0, INTERMEDIATE), f"{i}.up": (INTERMEDIATE, 2 * INTERMEDIATE)}
        sites += [
            LinearSite(f"{i}.qkv", HIDDEN, packed, qkv),
            LinearSite(f"{i}.o", HIDDEN, HIDDEN, {f"{i}.o": (0, HIDDEN)}),
            LinearSite(f"{i}.gate_up", HIDDEN, 2 * INTERMEDIATE, gate_up),
            LinearSite(f"{i}.down", INTERMEDIATE, HIDDEN, {f"{i}.down": (0, HIDDEN)}),
        ]
    return tuple(sites)


def random_adapter(
    sites: Sequence[LinearSite], rank: int, dtype: torch.dtype, base: BaseParameters | None
) -> PackedAdapter:
    """Return an adapter for all modules; with a base, a DoRA."""
    modules = {
        name: ModuleWeights(
            torch.randn(rank, site.in_features),
            torch.randn(end - start, rank),
            1e-3,
            magnitude=None if base is None else torch.rand(end - start),
        )
        for site in sites
        for name, (start, end) in site.targets.items()
    }
    return pack_adapter(BoundAdapter(f"random-{rank}", modules), sites, dtype, torch.device("cpu"), base)


def median_ms(function: Callable[[], None], repetitions: int) -> float:
    """Return the median time of one call, in milliseconds, after one that does not count."""
    function()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def difference_ms(with_it: Callable[[], None], without: Callable[[], None], repetitions: int) -> float:
    """Return the median difference of alternating calls, in milliseconds."""
    return statistics.median(median_ms(with_it, 1) - median_ms(without, 1) for _ in range(repetitions))


def lora_line(
    ranks: str,
    dtype: torch.dtype,
    rows: int,
    sites: Sequence[LinearSite],
    base: Sequence[torch.Tensor],
    repetitions: int,
    *,
    dora: bool = False,
) -> Line:
    """Time all sites of a decode step whose rows name up to 16 adapters in turn."""
    weights = [DenseLinear(weight) for weight in base]
    known = BaseParameters(weights, {}, torch.float32, {}, {"embedding": (1, 1)}, "embedding") if dora else None
    of_adapter = [RANKS[ranks][i % len(RANKS[ranks])] for i in range(min(rows, ADAPTERS))]
    slots = {i: random_adapter(sites, rank, dtype, known) for i, rank in enumerate(of_adapter)}
    segments: tuple[Segment, ...] = build_segments(sorted((1, row % ADAPTERS, 1.0) for row in range(rows)))
    inputs = {size: torch.randn(rows, size) for size in {site.in_features for site in sites}}
    outputs = {size: torch.zeros(rows, size) for size in {site.out_features for site in sites}}

    def run(ops: CpuLoraOps | ReferenceLoraOps | None, products: bool) -> None:
        prepared = ops.prepare(segments, slots) if ops is not None else None
        for index, site in enumerate(sites):
            x, y = inputs[site.in_features], outputs[site.out_features]
            if products:
                torch.mm(x, base[index].T, out=y)
            if ops is not None:
                ops.add(y, x, index, prepared)

    kernel, loop = CpuLoraOps(), ReferenceLoraOps()
    return Line(
        f"{'DoRA' if dora else 'LoRA'} rank {ranks}",
        dtype,
        rows,
        median_ms(lambda: run(kernel, False), repetitions),
        difference_ms(lambda: run(kernel, True), lambda: run(None, True), repetitions),
        median_ms(lambda: run(loop, False), max(1, repetitions // 4)),
        sum(slots[segment.slot].nbytes for segment in segments),
    )


def decode_batch(rows: int) -> Batch:
    """Return one new token for each row, at the end of a context that lies anywhere in the cache."""
    blocks = -(-CONTEXT // BLOCK)
    tables = torch.randperm(rows * blocks).view(rows, blocks).to(torch.int32)
    last = CONTEXT - 1
    return Batch(
        token_ids=torch.zeros(rows, dtype=torch.int64),
        positions=torch.full((rows,), last),
        slot_mapping=tables[:, last // BLOCK].long() * BLOCK + last % BLOCK,
        query_start=torch.arange(rows + 1, dtype=torch.int32),
        context_lens=torch.full((rows,), CONTEXT, dtype=torch.int32),
        block_tables=tables,
        logits_indices=torch.arange(rows),
        num_decodes=rows,
        query_lens_cpu=(1,) * rows,
        context_lens_cpu=(CONTEXT,) * rows,
        lora=None,
    )


def attention_line(dtype: torch.dtype, rows: int, repetitions: int) -> Line:
    """Time decode attention of all layers, writing the new keys and values included."""
    shape = KVCacheShape(LAYERS, KV_HEADS, HEAD_DIM, BLOCK, dtype)
    cache = KVCache(shape, rows * -(-CONTEXT // BLOCK), torch.device("cpu"))
    batch, params, attention = decode_batch(rows), AttentionParams(HEAD_DIM**-0.5), CpuAttention()
    q, k = torch.randn(rows, HEADS, HEAD_DIM), torch.randn(rows, KV_HEADS, HEAD_DIM)
    dense = [torch.randn(2, rows, KV_HEADS, CONTEXT, HEAD_DIM) for _ in range(LAYERS)]

    def run() -> None:
        for layer in cache.layers:
            attention(q, k, k, layer, batch, params)

    def run_torch() -> None:
        for keys, values in dense:
            torch.nn.functional.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)

    nbytes = rows * CONTEXT * shape.block_bytes // BLOCK
    loop_ms = median_ms(run_torch, repetitions)
    return Line(f"attention {CONTEXT} tokens", dtype, rows, median_ms(run, repetitions), None, loop_ms, nbytes)


def print_table(rows: Iterable[Sequence[str]]) -> None:
    """Print left-justified names and right-justified numbers, each line as soon as it is there."""
    for cells in rows:
        name, *numbers = cells
        print(f"{name:<22}" + "".join(f"{cell:>12}" for cell in numbers), flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m loraplex.bench.kernels", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sites = model_sites()
    base = [torch.randn(site.out_features, site.in_features) for site in sites]
    print_table([HEADER])
    for dtype in (torch.float32, torch.bfloat16):
        for rows in arguments.rows:
            for ranks in RANKS:
                print_table([lora_line(ranks, dtype, rows, sites, base, arguments.repetitions).cells()])
            for ranks in DORA:
                print_table([lora_line(ranks, dtype, rows, sites, base, arguments.repetitions, dora=True).cells()])
            print_table([attention_line(dtype, rows, arguments.repetitions).cells()])


if __name__ == "__main__":
    main()
