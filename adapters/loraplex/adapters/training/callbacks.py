"""What happens beside the steps of transformers' trainer: telling, stopping, marking checkpoints."""

from __future__ import annotations

import time
from typing import Any

import transformers

from loraplex.adapters.training.answer_trainer import RunMeter
from loraplex.adapters.training.run_folder import RunFolder
from loraplex.adapters.training.watching import Observer, Progress, StopRequest


class Telling(transformers.TrainerCallback):
    """Tells an observer of steps, validations and checkpoints."""

    def __init__(self, observer: Observer, meter: RunMeter) -> None:
        self._observer = observer
        self._meter = meter
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Tell of the step; the last one's loss is logged whatever `logging_steps` says."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = self._meter.tokens / seconds
        self._observer.progress(Progress(state.global_step, state.max_steps, self._meter.take_loss(), rate))
        control.should_log = control.should_log or state.global_step >= state.max_steps
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell of the validation."""
        self._observer.note(f"step {state.global_step}: validation loss {kwargs['metrics']['eval_loss']:.4f}")


class Stopping(transformers.TrainerCallback):
    """Saves and stops at the end of a step when it was asked for."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Look whether it was."""
        if self._stop.is_set():
            control.should_save = control.should_training_stop = True
        return control


class Marking(transformers.TrainerCallback):
    """Marks checkpoints that were written as a whole."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the newest."""
        self._folder.mark_whole(state.global_step)


def tensorboard_callback(folder: RunFolder) -> Any:
    """Return the callback that writes TensorBoard's files to the run's folder."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder.logs)))  # type: ignore[no-untyped-call]
