"""Which values the fields of a training configuration may have; knows nothing of what they are for."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraplex.adapters.errors import FieldViolation

if TYPE_CHECKING:
    from loraplex.adapters.training.train_config import TrainConfig

CHOICES: Mapping[str, tuple[str, ...]] = {
    "task": ("causal-lm", "sequence-classification"),
    "data_format": ("auto", "prompt-completion", "messages", "text", "labelled-text"),
    "chat": ("auto", "yes", "no"),
    "long_rows": ("refuse", "truncate", "skip"),
    "quantization": ("none", "nf4", "fp4", "int8"),
    "dtype": ("auto", "bfloat16", "float32"),
    "device": ("auto", "cpu", "cuda"),
}
# Smallest and largest value.
RANGES: Mapping[str, tuple[float, float]] = {
    "validation_fraction": (0.0, 0.9),
    "max_length": (2, 1 << 20),
    "rank": (1, 65536),
    "dropout": (0.0, 0.9),
    "warmup_ratio": (0.0, 1.0),
    "weight_decay": (0.0, math.inf),
    "max_grad_norm": (0.0, math.inf),
    "max_steps": (0, math.inf),
    "per_device_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "eval_steps": (1, math.inf),
    "save_steps": (1, math.inf),
    "logging_steps": (1, math.inf),
    "early_stopping_patience": (0, math.inf),
    "save_total_limit": (1, math.inf),
    "score_rows": (0, math.inf),
    "score_max_new_tokens": (1, 4096),
    "seed": (0, 2**32 - 1),
}
POSITIVE = ("alpha", "learning_rate", "epochs", "loraplus_lr_ratio")
_REQUIRED_TEXTS = (
    *("model", "data", "output_dir", "data_split", "lr_scheduler_type", "optim"),
    *("prompt_field", "completion_field", "messages_field", "text_field", "label_field"),
)
_INITS = re.compile(r"default|gaussian|eva|pissa|pissa_niter_[1-9]\d*")


def coerced(each: dataclasses.Field[Any], value: Any) -> Any:
    """Return `value` in the type of the field: lists as tuples, and what YAML takes for text (2e-4) as a number."""
    declared = str(each.type)
    if isinstance(value, list):
        return tuple(value)
    if declared.startswith("float") and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if declared.startswith("float") and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # YAML 1.1 reads a bare yes or no as a truth value.
    if each.name == "chat" and isinstance(value, bool):
        return "yes" if value else "no"
    return value


def violations_of(config: TrainConfig) -> list[FieldViolation]:
    """Return what is wrong with the values of `config`."""
    fields = dataclasses.fields(config)
    found = [FieldViolation(each.name, problem) for each in fields if (problem := _type_problem(each, config))]
    # Ranges of values that are no numbers mean nothing.
    if found:
        return found
    values = {each.name: getattr(config, each.name) for each in fields}
    for name in _REQUIRED_TEXTS:
        if not values[name].strip():
            found.append(FieldViolation(name, "must not be empty"))
    for name, choices in CHOICES.items():
        if values[name] not in choices:
            found.append(FieldViolation(name, f"must be one of {', '.join(choices)}, not {values[name]!r}"))
    for name, (smallest, largest) in RANGES.items():
        if values[name] is not None and not smallest <= values[name] <= largest:
            limit = f"at least {smallest:g}" if largest == math.inf else f"from {smallest:g} to {largest:g}"
            found.append(FieldViolation(name, f"must be {limit}, not {values[name]:g}"))
    for name in POSITIVE:
        if values[name] is not None and not 0 < values[name] < math.inf:
            found.append(FieldViolation(name, f"must be more than 0 and finite, not {values[name]:g}"))
    return found + _pattern_problems(config) + _problems_together(config)


def _type_problem(each: dataclasses.Field[Any], config: TrainConfig) -> str:
    declared, value = str(each.type), getattr(config, each.name)
    if value is None and declared.endswith("| None"):
        return ""
    kinds: dict[str, tuple[tuple[type, ...], str]] = {
        "str": ((str,), "text"),
        "bool": ((bool,), "true or false"),
        "int": ((int,), "a whole number"),
        "float": ((int, float), "a number"),
        "tuple[str, ...]": ((tuple,), "a list of names"),
        "tuple[str, ...] | str": ((tuple, str), "a list of names, an expression or all-linear"),
    }
    if declared.startswith("Mapping"):
        return "" if isinstance(value, Mapping) else f"must map module names to numbers, not {value!r:.80}"
    accepted, description = kinds[declared.removesuffix(" | None")]
    is_kind = isinstance(value, accepted) and isinstance(value, bool) == (declared == "bool")
    if isinstance(value, tuple) and (not all(isinstance(name, str) and name for name in value)):
        is_kind = False
    return "" if is_kind else f"must be {description}, not {value!r:.80}"


def _pattern_problems(config: TrainConfig) -> list[FieldViolation]:
    found = []
    for name, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        kinds = (int,) if name == "rank_pattern" else (int, float)
        for module, value in pattern.items():
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
                found.append(FieldViolation(f"{name}.{module}", f"must be a positive number, not {value!r:.80}"))
    return found


def _problems_together(config: TrainConfig) -> list[FieldViolation]:
    found = []
    if not config.target_modules:
        found.append(FieldViolation("target_modules", "must name at least one module"))
    if not _INITS.fullmatch(config.init_lora_weights):
        choices = "default, gaussian, eva, pissa or pissa_niter_<n>"
        found.append(FieldViolation("init_lora_weights", f"must be {choices}, not {config.init_lora_weights!r}"))
    if config.init_lora_weights.startswith("pissa") and config.quantization != "none":
        reason = "PiSSA changes the base's weights, which a quantized base does not allow: set quantization to none"
        found.append(FieldViolation("init_lora_weights", reason))
    if config.early_stopping_patience and not (config.validation_data or config.validation_fraction):
        found.append(FieldViolation("early_stopping_patience", "needs validation_data or a validation_fraction"))
    if config.task == "sequence-classification":
        if config.packing:
            found.append(FieldViolation("packing", "has no meaning for sequence-classification"))
        if config.data_format not in ("auto", "labelled-text"):
            found.append(FieldViolation("data_format", "must be labelled-text for sequence-classification"))
    elif config.data_format == "labelled-text":
        found.append(FieldViolation("data_format", "labelled-text is for sequence-classification"))
    return found
