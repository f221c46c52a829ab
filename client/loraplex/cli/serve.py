"""`loraplex serve`: options to a ServerConfig, then the server until a signal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loraplex.adapters.sources import SourcePolicy
from loraplex.cli.model import with_demo
from loraplex.cli.sizes import format_size, parse_size
from loraplex.server.config import EngineConfig, ModelConfig, ServerConfig

if TYPE_CHECKING:
    from loraplex.server.rpc.server import Server

_MODEL, _ADAPTERS, _NETWORK, _ENGINE = "Model", "Adapters", "Network", "Engine"
Quantization = Literal["none", "nf4", "fp4", "int8"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LogLevel = Literal["debug", "info", "warning", "error"]


def serve(
    model: Annotated[
        str, typer.Option(help="Hub id, Hugging Face folder, GGUF file, or demo.", rich_help_panel=_MODEL)
    ],
    quantization: Annotated[Quantization, typer.Option(rich_help_panel=_MODEL)] = "none",
    dtype: Annotated[Dtype, typer.Option(help="What is computed in.", rich_help_panel=_MODEL)] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", rich_help_panel=_MODEL)] = ModelConfig.device,
    weight_execution: Annotated[
        Literal["auto", "packed", "dequantized"],
        typer.Option(help="How quantized weights are multiplied on a CPU.", rich_help_panel=_MODEL),
    ] = "auto",
    served_model_name: Annotated[str, typer.Option(help="Shown instead of --model.", rich_help_panel=_MODEL)] = "",
    adapters: Annotated[
        list[Path] | None,
        typer.Option(help="Register this adapter, or each in this folder; repeatable.", rich_help_panel=_ADAPTERS),
    ] = None,
    adapter_root: Annotated[
        list[Path] | None,
        typer.Option(help="Clients may register folders below this one; repeatable.", rich_help_panel=_ADAPTERS),
    ] = None,
    adapter_source: Annotated[
        list[str] | None,
        typer.Option(
            help="Clients may register from URLs below this one (hf://org); repeatable.", rich_help_panel=_ADAPTERS
        ),
    ] = None,
    adapter_source_timeout: Annotated[
        float, typer.Option(help="Seconds that fetching one from a URL may take.", rich_help_panel=_ADAPTERS)
    ] = SourcePolicy.timeout_s,
    max_upload_size: Annotated[
        str, typer.Option(help="The largest adapter taken, from wherever.", rich_help_panel=_ADAPTERS)
    ] = format_size(SourcePolicy.max_bytes),
    adapter_device_memory: Annotated[
        str, typer.Option(help="For adapter weights beside the base.", rich_help_panel=_ADAPTERS)
    ] = format_size(EngineConfig.adapter_device_memory),
    adapter_host_memory: Annotated[
        str, typer.Option(help="For adapter weights between disk and device.", rich_help_panel=_ADAPTERS)
    ] = format_size(EngineConfig.adapter_host_memory),
    adapter_dtype: Annotated[Dtype, typer.Option(rich_help_panel=_ADAPTERS)] = "auto",
    state_dir: Annotated[
        Path | None,
        typer.Option(help="Keeps registered adapters over restarts.", rich_help_panel=_ADAPTERS),
    ] = None,
    export_root: Annotated[
        Path | None,
        typer.Option(help="Merged models go below this; none turns merging off.", rich_help_panel=_ADAPTERS),
    ] = None,
    host: Annotated[str, typer.Option(rich_help_panel=_NETWORK)] = ServerConfig.host,
    port: Annotated[int, typer.Option(min=0, max=65535, rich_help_panel=_NETWORK)] = ServerConfig.port,
    metrics_host: Annotated[str, typer.Option(rich_help_panel=_NETWORK)] = ServerConfig.metrics_host,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, rich_help_panel=_NETWORK)] = ServerConfig.metrics_port,
    grace_period: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests get after a signal.", rich_help_panel=_NETWORK)
    ] = ServerConfig.grace_period_s,
    max_num_seqs: Annotated[
        int, typer.Option(help="Rows in a batch.", rich_help_panel=_ENGINE)
    ] = EngineConfig.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Tokens in a batch.", rich_help_panel=_ENGINE)
    ] = EngineConfig.max_num_batched_tokens,
    max_model_len: Annotated[
        int, typer.Option(help="Tokens in prompt and output; 0 is the model's limit.", rich_help_panel=_ENGINE)
    ] = EngineConfig.max_model_len,
    max_waiting: Annotated[
        int, typer.Option(help="Sequences in the queue; one more is refused.", rich_help_panel=_ENGINE)
    ] = EngineConfig.max_waiting,
    kv_cache_memory: Annotated[
        str,
        typer.Option(help="For keys and values; auto: 512MiB, on a GPU what is left.", rich_help_panel=_ENGINE),
    ] = "auto",
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of a GPU's memory to use, all included.", rich_help_panel=_ENGINE)
    ] = EngineConfig.gpu_memory_utilization,
    cuda_graphs: Annotated[
        bool, typer.Option(help="Capture decode steps on a GPU.", rich_help_panel=_ENGINE)
    ] = EngineConfig.cuda_graphs,
    block_size: Annotated[
        int, typer.Option(help="Tokens in a KV block.", rich_help_panel=_ENGINE)
    ] = EngineConfig.block_size,
    prefix_caching: Annotated[
        bool, typer.Option(help="Reuse the KV blocks of equal prompts.", rich_help_panel=_ENGINE)
    ] = EngineConfig.enable_prefix_caching,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 is PyTorch's choice.", rich_help_panel=_ENGINE)] = 0,
    log_level: Annotated[LogLevel, typer.Option()] = "info",
) -> None:
    """Serve one base model and its adapters until SIGINT or SIGTERM."""
    try:
        engine = EngineConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            max_waiting=max_waiting,
            block_size=block_size,
            kv_cache_memory=0 if kv_cache_memory == "auto" else parse_size(kv_cache_memory, "--kv-cache-memory"),
            gpu_memory_utilization=gpu_memory_utilization,
            cuda_graphs=cuda_graphs,
            adapter_device_memory=parse_size(adapter_device_memory, "--adapter-device-memory"),
            adapter_host_memory=parse_size(adapter_host_memory, "--adapter-host-memory"),
            adapter_dtype=adapter_dtype,
            enable_prefix_caching=prefix_caching,
            threads=threads,
        )
        sources = SourcePolicy(
            url_prefixes=tuple(adapter_source or ()),
            max_bytes=parse_size(max_upload_size, "--max-upload-size"),
            timeout_s=adapter_source_timeout,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    config = ServerConfig(
        model=ModelConfig(with_demo(model), quantization, dtype, device, weight_execution),
        engine=engine,
        adapters=tuple(adapters or ()),
        adapter_roots=tuple(adapter_root or ()),
        sources=sources,
        state_dir=state_dir,
        export_root=export_root,
        host=host,
        port=port,
        metrics_host=metrics_host,
        metrics_port=metrics_port,
        grace_period_s=grace_period,
        served_model_name=served_model_name or model,
        log_level=log_level,
    )
    run(config)


def run(config: ServerConfig) -> None:
    """Serve as `config` says, until a signal; the log goes to stderr.

    Raises:
        LoraplexError: if the model cannot be served or the engine dies.
        OSError: if a port is taken.
    """
    import asyncio
    import logging

    from loraplex.server.rpc.server import serve as serve_forever

    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )

    def on_ready(server: Server) -> None:
        typer.echo(
            f"serving {config.served_model_name} on {config.host}:{server.port}, "
            f"metrics on http://{config.metrics_host}:{server.metrics_port}/metrics"
        )

    asyncio.run(serve_forever(config, on_ready))
