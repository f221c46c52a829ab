"""`loraplex merge`: fold an adapter into its base, here or on a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from loraplex.cli.model import with_demo


def merge(
    adapter: Annotated[str, typer.Option(help="The adapter's folder; with --server, its registered name.")],
    output: Annotated[
        Path, typer.Option(help="The folder to write; with --server, relative to the server's export root.")
    ],
    model: Annotated[str, typer.Option(help="The base: hub id, Hugging Face folder, GGUF file, or demo.")] = "",
    base: Annotated[
        Literal["full-precision", "dequantized"],
        typer.Option(help="Fold into the base's own weights, or into those that a quantized server computes with."),
    ] = "full-precision",
    quantization: Annotated[
        Literal["nf4", "fp4", "int8"] | None, typer.Option(help="How that server quantizes, for --base dequantized.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Multiplies the adapter's own scaling.")] = None,
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="Merge there instead of here.")] = "",
) -> None:
    """Write base plus adapter as one Hugging Face folder, which transformers loads without PEFT."""
    if bool(server) == bool(model):
        raise typer.BadParameter("give either the base to merge with here or --server", param_hint="--model")
    if server:
        if quantization is not None:
            raise typer.BadParameter("the server knows how it quantizes: leave it out", param_hint="--quantization")
        typer.echo(_merge_there(server, adapter, output, base, scale))
        return
    if (base == "dequantized") != (quantization is not None):
        raise typer.BadParameter("goes with --base dequantized, and that with it", param_hint="--quantization")
    typer.echo(_merge_here(model, Path(adapter), output, quantization, 1.0 if scale is None else scale))


def _merge_here(model: str, adapter: Path, output: Path, quantization: str | None, scale: float) -> str:
    """Merge in this process; return the path of what was written."""
    from loraplex.adapters.merge import MergeBase, merge_adapter
    from loraplex.cli.output import progress_bar
    from loraplex.server.models.source import resolve_model

    folder = resolve_model(with_demo(model))
    output.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar(f"Merging {adapter.name}") as (bar, task):
        result = merge_adapter(
            folder,
            adapter,
            output,
            base=MergeBase.DEQUANTIZED if quantization else MergeBase.FULL_PRECISION,
            quantization=quantization,
            scale=scale,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    return str(result.output)


def _merge_there(server: str, adapter: str, output: Path, base: str, scale: float | None) -> str:
    """Return the path, on the server, of what was written."""
    from loraplex.cli.output import progress_bar
    from loraplex.client import Client

    with (
        Client(server) as client,
        progress_bar(f"Merging {adapter}") as (bar, task),
        client.merge_adapter(adapter, output, base=base, scale=scale) as stream,
    ):
        for progress in stream:
            bar.update(task, completed=progress.tensors_done, total=progress.tensors_total)
        return stream.result().output_path
