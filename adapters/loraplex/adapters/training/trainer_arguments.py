"""A training configuration in the words of transformers' trainer."""

from __future__ import annotations

import math
from typing import Any

import torch

from loraplex.adapters.training.run_folder import RunFolder
from loraplex.adapters.training.train_config import TrainConfig

_TIMES_A_RUN = 10


def planned_steps(config: TrainConfig, sequences: int) -> int:
    """Return how many optimizer steps a run over `sequences` rows (or packed sequences) has."""
    if config.max_steps:
        return config.max_steps
    batches = math.ceil(sequences / config.per_device_batch_size)
    return max(1, math.ceil(config.epochs * math.ceil(batches / config.gradient_accumulation_steps)))


def trainer_arguments(
    config: TrainConfig, folder: RunFolder, device: torch.device, steps: int, *, validates: bool
) -> dict[str, Any]:
    """Return the arguments that `TrainingArguments` and TRL's `SFTConfig` share."""
    eval_steps = min(config.eval_steps or math.ceil(steps / _TIMES_A_RUN), steps)
    save_steps = config.save_steps or math.ceil(steps / _TIMES_A_RUN)
    stops_early = config.early_stopping_patience > 0
    return {
        "output_dir": str(folder.path),
        "max_steps": steps,
        "per_device_train_batch_size": config.per_device_batch_size,
        "per_device_eval_batch_size": config.per_device_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_checkpointing": config.gradient_checkpointing,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": math.ceil(steps * config.warmup_ratio),
        "weight_decay": config.weight_decay,
        "optim": config.optim,
        "max_grad_norm": config.max_grad_norm,
        "logging_steps": config.logging_steps,
        "eval_strategy": "steps" if validates else "no",
        "eval_steps": eval_steps,
        "save_strategy": "steps",
        # The best checkpoint can only be one that was validated.
        "save_steps": eval_steps if stops_early else save_steps,
        "save_total_limit": config.save_total_limit,
        "load_best_model_at_end": stops_early,
        "metric_for_best_model": "eval_loss" if stops_early else None,
        "greater_is_better": False if stops_early else None,
        "restore_callback_states_from_checkpoint": stops_early,
        "prediction_loss_only": True,
        "seed": config.seed,
        "use_cpu": device.type == "cpu",
        # The frozen weights are in their dtype and the adapter in float32: there is nothing to cast on the way.
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
