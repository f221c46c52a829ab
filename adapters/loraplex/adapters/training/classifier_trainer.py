"""transformers' trainer for a text classifier, with the run's meter, and the score of its classes."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from loraplex.adapters.training.answer_trainer import RunMeter
from loraplex.adapters.training.score import Score


class ClassifierTrainer(transformers.Trainer):
    """`Trainer` with `meter`."""

    def __init__(self, meter: RunMeter, **options: Any) -> None:
        """Make the trainer."""
        super().__init__(**options)
        self._meter = meter

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the model's own cross-entropy of the classes."""
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            loss = result[0] if return_outputs else result
            passes = self.args.gradient_accumulation_steps
            self._meter.add(inputs, loss if num_items_in_batch is not None else loss / passes)
        return result


def score_classes(trainer: Any, rows: Any) -> Score:
    """Return the score on the `datasets.Dataset` `rows` of input_ids and labels."""
    trainer.args.prediction_loss_only = False
    try:
        found = trainer.predict(rows, metric_key_prefix="eval")
    finally:
        trainer.args.prediction_loss_only = True
    logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    predicted = torch.as_tensor(logits).argmax(dim=-1)
    right = (predicted == torch.as_tensor(found.label_ids)).float().mean().item()
    return Score(found.metrics["eval_loss"], len(rows), right)
