"""The card of a trained adapter: what it was trained on, how, and how well it does, from the run's own figures."""

from __future__ import annotations

import json

from loraplex.adapters.training.score import Answer, Score
from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.train_result import TrainResult

_SHOWN_ANSWERS = 3
_LONGEST = 600


def model_card(config: TrainConfig, result: TrainResult) -> str:
    """Return the card as Markdown with the header that the hub reads."""
    base = config.base_model_name or config.model
    method = "LoRA" if config.quantization == "none" else f"LoRA on a base quantized to {config.quantization}"
    kinds = ("DoRA", config.use_dora), ("rsLoRA", config.use_rslora), ("LoRA+", config.loraplus_lr_ratio is not None)
    extra = "".join(f", {name}" for name, used in kinds if used)
    start = "" if config.init_lora_weights == "default" else f", {config.init_lora_weights} start"
    targets = config.target_modules
    targets = targets if isinstance(targets, str) else ", ".join(targets)
    lines = [
        "---",
        f"base_model: {json.dumps(base)}",
        "library_name: peft",
        f"pipeline_tag: {'text-classification' if config.task == 'sequence-classification' else 'text-generation'}",
        "tags: [lora, loraplex]",
        "---",
        f"# {result.output_dir.name}",
        "",
        f"{method}{extra}{start}: rank {config.rank}, alpha {config.lora_alpha:g}, dropout {config.dropout:g}, on "
        f"{targets}. {result.trainable_parameters:,} of {result.total_parameters:,} parameters were trained "
        f"({result.trainable_parameters / result.total_parameters:.2%}).",
        "",
        f"Data: {_data(config, result)}.",
        f"Training: {result.steps} steps of {config.per_device_batch_size * config.gradient_accumulation_steps} "
        f"sequences, learning rate {config.learning_rate:g} ({config.lr_scheduler_type}), seed {config.seed}; "
        f"{result.tokens:,} tokens in {result.seconds:.0f} s."
        f"{' It ended early, as validation made no more progress.' if result.stopped_early else ''}",
        "",
        *_scores(result, chosen=config.early_stopping_patience > 0),
        "## Use",
        "",
        _use(result),
        "",
        *_samples(result.answers),
        "`train.yaml` beside this card has every setting; `loraplex train --config train.yaml` trains it again.",
        "",
    ]
    return "\n".join(lines)


def _data(config: TrainConfig, result: TrainResult) -> str:
    source = config.data.rstrip("/").rpartition("/")[2]
    lost = [f"{count} {what}" for count, what in _losses(result) if count]
    return f"{source}, {result.train_rows} rows" + (f" ({', '.join(lost)})" if lost else "")


def _losses(result: TrainResult) -> tuple[tuple[int, str], ...]:
    return (result.truncated_rows, "truncated"), (result.skipped_rows, "skipped as too long")


def _scores(result: TrainResult, *, chosen: bool) -> list[str]:
    if result.base is None or result.adapter is None:
        return ["No rows were held out, so nothing was measured.", ""]
    pairs = (("base", result.base), ("base with this adapter", result.adapter))
    rows = [
        f"| {name} | {score.loss:.4f} | {_share(score.accuracy)} | {_share(score.contained)} |" for name, score in pairs
    ]
    notes = "Greedy answers. Exact: the expected answer and nothing else. Contained: it occurs in the text."
    if chosen:
        notes += " The checkpoint was chosen by the loss on these rows, so the figures are a little too good."
    return [
        f"## On {result.validation_rows} held-out rows ({_answered(result.adapter)})",
        "",
        notes,
        "",
        "| | loss, nats a token | exact | contained |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def _answered(score: Score) -> str:
    return f"{score.rows} of them answered" if score.rows else "loss only"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _use(result: TrainResult) -> str:
    if result.serving_problem:
        return f"It cannot be served: {result.serving_problem}."
    return (
        f"`loraplex adapter register {result.output_dir.name} {result.output_dir.name}/` on a server of the base, then "
        f"`loraplex generate --adapter {result.output_dir.name} ...`, with prompts in the words of the training data."
    )


def _samples(answers: tuple[tuple[Answer, Answer], ...]) -> list[str]:
    lines = []
    for base, adapter in answers[:_SHOWN_ANSWERS]:
        # Tildes: models like to answer in back-quoted blocks, which would close a fence made of them.
        shown = f"{base.prompt}\n\nadapter: {adapter.text.strip()}\nbase:    {base.text.strip()[:_LONGEST]}"
        lines += ["~~~~text", shown.replace("~~~~", "~~~"), "~~~~", ""]
    return lines
