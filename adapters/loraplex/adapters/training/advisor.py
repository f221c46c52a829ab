"""Advice on how to train an adapter: every value of a `TrainConfig`, and the reason for it.

Reads the model's config and the data, never the weights. The rules are the seed text's (`seed_figures`); where a rule
is ours, its reason says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.training.architecture import CAUSAL_LM, CLASSIFICATION, ModelArchitecture
from loraplex.adapters.training.data_profile import DataProfile
from loraplex.adapters.training.module_ranks import ModuleRanks, seed_ranks, uniform_ranks
from loraplex.adapters.training.rank_advice import (
    Complexity,
    RankAdvice,
    Task,
    advise_dropout,
    advise_rank,
    advise_scope,
)
from loraplex.adapters.training.seed_figures import seed
from loraplex.adapters.training.targets import Targets, choose_targets
from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.training_memory import METHODS, Method, TrainingMemory, TrainingShape, training_memory
from loraplex.adapters.training.training_time import CPU, TimeEstimate, estimate_time

_SMALL = 1e9
_LENGTH_STEP = 64


@dataclass(frozen=True)
class Wishes:
    """What is to be trained, where to, and what the user decides against the rules.

    Attributes:
        task, complexity: of what is learned; `complexity` None is the task's own.
        output_dir: the adapter's folder.
        one_rank: the same rank for all modules.
        quantization: of the base while training; None leaves it to the advice.
        device: what it will run on, for the estimate of time.
    """

    task: Task = "dialogue"
    complexity: Complexity | None = None
    output_dir: str = "adapter"
    one_rank: bool = False
    quantization: str | None = None
    device: str = CPU


@dataclass(frozen=True)
class AdvisedConfig:
    """A training configuration with reasons by field; `trained` are the parameters of A and B, exact."""

    config: TrainConfig
    reasons: Mapping[str, str]
    rank: RankAdvice
    trained: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Advice:
    """What is advised, and what it will take: `memory` at the peak, by method."""

    advised: AdvisedConfig
    parameters: int
    memory: tuple[TrainingMemory, ...]
    time: TimeEstimate

    @property
    def trained_share(self) -> float:
        """Of the parameters of the base."""
        return self.advised.trained / self.parameters


def advise(model: ModelArchitecture, data: DataProfile, wishes: Wishes, name: str = "") -> Advice:
    """Return advice on training `model` with `data`, with its memory and time; arguments as for `advise_config`.

    Raises:
        InvalidRequestError: the model has no modules of the kind that the task asks for.
    """
    advised = advise_config(model, data, wishes, name)
    config = advised.config
    shape = shape_of(config)
    memory = tuple(training_memory(model, method, shape) for method in METHODS)
    method: Method = "qlora" if config.quantization in ("nf4", "fp4") else "lora"
    tokens, learned = (round(count * config.epochs) for count in (data.tokens_total, data.learned))
    time = estimate_time(model, method, advised.trained, tokens, learned, wishes.device)
    return Advice(advised, model.parameters, memory, time)


def advise_config(model: ModelArchitecture, data: DataProfile, wishes: Wishes, name: str = "") -> AdvisedConfig:
    """Return the configuration alone; `name` is what it calls the model, empty for what loads it.

    Raises:
        InvalidRequestError: the model has no modules of the kind that the task asks for.
    """
    rank = advise_rank(wishes.task, model.parameters, wishes.complexity)
    targets = choose_targets(model, advise_scope(wishes.task))
    ranks = (
        uniform_ranks(targets.modules, rank.rank)
        if wishes.one_rank
        else seed_ranks(targets.modules, model.modules, rank.rank)
    )
    values, reasons = _adapter_values(wishes, rank, targets, ranks, data)
    for more, why in (_run_values(model, data), _base_values(model, wishes)):
        values |= more
        reasons |= why
    if model.task == CLASSIFICATION:
        values["data_format"] = "labelled-text"
    config = TrainConfig(model=name or model.hub_id, data=data.source, output_dir=wishes.output_dir, **values)
    trained = sum(module.lora_parameters(ranks.ranks[module.name]) for module in targets.modules)
    return AdvisedConfig(config, reasons, rank, trained, _notes(data, config))


def shape_of(config: TrainConfig) -> TrainingShape:
    """Return what decides the memory of a run of `config`; "auto" of its dtype counts as bfloat16."""
    import torch

    return TrainingShape(
        rows=config.per_device_batch_size,
        length=config.max_length,
        dtype=torch.float32 if config.dtype == "float32" else torch.bfloat16,
        checkpointing=config.gradient_checkpointing,
        accumulation=config.gradient_accumulation_steps,
        rank=config.rank,
        targets=config.target_modules,
        rank_pattern=config.rank_pattern,
        dropout=config.dropout,
        double_quant=config.double_quant,
    )


def _adapter_values(
    wishes: Wishes, rank: RankAdvice, targets: Targets, ranks: ModuleRanks, data: DataProfile
) -> tuple[dict[str, Any], dict[str, str]]:
    dropout, why_dropout = advise_dropout(data.rows)
    values = {
        "rank": rank.rank,
        "alpha": float(seed("alpha_factor") * rank.rank),
        "dropout": dropout,
        "target_modules": targets.target_modules,
        "rank_pattern": dict(ranks.rank_pattern),
        "alpha_pattern": {name: float(alpha) for name, alpha in ranks.alpha_pattern.items()},
    }
    scope = advise_scope(wishes.task)
    reasons = {
        "rank": rank.reason,
        "alpha": f"{seed('alpha_factor')} * rank, so that the update is scaled by 2 whatever the rank",
        "dropout": why_dropout,
        "target_modules": f"{wishes.task} adapts {scope} modules: {len(targets.modules)} found in the model's blocks",
    }
    if ranks.rank_pattern:
        reasons["rank_pattern"] = "q and v learn most, gate and down least: the seed's proportions 32/16/8 at rank 16"
        reasons["alpha_pattern"] = "keeps alpha = 2 * rank in each of them; without it their scaling would change"
    return values, reasons


def _run_values(model: ModelArchitecture, data: DataProfile) -> tuple[dict[str, Any], dict[str, str]]:
    longest = min(-(-data.longest // _LENGTH_STEP) * _LENGTH_STEP, model.max_length)
    values = {
        "max_length": longest,
        "per_device_batch_size": seed("batch_size"),
        "gradient_accumulation_steps": seed("accumulation"),
        "learning_rate": seed("learning_rate"),
        "lr_scheduler_type": seed("scheduler"),
        "warmup_ratio": seed("warmup"),
        "epochs": float(seed("epochs")),
    }
    limit = f", and the model takes {model.max_length:,}" if longest == model.max_length else ""
    reasons = {
        "max_length": f"the longest row has {data.longest:,} tokens{' by estimate' if data.estimated else ''}{limit}",
        "learning_rate": "A and B start from nothing and take ten times what full fine-tuning takes",
        "warmup_ratio": "a tenth of the steps",
        "gradient_accumulation_steps": f"{seed('batch_size') * seed('accumulation')} rows in a step of the optimizer",
    }
    return values, reasons


def _base_values(model: ModelArchitecture, wishes: Wishes) -> tuple[dict[str, Any], dict[str, str]]:
    small = model.parameters < _SMALL or model.task == CLASSIFICATION
    why = (
        "our rule: 16 bits of a model this small fit anywhere, and four cost it quality (docs/LOG.md: 18 % perplexity)"
        if small
        else "QLoRA: the frozen base in four bits takes a quarter of the memory"
    )
    chosen = wishes.quantization or ("none" if small else "nf4")
    task = CLASSIFICATION if model.task == CLASSIFICATION else CAUSAL_LM
    return {"quantization": chosen, "task": task}, {"quantization": "as asked for" if wishes.quantization else why}


def _notes(data: DataProfile, config: TrainConfig) -> tuple[str, ...]:
    base_rate = config.learning_rate * seed("unfrozen_factor")
    notes = [f"layers of the base that are trained too want a tenth of the learning rate: {base_rate:g}"]
    if data.estimated:
        notes.append("no tokenizer at hand: token counts are estimated from characters")
    if config.task == CLASSIFICATION:
        notes.append("such a model can be trained and merged; the server refuses it, because it writes no text")
    return tuple(notes)
