"""What `loraplex train` does: reads the configuration, trains under a progress bar, registers the result."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RemainingColumn
from rich.table import Table

from loraplex.adapters.errors import InvalidRequestError, PreconditionError
from loraplex.adapters.training import TrainConfig, TrainResult, train
from loraplex.adapters.training.failures import TrainingInterruptedError
from loraplex.adapters.training.serving_check import CLASSIFIER_REASON
from loraplex.adapters.training.watching import Progress as Step
from loraplex.adapters.training.watching import StopRequest
from loraplex.cli.model import DEMO, with_demo
from loraplex.cli.output import to_stderr, to_stdout
from loraplex.client import Client, Registration

_SHOWN_ANSWERS = 3
_READY_S = 10.0


@dataclass(frozen=True)
class Trained:
    """The result of a run, and what the server made of it, if one was asked."""

    result: TrainResult
    registration: Registration | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        adapter = self.registration.adapter if self.registration is not None else None
        registered = {"name": adapter.name, "digest": adapter.digest} if adapter is not None else None
        return {**self.result.to_json(), "registered": registered}


def read_config(path: Path | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration in the file `path`, with `overrides` in place of what it says; without it only these.

    Raises:
        NotFoundError: there is no such file.
        InvalidRequestError: a field is unknown, missing or wrong.
    """
    if path is None:
        return TrainConfig.from_values(overrides)
    return TrainConfig.from_yaml(path, overrides)


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Return the fields that `FIELD=VALUE` texts set; values are read as YAML.

    Raises:
        BadParameter: a text has no field, or its value is not YAML.
    """
    parsed: dict[str, Any] = {}
    for text in settings:
        field, equals, value = text.partition("=")
        if not field or not equals:
            raise typer.BadParameter(f"must be FIELD=VALUE, not {text!r}", param_hint="--set")
        try:
            parsed[field.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise typer.BadParameter(f"{field} has a value that is not YAML: {value!r}", param_hint="--set") from error
    return parsed


def run(config: TrainConfig, *, resume: bool, register: str = "", name: str = "") -> Trained | None:
    """Train; register the adapter in the server `register` if it is given. None if the run was interrupted.

    Raises:
        LoraplexError: the data, the model or the configuration cannot be used, or the disk or memory is full.
        LoraplexClientError: the server cannot be reached, or refuses the adapter.
    """
    if register and config.task == "sequence-classification":
        raise InvalidRequestError.of("--register", CLASSIFIER_REASON)
    if register:
        # Not to find out after hours of training.
        with Client(register) as client:
            client.wait_until_ready(_READY_S)
    config = with_base(config)
    console, stop = to_stderr(), StopRequest()
    try:
        with stopped_by_signals(stop, console), _Screen(console) as screen:
            result = train(config, screen, stop, resume=resume)
    except TrainingInterruptedError as error:
        console.print(str(error), soft_wrap=True)
        return None
    if not register:
        return Trained(result)
    if result.serving_problem:
        raise PreconditionError(f"{result.output_dir} is written but not registered: {result.serving_problem}")
    with Client(register) as client:
        return Trained(result, client.upload_adapter(name or result.output_dir.name, result.output_dir))


def with_base(config: TrainConfig) -> TrainConfig:
    """Return `config` with the base's folder as its model, fetched or converted if need be, and its name beside it.

    Raises:
        ModelLoadError: there is no such model.
    """
    from loraplex.server.models.demo import DEMO_NAME
    from loraplex.server.models.source import resolve_model

    public = DEMO_NAME if config.model == DEMO and not Path(DEMO).exists() else config.model
    folder = resolve_model(with_demo(config.model))
    return replace(config, model=str(folder), base_model_name=config.base_model_name or public)


@contextmanager
def stopped_by_signals(stop: StopRequest, console: Console) -> Iterator[None]:
    """Within the block the first SIGINT or SIGTERM sets `stop`; the next ends the program as it always does."""

    def ask(signum: int, frame: FrameType | None) -> None:
        stop.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        console.print("stopping at the end of this step, with a checkpoint; once more stops at once")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Screen:
    """Shows a run on the console: its phases, a bar of its steps with loss and tokens a second, and its notes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        numbers = TextColumn("{task.fields[numbers]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), numbers)
        times = (TimeElapsedColumn(), RemainingColumn())
        self._bar = Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal)
        self._task: TaskID = self._bar.add_task("starting", total=None, numbers="")

    def __enter__(self) -> _Screen:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def phase(self, description: str) -> None:
        """Name the bar after what is done now."""
        self._bar.reset(self._task, total=None, description=description, numbers="")

    def progress(self, progress: Step) -> None:
        """Advance the bar."""
        numbers = f"loss {progress.loss:.4f}, {progress.tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=progress.step, total=progress.steps, numbers=numbers)

    def note(self, text: str) -> None:
        """Write a line above the bar."""
        self._console.print(text, soft_wrap=True, markup=False)


def show(done: Trained) -> None:
    """Write the scores, some answers and what to do next to stdout."""
    result, console = done.result, to_stdout()
    if result.base is not None and result.adapter is not None:
        table = Table(title=f"{result.validation_rows} held-out rows")
        table.add_column("")
        for column in ("loss", "perplexity", "exact", "contained"):
            table.add_column(column, justify="right", no_wrap=True)
        for label, score in (("base", result.base), ("with the adapter", result.adapter)):
            shares = ("" if share is None else f"{share:.1%}" for share in (score.accuracy, score.contained))
            table.add_row(label, f"{score.loss:.4f}", f"{score.perplexity:.2f}", *shares)
        console.print(table)
    for base, adapter in result.answers[:_SHOWN_ANSWERS]:
        console.print(f"  {base.prompt!r:.200}", markup=False)
        console.print(f"    adapter: {adapter.text.strip()!r:.200}", markup=False, style="green")
        console.print(f"    base:    {base.text.strip()!r:.200}", markup=False, style="dim")
    console.print(
        f"{result.steps} steps, {result.tokens_per_second:,.0f} tokens/s, {result.seconds:.0f} s; "
        f"{result.trainable_parameters:,} of {result.total_parameters:,} parameters trained",
        soft_wrap=True,
    )
    if result.serving_problem:
        console.print(f"a server cannot serve it: {result.serving_problem}", soft_wrap=True, markup=False)
    if done.registration is not None:
        registered = done.registration.adapter
        console.print(f"registered as {registered.name}, {registered.digest}", soft_wrap=True)
