"""Making adapters: the configuration of a training run, the run itself, and what is told about it."""

from __future__ import annotations

from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.train_result import TrainResult
from loraplex.adapters.training.trainer import train

__all__ = ["TrainConfig", "TrainResult", "train"]
