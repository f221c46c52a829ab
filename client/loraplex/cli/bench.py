"""`loraplex bench` puts load on a server and measures it from outside; its sub-commands run fixed workloads."""

from __future__ import annotations

import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from loraplex.cli.connection import DEFAULT_SERVER, ServerOption

app = typer.Typer(invoke_without_command=True)

JsonFileOption = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.", dir_okay=False)]


@app.callback()
def bench(
    context: typer.Context,
    server: ServerOption = DEFAULT_SERVER,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.", min=1)] = 16,
    requests: Annotated[int, typer.Option(help="Requests in each run.", min=1)] = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Length of each prompt, about.", min=4)] = 30,
    max_tokens: Annotated[int, typer.Option(help="Output tokens of each request.", min=1)] = 128,
    adapters: Annotated[
        str, typer.Option(help="Names with commas between them (`base` is no adapter), or `all`; default: the base.")
    ] = "",
    assignment: Annotated[
        str, typer.Option(help="Which request names which adapter: round-robin, distinct, identical or zipf.")
    ] = "round-robin",
    repeat: Annotated[int, typer.Option(help="Runs.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of the prompts; each run adds one.")] = 0,
    json_file: JsonFileOption = None,
) -> None:
    """Put load on a server and measure it from outside."""
    if context.invoked_subcommand is not None:
        return
    from loraplex.bench.workload import Assignment, Workload
    from loraplex.cli import bench_run

    names = bench_run.adapter_names(server, adapters)
    try:
        chosen = Assignment(assignment) if names else Assignment.BASE
        workload = Workload(concurrency, requests, prompt_tokens, max_tokens, names, chosen, seed=seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if not bench_run.measure(server, workload, repeat, json_file):
        raise typer.Exit(1)


@app.command()
def w16(
    server: Annotated[str, typer.Option(help="A running server of SmolLM2-135M; default: one is started.")] = "",
    repeat: Annotated[int, typer.Option(help="Runs of each case.", min=1)] = 3,
    cases: Annotated[str, typer.Option(help="Which of them, with commas between.")] = "base,same,mixed",
    model: Annotated[str, typer.Option(help="What the started server serves.")] = "demo",
    quantization: Annotated[str, typer.Option(help="How the started server holds it.")] = "nf4",
    serve_args: Annotated[str, typer.Option(help="More arguments for the started server.")] = "",
    json_file: JsonFileOption = None,
) -> None:
    """Run W16: 16 requests at once for 16 adapters (mixed), for one of them (same), and for the base."""
    from loraplex.bench.w16 import CASES
    from loraplex.cli import bench_run
    from loraplex.cli.termination import sigterm_raises

    chosen = [name.strip() for name in cases.split(",")]
    if unknown := [name for name in chosen if name not in CASES]:
        raise typer.BadParameter(f"no such case: {', '.join(unknown)}", param_hint="--cases")
    arguments = ["--model", model, "--quantization", quantization, *shlex.split(serve_args)]
    with sigterm_raises():
        completed = bench_run.measure_w16(server, arguments, chosen, repeat, json_file)
    if not completed:
        raise typer.Exit(1)


@app.command()
def cpu(
    quantizations: Annotated[str, typer.Option(help="A server for each, with commas between.")] = "nf4,int8",
    repeat: Annotated[int, typer.Option(help="Runs of each case, and counted starts.", min=1)] = 3,
    model: Annotated[str, typer.Option(help="What is served: demo, or a Hugging Face folder.")] = "demo",
    short: Annotated[bool, typer.Option("--short", help="Few rows and tokens, to see that it works.")] = False,
    serve_args: Annotated[str, typer.Option(help="More arguments for the started servers.")] = "",
    output: Annotated[
        Path, typer.Option("--json", help="Write the result here, and a chart beside it.", dir_okay=False)
    ] = Path("bench/results/cpu.json"),
) -> None:
    """Measure W16, rows, ranks, first token, start and memory on servers of this command's own (about 10 minutes)."""
    from loraplex.cli import bench_cpu
    from loraplex.cli.model import with_demo
    from loraplex.cli.termination import sigterm_raises

    names = [name.strip() for name in quantizations.split(",")]
    bench = bench_cpu.CpuBench(Path(with_demo(model)), names, repeat, short, shlex.split(serve_args))
    with sigterm_raises():
        completed = bench_cpu.run(bench, output)
    if not completed:
        raise typer.Exit(1)


@app.command()
def adapters(
    count: Annotated[int, typer.Option("--adapters", help="Registered on the larger server.", min=20)] = 2000,
    repeat: Annotated[int, typer.Option(help="Runs of each server, in turn.", min=1)] = 7,
    in_flight: Annotated[int, typer.Option(help="Requests at a time; the servers have 16 rows.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Of register, use and unregister.", min=1)] = 200,
    model: Annotated[str, typer.Option(help="What is served: demo, or a Hugging Face folder.")] = "demo",
    quantization: Annotated[str, typer.Option(help="How it is held.")] = "nf4",
    short: Annotated[
        bool, typer.Option("--short", help="Few adapters, rows and tokens, to see that it works.")
    ] = False,
    serve_args: Annotated[str, typer.Option(help="More arguments for the started servers.")] = "",
    output: Annotated[Path, typer.Option("--json", help="Write the result here.", dir_okay=False)] = Path(
        "bench/results/adapters.json"
    ),
) -> None:
    """Compare 2,000 adapters with 5 under the same load, in small memory budgets (about 10 minutes)."""
    from loraplex.bench.adapters import AdapterBench
    from loraplex.cli import bench_adapters
    from loraplex.cli.model import with_demo
    from loraplex.cli.termination import sigterm_raises

    chosen = AdapterBench(
        Path(with_demo(model)),
        quantization,
        adapters=count,
        repeat=repeat,
        in_flight=in_flight,
        rounds=rounds,
        serve_args=tuple(shlex.split(serve_args)),
    )
    with sigterm_raises():
        held = bench_adapters.run(chosen.shortened() if short else chosen, output)
    if not held:
        raise typer.Exit(1)


@app.command("merge")
def merge_(
    repeat: Annotated[int, typer.Option(help="Runs without and with a merge, in turn.", min=1)] = 5,
    tokens: Annotated[int, typer.Option(help="Output tokens of each of the 16 requests.", min=1)] = 256,
    model: Annotated[str, typer.Option(help="What is served: demo, or a Hugging Face folder.")] = "demo",
    quantization: Annotated[str, typer.Option(help="How it is held; merges are into its dequantized weights.")] = "nf4",
    serve_args: Annotated[str, typer.Option(help="More arguments for the started server.")] = "",
    output: Annotated[Path, typer.Option("--json", help="Write the result here.", dir_okay=False)] = Path(
        "bench/results/merge.json"
    ),
) -> None:
    """Measure what a merge costs the requests that are served beside it (about 5 minutes)."""
    from loraplex.bench.merge_cost import MergeBench
    from loraplex.bench.w16 import adapter_name
    from loraplex.cli import bench_merge
    from loraplex.cli.model import with_demo
    from loraplex.cli.termination import sigterm_raises

    base = "full-precision" if quantization == "none" else "dequantized"
    chosen = MergeBench(adapter_name(0), base, repeat, tokens)
    arguments = ["--quantization", quantization, *shlex.split(serve_args)]
    with sigterm_raises():
        completed = bench_merge.run(Path(with_demo(model)), arguments, chosen, output)
    if not completed:
        raise typer.Exit(1)


@app.command()
def peers(
    rounds: Annotated[int, typer.Option(help="Runs of each case on each system.", min=1)] = 3,
    systems: Annotated[
        str, typer.Option(help="Folder names of peers with commas between, or all: peft, vllm, openvino, llama.cpp.")
    ] = "all",
    quantizations: Annotated[str, typer.Option(help="Of our servers, with commas between.")] = "nf4,int8",
    threads: Annotated[int, typer.Option(help="CPU threads of every system; 0 is all of them.", min=0)] = 0,
    torch_index: Annotated[
        str, typer.Option(help="One more package index, with CPU-only builds of torch.", envvar="TORCH_INDEX")
    ] = "",
    cache: Annotated[
        Path | None, typer.Option(help="Where the peers are installed; default: below the cache folder.")
    ] = None,
    output: Annotated[Path, typer.Option("--json", help="Write the list of systems here.", dir_okay=False)] = Path(
        "bench/results/peers.json"
    ),
    chart: Annotated[Path, typer.Option(help="Draw base and mixed throughput here.", dir_okay=False)] = Path(
        "bench/results/peers.png"
    ),
) -> None:
    """Run W16 on other systems and on ours, in turn, and check every answer against PEFT (about 40 minutes)."""
    import os

    from loraplex.bench.peers.peer import PEERS, ours
    from loraplex.cli import bench_peers
    from loraplex.cli.model import DEMO, with_demo
    from loraplex.cli.termination import sigterm_raises
    from loraplex.server.models.demo import cache_root, demo_gguf_path

    known = {peer.folder: peer for peer in PEERS}
    names = list(known) if systems == "all" else [name.strip() for name in systems.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"no such system: {', '.join(unknown)}", param_hint="--systems")
    own = [ours(name.strip(), version("loraplex")) for name in quantizations.split(",") if name.strip()]
    bench = bench_peers.PeersBench(
        peers=[*own, *(known[name] for name in names)],
        cache=(cache or cache_root() / "bench" / "peers").resolve(),
        model=Path(with_demo(DEMO)),
        gguf=demo_gguf_path(),
        rounds=rounds,
        threads=threads or len(os.sched_getaffinity(0)),
        torch_index=torch_index,
    )
    with sigterm_raises():
        held = bench_peers.run(bench, output, chart)
    if not held:
        raise typer.Exit(1)


@app.command()
def quality(
    quantizations: Annotated[str, typer.Option(help="What to compare with float32, with commas between.")] = (
        "none,int8,nf4"
    ),
    tokens: Annotated[int, typer.Option(help="Of each of the 16 windows of the text.", min=2)] = 256,
    model: Annotated[str, typer.Option(help="demo, or a Hugging Face folder.")] = "demo",
    output: Annotated[Path, typer.Option("--json", help="Write the result here.", dir_okay=False)] = Path(
        "bench/results/quality.json"
    ),
) -> None:
    """Measure perplexity and divergence of the quantizations against float32, on a fixed text (about two minutes)."""
    from loraplex.bench.quality import measure_quality, quality_table
    from loraplex.cli.bench_run import rate_bar, write_result
    from loraplex.cli.model import with_demo
    from loraplex.cli.output import to_stdout

    names = [name.strip() for name in quantizations.split(",")]
    with rate_bar() as bar:
        task = bar.add_task("steps", total=tokens - 1)
        document = measure_quality(
            Path(with_demo(model)), names, length=tokens, on_step=lambda done: bar.update(task, completed=done)
        )
    to_stdout().print(quality_table(document))
    write_result(document, output)


@app.command()
def growth(
    quantization: Annotated[str, typer.Option(help="How the model is held.")] = "int8",
    repeat: Annotated[int, typer.Option(help="Runs of each point.", min=1)] = 2,
    most: Annotated[int, typer.Option(help="Rows and adapters of the largest point.", min=4)] = 128,
    tokens: Annotated[int, typer.Option(help="Output tokens of each request.", min=1)] = 64,
    model: Annotated[str, typer.Option(help="What is served: demo, or a Hugging Face folder.")] = "demo",
    serve_args: Annotated[str, typer.Option(help="More arguments for the started server.")] = "",
    output: Annotated[
        Path, typer.Option("--json", help="Write the result here, and a chart beside it.", dir_okay=False)
    ] = Path("bench/results/growth.json"),
) -> None:
    """Measure how a step grows with rows, distinct adapters, rank and context (about 10 minutes)."""
    from loraplex.cli import bench_growth
    from loraplex.cli.model import with_demo
    from loraplex.cli.termination import sigterm_raises

    bench = bench_growth.GrowthBench(
        Path(with_demo(model)), quantization, repeat, most, tokens, shlex.split(serve_args)
    )
    with sigterm_raises():
        completed = bench_growth.run(bench, output)
    if not completed:
        raise typer.Exit(1)


@app.command()
def roofline(
    output: Annotated[Path, typer.Option("--json", help="Write the result here.", dir_okay=False)] = Path(
        "bench/results/roofline.json"
    ),
) -> None:
    """Measure how fast this machine reads and multiplies, and what that allows for a step of W16 (seconds)."""
    from loraplex.bench.roofline import measure_roofline, roofline_table, step_bounds
    from loraplex.cli.bench_run import write_result
    from loraplex.cli.output import to_stderr, to_stdout

    with to_stderr().status("measuring"):
        measured = measure_roofline()
    document = {**measured, "step_bounds_ms": step_bounds(measured)}
    to_stdout().print(roofline_table(document))
    write_result(document, output)
