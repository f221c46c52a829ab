"""What decode steps on a card will take at least, for `loraplex plan --device`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from loraplex.adapters.training.architecture import ModelArchitecture
    from loraplex.bench.gpu.cards import Card
    from loraplex.bench.gpu.step_model import DecoderShape, StepKind

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def card_named(name: str) -> Card:
    """Return the card called `name`.

    Raises:
        typer.BadParameter: listing the cards, if there is none.
    """
    from loraplex.bench.gpu.cards import CARDS

    if name not in CARDS:
        raise typer.BadParameter(f"no card {name!r}: {', '.join(CARDS)}", param_hint="--device")
    return CARDS[name]


def decoder_shape(model: ModelArchitecture) -> DecoderShape:
    """Return the model's sizes.

    Raises:
        typer.BadParameter: if it is no decoder of the kind that is modelled.
    """
    from loraplex.bench.gpu.step_model import DecoderShape

    config = model.config.get_text_config()
    if not all(hasattr(config, name) for name in _SIZES):
        raise typer.BadParameter(f"steps are modelled for decoders like Llama, not for {model.architecture}")
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return DecoderShape(
        model.name,
        hidden=int(config.hidden_size),
        intermediate=int(config.intermediate_size),
        layers=model.layers,
        heads=heads,
        kv_heads=model.key_value_width // head_dim,
        head_dim=head_dim,
        vocab=int(config.vocab_size),
    )


def planned_steps(rows: int, context: int, adapters: int, rank: int, targets: tuple[str, ...]) -> dict[str, StepKind]:
    """Return the steps to model: one row and all rows, the base alone and with adapters, NF4 and bfloat16."""
    from loraplex.bench.gpu.step_model import ALL_LINEAR, StepKind

    leaves = tuple(name.removesuffix("_proj") for name in targets) or ALL_LINEAR
    if unknown := set(leaves) - set(ALL_LINEAR):
        raise typer.BadParameter(f"steps are modelled for {', '.join(ALL_LINEAR)}, not {', '.join(sorted(unknown))}")
    active = min(adapters, rows)
    mixed = f"{rows} rows, {active} adapters of rank {rank}"
    steps = {
        "1 row, NF4": StepKind(1, context),
        f"{rows} rows, NF4": StepKind(rows, context),
        f"{rows} rows, bfloat16": StepKind(rows, context, "bfloat16"),
    }
    if active:
        steps[f"{mixed}, NF4"] = StepKind(rows, context, "nf4", active, rank, leaves)
        steps[f"{mixed}, bfloat16"] = StepKind(rows, context, "bfloat16", active, rank, leaves)
    return steps


def steps_document(shape: DecoderShape, steps: Mapping[str, StepKind], card: Card) -> dict[str, Any]:
    """Return what each step moves, launches and takes."""
    from loraplex.bench.gpu.step_model import step_document

    return {
        "card": card.title,
        "bandwidth_tb_s": round(card.reached_bytes_s / 1e12, 2),
        "source": card.source,
        "steps": {name: step_document(shape, step, card) for name, step in steps.items()},
    }


def steps_table(document: Mapping[str, Any]) -> Table:
    """Return a document of `steps_document` as a table."""
    from rich.table import Table

    table = Table(
        title=f"decode steps on {document['card']}: modelled, not measured",
        caption=f"{document['bandwidth_tb_s']} TB/s, 90 % of what the {document['source']} says",
    )
    table.add_column("step")
    for column in ("weights", "keys, values", "adapters", "launches", "at least", "with launches"):
        table.add_column(column, justify="right")
    for name, step in document["steps"].items():
        sizes = (f"{step[key] / 1e9:.2f} GB" for key in ("weight_bytes", "cache_bytes", "adapter_bytes"))
        times = (f"{step[key]:.2f} ms" for key in ("bound_ms", "modelled_ms"))
        table.add_row(name, *sizes, str(step["launches"]), *times)
    return table
