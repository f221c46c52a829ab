"""All of a run's data: read, checked, split and turned into tokens before anything is trained.

The rows are held in memory as Arrow tables, 8 bytes a token. Knows no model but its tokenizer.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.errors import InvalidRequestError
from loraplex.adapters.training.data_error import DataError
from loraplex.adapters.training.data_rows import read_rows
from loraplex.adapters.training.formatting import EncodedSample, Formatter
from loraplex.adapters.training.sample import Sample, SampleReader, detect_format
from loraplex.adapters.training.train_config import TrainConfig


@dataclass(frozen=True)
class TrainingData:
    """What a run learns and what it is measured on.

    Attributes:
        data_format: as detected or told.
        train, validation: `datasets.Dataset` with input_ids and labels (a class number for classification).
        held_out: the samples of `validation`, in its order.
        labels: the classes of a classification, sorted.
        longest: tokens of the longest row that is used.
        truncated, skipped: rows that were too long.
        digest: of all tokens, so that a run is not continued on other data.
    """

    data_format: str
    train: Any
    validation: Any
    held_out: tuple[Sample, ...]
    labels: tuple[str, ...]
    longest: int
    truncated: int
    skipped: int
    digest: str

    @property
    def train_tokens(self) -> int:
        """Tokens of one pass over the training rows."""
        return sum(map(len, self.train["input_ids"]))


def load_data(config: TrainConfig, tokenizer: Any, read: Callable[[int], None] = lambda count: None) -> TrainingData:
    """Read the data that `config` names; `read` is told the number of rows now and then.

    Raises:
        NotFoundError: there is no such file or data set.
        DataError: a row cannot be used; names file, line and field.
        InvalidRequestError: nothing is left to train on, or the model has no chat template for a conversation.
    """
    samples, data_format = _read_samples(config.data, config, read)
    if config.validation_data:
        train, held_out = samples, _read_samples(config.validation_data, config, read)[0]
    else:
        train, held_out = split(samples, config.validation_fraction, config.seed)
    labels = tuple(sorted({sample.label for sample in train})) if data_format == "labelled-text" else ()
    _check_labels(labels, held_out, data_format)
    encoder = _Encoder(config, tokenizer, data_format, labels)
    train_rows = encoder.encode(train)
    validation_rows = encoder.encode(held_out)
    if not train_rows:
        raise InvalidRequestError.of("data", "no row is left to train on: all were skipped as too long or held out")
    rows = [row for _, row in (*train_rows, *validation_rows)]
    return TrainingData(
        data_format,
        encoder.table(train_rows),
        encoder.table(validation_rows) if validation_rows else None,
        tuple(sample for sample, _ in validation_rows),
        labels,
        max(len(row.input_ids) for row in rows),
        encoder.truncated,
        encoder.skipped,
        _digest(rows),
    )


def split(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Return training and held-out samples; rows with one prompt are all on one side.

    About `fraction` of the prompts are held out: at least one, unless it is 0 or there is only one prompt.
    """
    keys = list(dict.fromkeys(sample.key for sample in samples))
    count = min(len(keys) - 1, max(1, round(len(keys) * fraction))) if fraction else 0
    chosen = set(random.Random(seed).sample(range(len(keys)), count))
    held = {key for index, key in enumerate(keys) if index in chosen}
    train = [sample for sample in samples if sample.key not in held]
    return train, [sample for sample in samples if sample.key in held]


def _read_samples(source: str, config: TrainConfig, read: Callable[[int], None]) -> tuple[list[Sample], str]:
    samples: list[Sample] = []
    reader: SampleReader | None = None
    for row in read_rows(source, config.data_split):
        reader = reader or SampleReader(config, detect_format(row.values, config, row.place))
        samples.append(reader.read(row))
        if len(samples) % 1000 == 0:
            read(len(samples))
    assert reader is not None
    return samples, reader.data_format


def _check_labels(labels: Sequence[str], held_out: Iterable[Sample], data_format: str) -> None:
    if data_format != "labelled-text":
        return
    if len(labels) < 2:
        raise InvalidRequestError.of("data", f"has {len(labels)} label in its training rows; a classification needs 2")
    for sample in held_out:
        if sample.label not in labels:
            raise DataError.at(sample.place, f"has the label {sample.label!r}, which no training row has")


class _Encoder:
    """Turns samples into rows of tokens, and counts those that are too long."""

    def __init__(self, config: TrainConfig, tokenizer: Any, data_format: str, labels: Sequence[str]) -> None:
        self.truncated = 0
        self.skipped = 0
        self._config = config
        self._tokenizer = tokenizer
        self._labels = labels
        self._classifies = data_format == "labelled-text"
        self._formatter = make_formatter(config, tokenizer, data_format)

    def encode(self, samples: Iterable[Sample]) -> list[tuple[Sample, EncodedSample]]:
        """Return each sample that is used with its tokens."""
        rows = []
        for sample in samples:
            row = self._fitting(sample, self._encoded(sample))
            if row is not None:
                rows.append((sample, row))
        return rows

    def table(self, rows: Sequence[tuple[Sample, EncodedSample]]) -> Any:
        """Return the rows as a `datasets.Dataset` in memory."""
        import datasets
        import pyarrow

        ids = pyarrow.array([row.input_ids for _, row in rows], pyarrow.list_(pyarrow.int32()))
        if self._classifies:
            labels = pyarrow.array([self._labels.index(sample.label) for sample, _ in rows], pyarrow.int32())
        else:
            labels = pyarrow.array([row.labels for _, row in rows], pyarrow.list_(pyarrow.int32()))
        return datasets.Dataset(pyarrow.table({"input_ids": ids, "labels": labels}))

    def _encoded(self, sample: Sample) -> EncodedSample:
        if self._classifies:
            ids = self._tokenizer(sample.text)["input_ids"]
            return EncodedSample(ids, list(ids))
        return self._formatter.encode(sample)

    def _fitting(self, sample: Sample, row: EncodedSample) -> EncodedSample | None:
        limit = self._config.max_length
        if len(row.input_ids) > limit:
            if self._config.long_rows == "refuse":
                raise DataError.at(
                    sample.place,
                    f"has {len(row.input_ids)} tokens, more than max_length ({limit}): raise it, or set long_rows to "
                    "truncate or skip",
                )
            row = row.truncated(limit)
            if self._config.long_rows == "skip" or not row.learned:
                self.skipped += 1
                return None
            self.truncated += 1
        if not row.learned and not self._classifies:
            raise DataError.at(sample.place, "has no token that could be learned")
        return row


def make_formatter(config: TrainConfig, tokenizer: Any, data_format: str) -> Formatter:
    """Return the formatter of a run.

    Raises:
        InvalidRequestError: the data needs a chat template, and the model has none.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    needed = data_format == "messages" or config.chat == "yes"
    if needed and not has_template:
        field = "chat_template" if data_format == "messages" else "chat"
        raise InvalidRequestError.of(field, "the model has no chat template: give one with chat_template")
    chat = has_template and config.chat != "no"
    return Formatter(tokenizer, chat=chat, completion_only=config.completion_only_loss)


def _digest(rows: Iterable[EncodedSample]) -> str:
    hasher = hashlib.sha256()
    for row in rows:
        hasher.update(repr((row.input_ids, row.labels)).encode())
    return hasher.hexdigest()
