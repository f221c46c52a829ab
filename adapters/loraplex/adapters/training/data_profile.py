"""What a data file holds, as far as advice depends on it: rows, their format and their lengths in tokens.

Rows are read and turned into tokens as the trainer does it. Without a tokenizer, tokens are estimated from characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraplex.adapters.errors import PreconditionError
from loraplex.adapters.training.data_rows import read_rows
from loraplex.adapters.training.frozen_base import load_tokenizer
from loraplex.adapters.training.sample import Sample, SampleReader, detect_format
from loraplex.adapters.training.train_config import TrainConfig
from loraplex.adapters.training.training_data import make_formatter

CHARACTERS_PER_TOKEN = 4
"""Of English text; code and other languages have fewer."""


@dataclass(frozen=True)
class DataProfile:
    """The rows of `source`.

    Attributes:
        data_format: as the trainer would detect it.
        lengths: tokens of each row, ascending.
        learned: tokens of all rows that are learned, the others are only read.
        estimated: whether tokens were estimated from characters.
    """

    source: str
    data_format: str
    lengths: Sequence[int]
    learned: int
    estimated: bool = False

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.lengths)

    @property
    def tokens_total(self) -> int:
        """Tokens of all rows."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.lengths[-1]

    @property
    def median(self) -> int:
        """Tokens of the row in the middle."""
        return self.lengths[self.rows // 2]

    def quantile(self, share: float) -> int:
        """Return the length that this share of the rows does not exceed."""
        return self.lengths[min(self.rows - 1, int(share * self.rows))]

    def longer_than(self, length: int) -> int:
        """Return how many rows have more tokens than `length`."""
        return sum(each > length for each in self.lengths)


def profile_data(config: TrainConfig, *, fetch: bool = True) -> DataProfile:
    """Read the data that `config` names with the tokenizer of its model, if that is at hand.

    With `fetch` a hub id's tokenizer is fetched; without, only the hub's cache is looked into.

    Raises:
        NotFoundError: there is no such file or data set.
        DataError: a row cannot be used; names file, line and field.
    """
    samples: list[Sample] = []
    reader: SampleReader | None = None
    for row in read_rows(config.data, config.data_split):
        reader = reader or SampleReader(config, detect_format(row.values, config, row.place))
        samples.append(reader.read(row))
    assert reader is not None, "a file without rows was refused"
    tokenizer = _tokenizer(config, fetch)
    measure = _estimated if tokenizer is None else _counted(config, tokenizer, reader.data_format)
    pairs = [measure(sample) for sample in samples]
    lengths = sorted(length for length, _ in pairs)
    return DataProfile(
        config.data, reader.data_format, lengths, sum(learned for _, learned in pairs), tokenizer is None
    )


def _tokenizer(config: TrainConfig, fetch: bool) -> Any:
    if not fetch and not Path(config.model).expanduser().is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(config.model, "tokenizer_config.json")
        if not isinstance(cached, str):
            return None
        config = replace(config, model=str(Path(cached).parent))
    try:
        return load_tokenizer(config)
    except PreconditionError:
        return None


def _counted(config: TrainConfig, tokenizer: Any, data_format: str) -> Callable[[Sample], tuple[int, int]]:
    if data_format == "labelled-text":
        return lambda sample: (len(tokenizer(sample.text)["input_ids"]), 1)
    formatter = make_formatter(config, tokenizer, data_format)

    def measure(sample: Sample) -> tuple[int, int]:
        row = formatter.encode(sample)
        return len(row.input_ids), row.learned

    return measure


def _estimated(sample: Sample) -> tuple[int, int]:
    read = sample.prompt + sample.text + "".join(message.content for message in sample.messages[:-1])
    learned = len(sample.answer or sample.text)
    return -(-(len(read) + len(sample.answer)) // CHARACTERS_PER_TOKEN), -(-learned // CHARACTERS_PER_TOKEN)
