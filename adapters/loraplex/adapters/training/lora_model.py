"""Puts a fresh LoRA adapter on a frozen base, by PEFT; a target that does not exist is refused, not passed over.

Knows nothing about data, but for EVA, which looks at some batches.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraplex.adapters.errors import FieldViolation, InvalidRequestError
from loraplex.adapters.training.train_config import ALL_LINEAR, TrainConfig

_SHOWN = 12


@dataclass(frozen=True)
class ParameterCount:
    """Numbers that are trained, and all of the model's, those of a quantized weight counted as they were."""

    trainable: int
    total: int


def add_adapter(base: Any, config: TrainConfig, batches: Iterable[Mapping[str, torch.Tensor]], scratch: Path) -> Any:
    """Return `base` as a PEFT model with a new adapter, float32; the same seed gives the same start.

    `batches` are those that EVA looks at. PiSSA's start is kept in `scratch`, for `save_adapter` to subtract.

    Raises:
        InvalidRequestError: a target does not exist, or PEFT cannot adapt it.
    """
    import peft

    check_targets(base, config)
    torch.manual_seed(config.seed)
    try:
        lora = lora_config(config)
        model = peft.get_peft_model(base, lora)
        if config.init_lora_weights == "eva":
            from peft.tuners.lora.eva import initialize_lora_eva_weights

            model.eval()
            initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InvalidRequestError.of("target_modules", f"cannot be adapted by PEFT: {error!s:.400}") from error
    if config.init_lora_weights.startswith("pissa"):
        model.save_pretrained(str(scratch), save_embedding_layers=False)
    return model


def lora_config(config: TrainConfig) -> Any:
    """Return PEFT's configuration of the adapter."""
    import peft

    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    classifies = config.task == "sequence-classification"
    init: Any = True if config.init_lora_weights == "default" else config.init_lora_weights
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT computes with any number
        lora_dropout=config.dropout,
        target_modules=targets,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        modules_to_save=list(config.modules_to_save) or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=init,
        task_type=peft.TaskType.SEQ_CLS if classifies else peft.TaskType.CAUSAL_LM,
    )


def check_targets(base: torch.nn.Module, config: TrainConfig) -> None:
    """Check that every name in the configuration matches a module; PEFT trains the others and says nothing.

    Raises:
        InvalidRequestError: with every name that matches none, and what there is.
    """
    names = [name for name, _ in base.named_modules() if name]
    found: list[FieldViolation] = []
    targets = config.target_modules
    if isinstance(targets, str):
        if targets != ALL_LINEAR:
            found += _unmatched_expression(targets, names)
    else:
        found += _unmatched("target_modules", targets, names)
    if not found and _reaches(targets, "lm_head", names):
        reason = "lm_head cannot have LoRA while TRL trains; put it in modules_to_save to train it whole"
        found.append(FieldViolation("target_modules", reason))
    found += _unmatched("modules_to_save", config.modules_to_save, names)
    for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(_matches_pattern(pattern, name) for name in names):
                found.append(FieldViolation(field, f"{pattern} matches no module{_hint(pattern, names)}"))
    if found:
        raise InvalidRequestError(found)


def count_parameters(model: Any) -> ParameterCount:
    """Count the parameters of a PEFT model."""
    trainable, total = model.get_nb_trainable_parameters()
    return ParameterCount(trainable, total)


def _unmatched(field: str, wanted: Sequence[str], names: Sequence[str]) -> list[FieldViolation]:
    missing = [each for each in wanted if not any(name == each or name.endswith(f".{each}") for name in names)]
    return [FieldViolation(field, f"{each} matches no module of the model{_hint(each, names)}") for each in missing]


def _unmatched_expression(expression: str, names: Sequence[str]) -> list[FieldViolation]:
    try:
        compiled = re.compile(expression)
    except re.error as error:
        return [FieldViolation("target_modules", f"is no regular expression: {error}")]
    if any(compiled.fullmatch(name) for name in names):
        return []
    return [FieldViolation("target_modules", f"{expression} matches no module of the model{_hint(expression, names)}")]


def _reaches(targets: Sequence[str] | str, module: str, names: Sequence[str]) -> bool:
    if module not in names or targets == ALL_LINEAR:
        return False
    return bool(re.fullmatch(targets, module)) if isinstance(targets, str) else module in targets


def _matches_pattern(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
    except re.error:
        return False


def _hint(wanted: str, names: Sequence[str]) -> str:
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    last = [name for name in last if not name.isdigit()]
    close = difflib.get_close_matches(wanted.rpartition(".")[2], last, n=1)
    listed = ", ".join(last[:_SHOWN]) + (", ..." if len(last) > _SHOWN else "")
    return f"; did you mean {close[0]}?" if close else f"; it has {listed}"
