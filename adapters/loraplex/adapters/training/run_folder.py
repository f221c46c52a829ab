"""The folder beside an adapter in which its run keeps checkpoints, logs and what it must be continued with.

A checkpoint counts once it is marked as whole: what an interrupted or failed save leaves is removed, never read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.adapters.disk import free_bytes, lock_folder
from loraplex.adapters.errors import (
    AlreadyExistsError,
    FieldViolation,
    InvalidRequestError,
    NotFoundError,
    ResourceExhaustedError,
)
from loraplex.adapters.training.train_config import TrainConfig

STATE_FILE = "run.json"
WHOLE_MARK = "whole"
# What may differ when a run goes on: none of it changes the weights.
_FREE_FIELDS = frozenset(
    {"output_dir", "base_model_name", "logging_steps", "save_total_limit", "score_rows", "score_max_new_tokens"}
    | {"tensorboard"}
)
# Adam keeps two numbers beside each weight, all float32.
_CHECKPOINT_BYTES_PER_PARAMETER = 12


@dataclass(frozen=True)
class RunFolder:
    """The run's folder at `path`."""

    path: Path

    @property
    def logs(self) -> Path:
        """Where TensorBoard's files go."""
        return self.path / "logs"

    @property
    def initial_adapter(self) -> Path:
        """Where PiSSA's start is kept."""
        return self.path / "initial"

    @contextmanager
    def opened(self, config: TrainConfig, *, resume: bool) -> Iterator[Path | None]:
        """Take the folder for this run alone; yield the checkpoint to go on from, if there is one.

        Raises:
            AlreadyExistsError: an earlier run left checkpoints, and it is not to be resumed.
            NotFoundError: there is nothing to resume.
            InvalidRequestError: it is to be resumed with another configuration.
            PreconditionError: another process uses it.
        """
        if resume and not self.path.is_dir():
            raise NotFoundError(f"there is no run to resume: {self.path} does not exist")
        self.path.mkdir(parents=True, exist_ok=True)
        with lock_folder(self.path):
            self.remove_unfinished()
            checkpoint = self._last_checkpoint()
            if checkpoint is not None and not resume:
                raise AlreadyExistsError(
                    f"{self.path} holds {checkpoint.name} of an earlier run: go on with --resume, or remove the folder"
                )
            if resume and checkpoint is None:
                raise NotFoundError(f"there is no run to resume: no checkpoint in {self.path}")
            if resume:
                self._check_config(config)
            else:
                self.write_state(config=config.to_values())
            yield checkpoint

    def state(self) -> dict[str, Any]:
        """Return what the run must be continued with."""
        path = self.path / STATE_FILE
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return state

    def write_state(self, **values: Any) -> None:
        """Add `values` to the state."""
        partial = self.path / f"{STATE_FILE}.partial"
        partial.write_text(json.dumps(self.state() | values, indent=2, ensure_ascii=False), encoding="utf-8")
        partial.replace(self.path / STATE_FILE)

    def check_data(self, digest: str) -> None:
        """Keep the data's digest, or compare it with that of the run that goes on.

        Raises:
            InvalidRequestError: the data has changed.
        """
        if self.state().get("data_digest", digest) != digest:
            raise InvalidRequestError.of("data", "has changed since the checkpoint was written: begin a new run")
        self.write_state(data_digest=digest)

    def check_room(self, trainable: int, checkpoints: int) -> None:
        """Check that the checkpoints of `trainable` parameters will fit, before anything is trained.

        Raises:
            ResourceExhaustedError: there is less room than that.
        """
        # One more than is kept: the oldest goes after the newest is written.
        needed = trainable * _CHECKPOINT_BYTES_PER_PARAMETER * (checkpoints + 1)
        free = free_bytes(self.path)
        if free < needed:
            raise ResourceExhaustedError(
                f"the checkpoints need {needed / 1e6:.0f} MB and {self.path} has room for {free / 1e6:.0f}: free some "
                "space, or lower save_total_limit or rank"
            )

    def mark_whole(self, step: int) -> None:
        """Mark the checkpoint of `step` as complete."""
        (self.path / f"checkpoint-{step}" / WHOLE_MARK).touch()

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is one to go on from."""
        return self._last_checkpoint() is not None

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints of a run that is done; the logs stay."""
        for path in (*self._checkpoints(), self.initial_adapter):
            shutil.rmtree(path, ignore_errors=True)

    def _checkpoints(self) -> list[Path]:
        found = [path for path in self.path.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
        return sorted(found, key=lambda path: int(path.name.partition("-")[2]))

    def _last_checkpoint(self) -> Path | None:
        return next(reversed(self._checkpoints()), None)

    def remove_unfinished(self) -> None:
        """Remove what a failed save left."""
        for path in self._checkpoints():
            if not (path / WHOLE_MARK).is_file():
                shutil.rmtree(path, ignore_errors=True)

    def _check_config(self, config: TrainConfig) -> None:
        before, now = self.state().get("config", {}), config.to_values()
        changed = [name for name in now if name not in _FREE_FIELDS and before.get(name) != now[name]]
        if changed:
            raise InvalidRequestError(
                [
                    FieldViolation(name, f"was {before.get(name)!r} when the run began and is {now[name]!r} now")
                    for name in changed
                ]
            )
