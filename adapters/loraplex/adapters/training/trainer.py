"""A training run from its configuration to an adapter folder: the order of things, and what is left if one fails.

What each thing is stands in the modules beside this one.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.adapters.disk import check_new_folder, move_folder, parents_made, partial_folder, sync_folder
from loraplex.adapters.training.failures import TrainingInterruptedError, failures_are_typed
from loraplex.adapters.training.frozen_base import load_tokenizer
from loraplex.adapters.training.model_card import model_card
from loraplex.adapters.training.quiet_libraries import quiet_libraries
from loraplex.adapters.training.run_folder import RunFolder
from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.train_result import TrainResult
from loraplex.adapters.training.training_data import TrainingData, load_data
from loraplex.adapters.training.watching import Observer, Silent, StopRequest

if TYPE_CHECKING:
    from loraplex.adapters.training.training_run import TrainingRun

METRICS_FILE = "metrics.json"
CONFIG_COPY = "train.yaml"


def train(
    config: TrainConfig, observer: Observer | None = None, stop: StopRequest | None = None, *, resume: bool = False
) -> TrainResult:
    """Train what `config` says and write the adapter to its `output_dir`, whole or not at all.

    The folder holds what PEFT writes, a model card, `metrics.json` and `train.yaml`. Checkpoints and logs lie in
    `config.run_dir`; the checkpoints go when the adapter is there, and stay when something fails. With `resume` the
    last whole one is continued, to the same weights as if nothing had happened in between. `stop` may be set from
    elsewhere: the run then saves a checkpoint at the end of the step.

    Raises:
        DataError: a row cannot be used; names file, line and field.
        InvalidRequestError: the configuration does not suit the model, or the run that is resumed.
        NotFoundError: there is no such data, or nothing to resume.
        AlreadyExistsError: the output folder is there, or checkpoints of an earlier run are.
        PreconditionError: the model cannot be loaded.
        ResourceExhaustedError: the memory or the disk is full.
        TrainingInterruptedError: `stop` was set.
        OSError: a file cannot be read or written.
    """
    observer = Silent() if observer is None else observer
    stop = StopRequest() if stop is None else stop
    check_new_folder(Path(config.output_dir))
    folder = RunFolder(config.run_dir)
    with quiet_libraries():
        observer.phase("reading the data")
        tokenizer = load_tokenizer(config)
        data = load_data(config, tokenizer, lambda count: observer.phase(f"reading the data ({count:,} rows)"))
        _tell_of_data(data, observer)
        with parents_made(folder.path), folder.opened(config, resume=resume) as checkpoint:
            folder.check_data(data.digest)
            try:
                with failures_are_typed("training", f"whole checkpoints are kept in {folder.path}"):
                    return _run(config, tokenizer, data, folder, checkpoint, observer, stop)
            finally:
                folder.remove_unfinished()
                if not folder.has_checkpoint and not Path(config.output_dir).exists():
                    shutil.rmtree(folder.path, ignore_errors=True)


def _run(
    config: TrainConfig,
    tokenizer: Any,
    data: TrainingData,
    folder: RunFolder,
    checkpoint: Path | None,
    observer: Observer,
    stop: StopRequest,
) -> TrainResult:
    # torch, transformers, PEFT and TRL take ten seconds to import: not before the data is known to be good.
    from loraplex.adapters.training.training_run import TrainingRun

    observer.phase("loading the model")
    run = TrainingRun(config, tokenizer, data, folder, observer, stop)
    run.check_serving()
    base = run.base_score()
    if stop.is_set():
        raise TrainingInterruptedError("interrupted before the first step: there is nothing to resume")
    started = time.monotonic()
    observer.phase("training")
    run.train(checkpoint)
    seconds = time.monotonic() - started
    if stop.is_set():
        raise TrainingInterruptedError(
            f"stopped after step {run.step} of {run.steps}: the checkpoint is in {folder.path}, resume goes on from it"
        )
    result = run.result(seconds, base)
    observer.phase("writing the adapter")
    result = _write(run, config, result)
    folder.remove_checkpoints()
    return result


def _write(run: TrainingRun, config: TrainConfig, result: TrainResult) -> TrainResult:
    """Write the adapter's folder, whole or not at all; return `result` with what a server would say of it."""
    output = Path(config.output_dir)
    with parents_made(output), partial_folder(output) as folder:
        result = replace(result, serving_problem=run.save(folder))
        (folder / "README.md").write_text(model_card(config, result), encoding="utf-8")
        (folder / CONFIG_COPY).write_text(config.to_yaml(), encoding="utf-8")
        metrics = json.dumps(result.to_json(), indent=2, ensure_ascii=False)
        (folder / METRICS_FILE).write_text(metrics + "\n", encoding="utf-8")
        sync_folder(folder)
        move_folder(folder, output)
    return result


def _tell_of_data(data: TrainingData, observer: Observer) -> None:
    held_out = len(data.held_out)
    observer.note(
        f"{len(data.train):,} rows to train on, {held_out:,} held out; {data.data_format}, longest {data.longest}"
    )
    for count, what in ((data.truncated, "truncated"), (data.skipped, "skipped as too long")):
        if count:
            observer.note(f"{count:,} rows {what}")
