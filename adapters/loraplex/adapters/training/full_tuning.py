"""Full fine-tuning of a small model, to compare LoRA with: the trainer's data, loss, steps and scores, no adapter.

Nothing of it is kept but the figures. Imports transformers and TRL.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import transformers
from trl.trainer.sft_config import SFTConfig

from loraplex.adapters.errors import InvalidRequestError
from loraplex.adapters.training.answer_trainer import AnswerTrainer, RunMeter
from loraplex.adapters.training.architecture import CAUSAL_LM
from loraplex.adapters.training.callbacks import Telling
from loraplex.adapters.training.failures import failures_are_typed
from loraplex.adapters.training.frozen_base import load_base, load_tokenizer, training_device
from loraplex.adapters.training.peak_memory import PeakMemory
from loraplex.adapters.training.quiet_libraries import quiet_libraries
from loraplex.adapters.training.run_folder import RunFolder
from loraplex.adapters.training.score import Score, answer, score_answers
from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.train_result import TrainResult, logged_losses
from loraplex.adapters.training.trainer_arguments import planned_steps, trainer_arguments
from loraplex.adapters.training.training_data import TrainingData, load_data, make_formatter
from loraplex.adapters.training.watching import Observer, Silent


def tune_fully(config: TrainConfig, observer: Observer | None = None) -> TrainResult:
    """Train all parameters of the model that `config` names; what it says of an adapter is passed over.

    Raises:
        InvalidRequestError: the model is to be quantized, or to classify.
        DataError: a row cannot be used; names file, line and field.
        PreconditionError: the model cannot be loaded.
        ResourceExhaustedError: the memory is full.
    """
    if config.quantization != "none" or config.task != CAUSAL_LM:
        raise InvalidRequestError.of("quantization", "must be none, and the task causal-lm, to train all parameters")
    observer = observer or Silent()
    with (
        quiet_libraries(),
        tempfile.TemporaryDirectory(prefix="loraplex-full-") as scratch,
        failures_are_typed("training", "nothing was written"),
    ):
        observer.phase("reading the data")
        tokenizer = load_tokenizer(config)
        data = load_data(config, tokenizer)
        observer.phase("loading the model")
        return _FullTuning(config, tokenizer, data, Path(scratch), observer).run()


class _FullTuning:
    """One run in memory."""

    def __init__(
        self, config: TrainConfig, tokenizer: Any, data: TrainingData, scratch: Path, observer: Observer
    ) -> None:
        self._config, self._tokenizer, self._data, self._observer = config, tokenizer, data, observer
        device = training_device(config)
        self._memory, self._meter = PeakMemory(device), RunMeter()
        self._steps = planned_steps(config, len(data.train))
        transformers.set_seed(config.seed)
        self._model = load_base(config, device).requires_grad_(True)
        self._model.config.pad_token_id = tokenizer.pad_token_id
        arguments = trainer_arguments(config, RunFolder(scratch), device, self._steps, validates=True)
        # A checkpoint would be as large as the model three times over, and nobody goes on from it.
        arguments |= {"save_strategy": "no", "eval_strategy": "no"}
        self._trainer: Any = AnswerTrainer(
            self._meter,
            model=self._model,
            args=SFTConfig(**arguments, max_length=config.max_length, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=tokenizer,
        )
        self._trainer.remove_callback(transformers.PrinterCallback)
        self._trainer.add_callback(Telling(observer, self._meter))

    def run(self) -> TrainResult:
        """Train, with a score before and after."""
        self._observer.phase("scoring the base")
        base = self._score()
        started = time.monotonic()
        self._observer.phase("training")
        self._trainer.train()
        seconds = time.monotonic() - started
        peak = self._memory.bytes()
        self._observer.phase("scoring the trained model")
        score = self._score()
        parameters = sum(parameter.numel() for parameter in self._model.parameters())
        return TrainResult(
            output_dir=Path(self._config.output_dir),
            steps=self._steps,
            seconds=seconds,
            tokens=self._meter.tokens,
            train_rows=len(self._data.train),
            validation_rows=len(self._data.held_out),
            truncated_rows=self._data.truncated,
            skipped_rows=self._data.skipped,
            trainable_parameters=parameters,
            total_parameters=parameters,
            base=base,
            adapter=score,
            answers=(),
            peak_memory=peak,
            stopped_early=False,
            serving_problem="a fine-tuned model is no adapter",
            losses=logged_losses(self._trainer.state.log_history),
        )

    def _score(self) -> Score | None:
        data, config = self._data, self._config
        if data.validation is None:
            return None
        loss = float(self._trainer.evaluate()["eval_loss"])
        if data.data_format == "text" or not config.score_rows:
            return Score(loss)
        formatter = make_formatter(config, self._tokenizer, data.data_format)
        rows = data.held_out[: config.score_rows]
        return score_answers(loss, answer(self._model, formatter, rows, config.score_max_new_tokens))
