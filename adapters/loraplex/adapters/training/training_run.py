"""One run in memory: base, fresh adapter, trainer; what is measured before and after, and what is saved.

Imports transformers, PEFT and TRL; `trainer.py` imports this when the data is known to be good.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig

from loraplex.adapters.folder import WEIGHTS_FILE
from loraplex.adapters.training.answer_trainer import AnswerTrainer, RunMeter
from loraplex.adapters.training.callbacks import Marking, Stopping, Telling, tensorboard_callback
from loraplex.adapters.training.classifier_trainer import ClassifierTrainer, score_classes
from loraplex.adapters.training.frozen_base import load_base, training_device
from loraplex.adapters.training.lora_model import add_adapter, count_parameters
from loraplex.adapters.training.peak_memory import PeakMemory
from loraplex.adapters.training.run_folder import RunFolder
from loraplex.adapters.training.saved_adapter import save_adapter
from loraplex.adapters.training.score import Answer, Score, answer, score_answers
from loraplex.adapters.training.serving_check import serving_problem
from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.train_result import TrainResult, logged_losses
from loraplex.adapters.training.trainer_arguments import planned_steps, trainer_arguments
from loraplex.adapters.training.training_data import TrainingData, make_formatter
from loraplex.adapters.training.watching import Observer, StopRequest

_EVA_BATCHES = 32
_KEPT_ANSWERS = 10


class TrainingRun:
    """A run, ready to train when it is made."""

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Any,
        data: TrainingData,
        folder: RunFolder,
        observer: Observer,
        stop: StopRequest,
    ) -> None:
        """Load the base, put a fresh adapter on it and make the trainer.

        Raises:
            PreconditionError: the model cannot be loaded.
            InvalidRequestError: a target does not exist.
            ResourceExhaustedError: there is no room for the checkpoints.
        """
        self._config, self._tokenizer, self._data, self._folder = config, tokenizer, data, folder
        self._observer, self._meter = observer, RunMeter()
        self._device = training_device(config)
        self._memory = PeakMemory(self._device)
        self._classifies = config.task == "sequence-classification"
        self._rows = _packed(data.train, config) if config.packing else data.train
        self.steps = planned_steps(config, len(self._rows))
        transformers.set_seed(config.seed)
        base = load_base(config, self._device, data.labels)
        base.config.pad_token_id = tokenizer.pad_token_id
        self._model = add_adapter(base, config, self._eva_batches(), folder.initial_adapter)
        self._count = count_parameters(self._model)
        folder.check_room(self._count.trainable, config.save_total_limit)
        # They hear of the run itself, not of the scores before and after it.
        self._listeners: list[Any] = [Telling(observer, self._meter)]
        if config.tensorboard:
            self._listeners.append(tensorboard_callback(folder))
        self._trainer = self._make_trainer(stop)
        self._problem = ""
        self._base_answers: list[Answer] = []

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self._trainer.state.global_step)

    def check_serving(self) -> None:
        """Find out before anything is trained whether a server could serve the adapter; tell if it could not."""
        with tempfile.TemporaryDirectory(dir=self._folder.path) as scratch:
            self._model.save_pretrained(scratch, save_embedding_layers=False)
            if not self._config.init_lora_weights.startswith("pissa"):
                self._problem = serving_problem(Path(scratch), self._config)
        if self._problem:
            self._observer.note(f"a server will not serve this adapter: {self._problem}")

    def base_score(self) -> Score | None:
        """Return the base's score: that of the model with its fresh adapter, which changes nothing.

        A run that goes on has it from when it began.
        """
        known = self._folder.state().get("base")
        if known is not None:
            self._base_answers = [Answer(**each) for each in known["answers"]]
            return Score(**known["score"])
        self._observer.phase("scoring the base")
        score, self._base_answers = self._score()
        if score is not None:
            answers = [vars(each) for each in self._base_answers]
            self._folder.write_state(base={"score": vars(score), "answers": answers})
        return score

    def train(self, checkpoint: Path | None) -> None:
        """Train to the end, from `checkpoint` if there is one."""
        if checkpoint is not None and self._take_finished(checkpoint):
            return
        transformers.set_seed(self._config.seed)
        for listener in self._listeners:
            self._trainer.add_callback(listener)
        self._trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        for listener in self._listeners:
            self._trainer.remove_callback(listener)

    def _take_finished(self, checkpoint: Path) -> bool:
        """Take the weights of a run that had come to its end; transformers would train it a step further."""
        state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < self.steps:
            return False
        best = state.best_model_checkpoint if self._config.early_stopping_patience else None
        weights = load_file(Path(best or checkpoint) / WEIGHTS_FILE)
        set_peft_model_state_dict(self._model, weights)
        self._trainer.state = state
        return True

    def result(self, seconds: float, base: Score | None) -> TrainResult:
        """Score the adapter and return all figures."""
        peak = self._memory.bytes()
        self._observer.phase("scoring the adapter")
        score, answers = self._score()
        return TrainResult(
            output_dir=Path(self._config.output_dir),
            steps=self.step,
            seconds=seconds,
            tokens=self._meter.tokens,
            train_rows=len(self._data.train),
            validation_rows=len(self._data.held_out),
            truncated_rows=self._data.truncated,
            skipped_rows=self._data.skipped,
            trainable_parameters=self._count.trainable,
            total_parameters=self._count.total,
            base=base,
            adapter=score,
            answers=tuple(zip(self._base_answers, answers, strict=False))[:_KEPT_ANSWERS],
            peak_memory=peak,
            stopped_early=self.step < self.steps,
            serving_problem=self._problem,
            losses=logged_losses(self._trainer.state.log_history),
        )

    def save(self, folder: Path) -> str:
        """Write the adapter to `folder`; return why a server cannot serve it, or nothing."""
        save_adapter(self._model, self._config, folder, self._folder.initial_adapter, self._data.labels)
        return serving_problem(folder, self._config)

    def _score(self) -> tuple[Score | None, list[Answer]]:
        data, config = self._data, self._config
        if data.validation is None:
            return None, []
        if self._classifies:
            return score_classes(self._trainer, data.validation), []
        loss = float(self._trainer.evaluate()["eval_loss"])
        if data.data_format == "text" or not config.score_rows:
            return Score(loss), []
        formatter = make_formatter(config, self._tokenizer, data.data_format)
        found = answer(self._model, formatter, data.held_out[: config.score_rows], config.score_max_new_tokens)
        return score_answers(loss, found), found

    def _make_trainer(self, stop: StopRequest) -> Any:
        config, validates = self._config, self._data.validation is not None
        arguments = trainer_arguments(config, self._folder, self._device, self.steps, validates=validates)
        options: dict[str, Any] = {
            "model": self._model,
            "train_dataset": self._rows,
            "eval_dataset": self._data.validation,
            "processing_class": self._tokenizer,
        }
        if self._classifies:
            options["args"] = transformers.TrainingArguments(**arguments)
            options["data_collator"] = transformers.DataCollatorWithPadding(self._tokenizer)
        else:
            # The rows are tokens with labels, and packed if they are to be: nothing is left to prepare.
            skip = {"skip_prepare_dataset": True}
            arguments |= {"packing": config.packing, "eval_packing": False, "max_length": config.max_length}
            options["args"] = SFTConfig(**arguments, dataset_kwargs=skip)
        if config.loraplus_lr_ratio is not None:
            options["optimizers"] = (self._loraplus(options["args"], config.loraplus_lr_ratio), None)
        trainer: Any = ClassifierTrainer if self._classifies else AnswerTrainer
        made = trainer(self._meter, **options)
        made.remove_callback(transformers.PrinterCallback)
        callbacks: list[Any] = [Stopping(stop), Marking(self._folder)]
        if config.early_stopping_patience:
            callbacks.append(transformers.EarlyStoppingCallback(config.early_stopping_patience))
        for callback in callbacks:
            made.add_callback(callback)
        return made

    def _loraplus(self, arguments: Any, ratio: float) -> Any:
        """Return LoRA+'s optimizer: B learns `ratio` times as fast as A (Hayou et al. 2024)."""
        from peft.optimizers import create_loraplus_optimizer

        kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
        return create_loraplus_optimizer(self._model, kind, loraplus_lr_ratio=ratio, **options)

    def _eva_batches(self) -> list[dict[str, torch.Tensor]]:
        if self._config.init_lora_weights != "eva":
            return []
        size = self._config.per_device_batch_size
        rows = self._data.train.select_columns(["input_ids"])
        batches = []
        for start in range(0, min(len(rows), _EVA_BATCHES * size), size):
            columns = rows[start : start + size]
            batches.append(dict(self._tokenizer.pad(columns, return_tensors="pt").to(self._device)))
        return batches


def _packed(rows: Any, config: TrainConfig) -> Any:
    """Return the rows put together into sequences of up to `max_length` tokens, by TRL's best-fit-decreasing."""
    return pack_dataset(rows, config.max_length, "bfd")
