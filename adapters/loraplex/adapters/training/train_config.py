"""What a training run is told, and its form as `train.yaml`.

Names are PEFT's, TRL's and transformers' own. Knows no data and no model: whether a value suits them is found out when
they are read.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loraplex.adapters.errors import FieldViolation, InvalidRequestError, NotFoundError
from loraplex.adapters.training.config_values import coerced, violations_of

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class TrainConfig:
    """One training run, checked when it is made.

    Attributes:
        model: hub id or Hugging Face folder of the base; the command also takes "demo".
        data: a JSONL, CSV or Parquet file, or the id of a hub data set.
        output_dir: the adapter's folder. Checkpoints and logs go to `<output_dir>.run` beside it.
        task: "causal-lm", or "sequence-classification" for BERT-like models (to be merged, not to be served).
        base_model_name: what the adapter's config calls its base; empty: `model`.
        data_split: of a hub data set.
        data_format: "prompt-completion", "messages", "text" or "labelled-text"; "auto" takes it from the first row.
        prompt_field, completion_field, messages_field, text_field, label_field: what the columns are called.
        chat: whether prompts and completions become turns of the model's chat template; messages always do. "auto":
            if the model has one.
        chat_template: a Jinja file that takes the place of the model's own and is kept with the adapter.
        validation_data: a file or data set of its own to validate on; else `validation_fraction` of `data` is held out.
        long_rows: what becomes of a row of more than `max_length` tokens: "refuse", "truncate" or "skip".
        packing: put several rows into one sequence of `max_length` tokens.
        completion_only_loss: learn the completion (the assistant's turns), not the prompt.
        rank, alpha, dropout: of LoRA. `alpha` None is 2 * rank.
        target_modules: module names, an expression that matches whole names, or "all-linear".
        rank_pattern, alpha_pattern: by module name or expression, in place of rank and alpha.
        modules_to_save: modules that are trained and saved whole.
        use_rslora, use_dora: scaling alpha / sqrt(rank); weight-decomposed LoRA.
        init_lora_weights: "default" (B is zero), "gaussian", "pissa", "pissa_niter_<n>" or "eva".
        loraplus_lr_ratio: LoRA+, how many times faster B learns than A; None is off.
        quantization: of the frozen base while training: "none", "nf4", "fp4" or "int8".
        double_quant: whether the block scales of 4 bits are quantized too.
        dtype: in which is computed: "bfloat16", "float32", or "auto" (bfloat16 where the device has it).
        device: "auto", "cpu" or "cuda".
        learning_rate: of the adapter, at its peak.
        lr_scheduler_type: transformers' name.
        warmup_ratio: share of the steps in which the learning rate rises.
        optim: transformers' name of the optimizer.
        max_grad_norm: at which gradients are clipped; 0 is never.
        epochs: how often every row is seen; `max_steps`, if positive, takes its place.
        per_device_batch_size, gradient_accumulation_steps: rows of a forward pass, and passes of an optimizer step.
        gradient_checkpointing: compute activations again in the backward pass, in place of keeping them.
        eval_steps, save_steps, logging_steps: steps between validations, checkpoints and log lines; None for the
            first two: ten times in the run.
        early_stopping_patience: validations without progress after which the run ends; 0 is never.
        save_total_limit: checkpoints that are kept.
        score_rows: held-out rows that base and adapter answer at the end; 0 turns the score off.
        score_max_new_tokens: of such an answer.
        tensorboard: write logs that TensorBoard shows.
        seed: of the order of rows, dropout, the start of A and the split.
    """

    model: str
    data: str
    output_dir: str
    task: str = "causal-lm"
    base_model_name: str = ""
    data_split: str = "train"
    data_format: str = "auto"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    messages_field: str = "messages"
    text_field: str = "text"
    label_field: str = "label"
    chat: str = "auto"
    chat_template: str = ""
    validation_data: str = ""
    validation_fraction: float = 0.1
    max_length: int = 1024
    long_rows: str = "refuse"
    packing: bool = False
    completion_only_loss: bool = True
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.05
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str = "default"
    loraplus_lr_ratio: float | None = None
    quantization: str = "nf4"
    double_quant: bool = True
    dtype: str = "auto"
    device: str = "auto"
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    optim: str = "adamw_torch"
    max_grad_norm: float = 1.0
    epochs: float = 3.0
    max_steps: int = 0
    per_device_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    eval_steps: int | None = None
    save_steps: int | None = None
    logging_steps: int = 10
    early_stopping_patience: int = 0
    save_total_limit: int = 2
    score_rows: int = 100
    score_max_new_tokens: int = 64
    tensorboard: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value by itself and the values against each other.

        Raises:
            InvalidRequestError: naming each field that is wrong.
        """
        found = violations_of(self)
        if found:
            raise InvalidRequestError(found)

    @property
    def lora_alpha(self) -> float:
        """Alpha, also where it was left out."""
        return 2 * self.rank if self.alpha is None else self.alpha

    @property
    def run_dir(self) -> Path:
        """Where checkpoints and logs of the run lie."""
        return Path(f"{self.output_dir.rstrip('/')}.run")

    @classmethod
    def from_yaml(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
        """Read the file `path`; `overrides` take the place of what it says.

        Raises:
            NotFoundError: there is no such file.
            InvalidRequestError: it is not YAML in UTF-8, or a field is unknown, missing or wrong.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no file {path}") from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise InvalidRequestError.of(str(path), f"is not YAML in UTF-8: {error}") from error
        if not isinstance(values, dict):
            raise InvalidRequestError.of(str(path), "must hold fields and values, such as `rank: 8`")
        return cls.from_values({**values, **(overrides or {})})

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Make a configuration of plain values, as YAML or JSON has them.

        Raises:
            InvalidRequestError: a field is unknown, missing or wrong.
        """
        fields = {each.name: each for each in dataclasses.fields(cls)}
        found = [FieldViolation(str(name), _unknown(str(name), fields)) for name in values if name not in fields]
        required = (name for name, each in fields.items() if _has_no_default(each))
        found += [FieldViolation(name, "is missing") for name in required if name not in values]
        if found:
            raise InvalidRequestError(found)
        return cls(**{name: coerced(fields[name], value) for name, value in values.items()})

    def to_values(self) -> dict[str, Any]:
        """Return plain values for YAML or JSON; `from_values` undoes it."""
        plain: dict[str, Any] = {}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            is_sequence, is_mapping = isinstance(value, tuple), isinstance(value, Mapping)
            plain[each.name] = list(value) if is_sequence else dict(value) if is_mapping else value
        return plain

    def to_yaml(self, reasons: Mapping[str, str] | None = None) -> str:
        """Return all fields as YAML, those in `reasons` with that text as a comment above; `from_yaml` undoes it."""
        lines = []
        for name, value in self.to_values().items():
            reason = (reasons or {}).get(name, "")
            lines += [f"# {line}\n" for line in reason.splitlines()]
            lines.append(yaml.safe_dump({name: value}, allow_unicode=True, default_flow_style=False, width=1000))
        return "".join(lines)


def _has_no_default(each: dataclasses.Field[Any]) -> bool:
    return each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING


def _unknown(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"is not a field; did you mean {close[0]}?" if close else "is not a field of a training configuration"
