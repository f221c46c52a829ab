"""What `loraplex merge` does: merge here or on a server, with a bar, and show how the result compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from loraplex.cli.output import progress_bar, to_stderr
from loraplex.client.merging import MergeComparison, MergeProgress, SpeedFigures


def read_prompts(file: Path | None) -> tuple[str, ...]:
    """Return the lines of `file` that are not empty, or nothing."""
    if file is None:
        return ()
    return tuple(line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())


def merge_here(
    model: str,
    weights: Mapping[str, float],
    output: Path,
    quantization: str | None,
    speed: bool,
    options: Mapping[str, Any],
) -> MergeProgress:
    """Merge in this process, adapters being folders; return what a server would say at the end.

    Raises:
        LoraplexError: what `merge_adapters` raises.
        ModelLoadError: there is no such model.
    """
    from loraplex.adapters.disk import parents_made
    from loraplex.adapters.merge import AdapterSource, MergeOptions, merge_adapters
    from loraplex.adapters.merge_methods import MergeMethod, Mixing
    from loraplex.adapters.merge_plan import MergeBase
    from loraplex.cli.termination import sigterm_raises
    from loraplex.server.models.source import resolve_model
    from loraplex.server.speed import SpeedSettings

    chosen = dict(options)
    mixing = Mixing(MergeMethod(chosen.pop("method")), chosen.pop("density"), chosen.pop("seed"))
    del chosen["base"]
    merge_options = MergeOptions(
        base=MergeBase.DEQUANTIZED if quantization else MergeBase.FULL_PRECISION,
        quantization=quantization,
        mixing=mixing,
        speed_command=SpeedSettings(quantization or "none").command() if speed else (),
        **chosen,
    )
    folder = resolve_model(model)
    sources = [AdapterSource(Path(adapter), weight) for adapter, weight in weights.items()]
    with sigterm_raises(), parents_made(output), progress_bar("merging") as (bar, task):
        result = merge_adapters(
            folder,
            sources,
            output,
            merge_options,
            lambda phase, done, total: bar.update(task, description=phase, completed=done, total=total),
        )
    return MergeProgress(
        tensors_done=result.parameters,
        tensors_total=result.parameters,
        output_path=str(result.output),
        adapter_digest=result.adapter_digests[0],
        comparison=MergeComparison(**asdict(result.comparison)),
        speed=tuple(SpeedFigures(**asdict(side)) for side in result.speed),
        adapter_digests=result.adapter_digests,
    )


def is_classifier(weights: Mapping[str, float]) -> bool:
    """Return whether the first of the adapters, being folders, is a classifier's, which is merged in another way."""
    from loraplex.adapters.training.classifier_merge import is_classifier as check

    return check(Path(next(iter(weights))))


def merge_classifier_here(model: str, weights: Mapping[str, float], output: Path) -> Path:
    """Merge one classifier's adapter in this process; return the folder that was written.

    Raises:
        InvalidRequestError: there are several.
        LoraplexError: what `merge_classifier` raises.
        ModelLoadError: there is no such model.
    """
    from loraplex.adapters.errors import InvalidRequestError
    from loraplex.adapters.training.classifier_merge import merge_classifier
    from loraplex.server.models.source import resolve_model

    if len(weights) > 1:
        raise InvalidRequestError.of("--adapter", "classifiers have heads of their own: only one can be merged")
    difference = merge_classifier(str(resolve_model(model)), Path(next(iter(weights))), output)
    to_stderr().print(f"merged and unmerged logits differ by at most {difference:.2g}")
    return output


def merge_there(
    server: str, weights: Mapping[str, float], output: Path, speed: bool, options: Mapping[str, Any]
) -> MergeProgress:
    """Merge on `server`, adapters being registered names; return its last message.

    Raises:
        LoraplexClientError: what the server refuses.
    """
    from loraplex.client import Client

    adapter: str | Mapping[str, float] = weights
    given = dict(options)
    if len(weights) == 1:
        ((adapter, scale),) = weights.items()
        given["scale"] = None if scale == 1 else scale
    with (
        Client(server) as client,
        progress_bar("merging") as (bar, task),
        client.merge_adapter(adapter, output, measure_speed=speed, **given) as stream,
    ):
        for progress in stream:
            if progress.phase:
                done, total = progress.tensors_done, progress.tensors_total
                bar.update(task, description=progress.phase, completed=done, total=total)
        return stream.result()


def show(done: MergeProgress) -> None:
    """Write how the merged model compares to stderr, and how fast both are if that was measured."""
    console = to_stderr()
    if done.comparison is not None:
        found = done.comparison
        console.print(
            f"compared with base and adapters apart over {found.positions} positions: largest logit difference "
            f"{found.max_logit_difference:.3g}, same best token at {found.top1_agreement:.2%}, mean KL "
            f"{found.mean_kl:.3g} nats",
            soft_wrap=True,
        )
    if done.speed:
        console.print(speed_table(done.speed))


def speed_table(sides: tuple[SpeedFigures, ...]) -> Table:
    """Show both sides, and how the merged one's tokens per second compare."""
    table = Table(title="Inference, the same prompts at once on the engine of `loraplex serve`")
    table.add_column("model")
    for column in ("tokens/s", "of unmerged", "first token, ms", "between tokens, ms"):
        table.add_column(column, justify="right")
    reference = sides[0].tokens_per_second
    for side in sides:
        table.add_row(
            side.model,
            f"{side.tokens_per_second:.1f}",
            f"{side.tokens_per_second / reference:.0%}",
            f"{side.first_token_ms:.1f}",
            f"{side.inter_token_ms_p50:.1f}",
        )
    return table
