"""`loraplex merge`: fold adapters into their base, here or on a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loraplex.cli.connection import JsonOption
from loraplex.cli.model import with_demo
from loraplex.cli.sizes import parse_size
from loraplex.cli.weights import parse_weights

if TYPE_CHECKING:
    from loraplex.client import MergeProgress


def merge(
    adapter: Annotated[
        list[str],
        typer.Option(
            help="The adapter's folder; with --server, its registered name. Repeatable, then as ADAPTER=WEIGHT."
        ),
    ],
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
    scale: Annotated[float | None, typer.Option(help="Multiplies the single adapter's own scaling.")] = None,
    method: Annotated[
        Literal["linear", "ties", "dare-linear", "dare-ties"],
        typer.Option(help="How several adapters become one: their weighted sum, TIES or DARE."),
    ] = "linear",
    density: Annotated[
        float | None, typer.Option(help="Share of each adapter's values that TIES and DARE keep; default 0.5.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of DARE's choice; default 0.")] = None,
    quantize: Annotated[
        Literal["nf4"] | None, typer.Option(help="Store the result quantized, as bitsandbytes does.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Texts that merged and unmerged model are compared on, one a line; default: a built-in list.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    max_mean_kl: Annotated[
        float | None,
        typer.Option(help="Fail, and write nothing, beyond this mean KL in nats; default 0.01, none with --quantize."),
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure how fast merged and unmerged model answer.")] = False,
    as_json: JsonOption = False,
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="Merge there instead of here.")] = "",
) -> None:
    """Write base plus adapters as one Hugging Face folder, which transformers loads without PEFT.

    The result is read again and compared with base and adapters apart. The folder's path goes to stdout.
    """
    from loraplex.cli import merge_run
    from loraplex.cli.output import print_json

    if bool(server) == bool(model):
        raise typer.BadParameter("give either the base to merge with here or --server", param_hint="--model")
    if server and quantization is not None:
        raise typer.BadParameter("the server knows how it quantizes: leave it out", param_hint="--quantization")
    if not server and (base == "dequantized") != (quantization is not None):
        raise typer.BadParameter("goes with --base dequantized, and that with it", param_hint="--quantization")
    options: dict[str, Any] = {
        "base": base,
        "method": method,
        "density": density,
        "seed": seed,
        "quantize": quantize or "",
        "max_shard_bytes": parse_size(max_shard_size, "--max-shard-size"),
        "max_mean_kl": max_mean_kl,
        "prompts": merge_run.read_prompts(prompts),
    }
    weights = _weights(adapter, scale)
    if model and merge_run.is_classifier(weights):
        if quantization or quantize or speed or scale is not None:
            raise typer.BadParameter(
                "a classifier is merged into full precision, at its own scaling", param_hint="--adapter"
            )
        typer.echo(merge_run.merge_classifier_here(with_demo(model), weights, output))
        return
    done: MergeProgress = (
        merge_run.merge_there(server, weights, output, speed, options)
        if server
        else merge_run.merge_here(with_demo(model), weights, output, quantization, speed, options)
    )
    if as_json:
        print_json(done)
        return
    merge_run.show(done)
    typer.echo(done.output_path)


def _weights(adapters: list[str], scale: float | None) -> dict[str, float]:
    """Return name or folder to weight; a single adapter without one takes `scale`."""
    found = parse_weights(adapters, "--adapter")
    if scale is None:
        return found
    if len(found) > 1 or any("=" in text for text in adapters):
        raise typer.BadParameter("is for one adapter without a weight of its own", param_hint="--scale")
    return dict.fromkeys(found, scale)
