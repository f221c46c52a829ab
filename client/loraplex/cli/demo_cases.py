"""What the demo asks and how it judges the answers: the example adapters with rows that they were not trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraplex.bench.load import RequestResult

AT_START = ("sentiment", "sql", "date")
"""Adapters that the demo's server has from the start."""
ADDED = "json"
"""The one that is registered while it runs."""
ROWS = 4
SHARE_RIGHT = 0.5
"""Of an adapter's answers that must be right, and more than the base's. On an NF4 base the adapters were measured at
69 to 98 of 100, json at 56 whole records (their `metrics.json`)."""
FIELDS_RIGHT = 0.75
"""Of a JSON record's fields that make it right here: json's usual mistake is one field, a city it never saw."""


@dataclass(frozen=True)
class Row:
    """A prompt, sent as one user message, and the answer that a trained adapter should give."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Example:
    """An example adapter: its name, its folder, and held-out rows."""

    name: str
    folder: Path
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Answer:
    """What the adapter and, beside it, the base wrote for one prompt."""

    adapter: str
    row: Row
    text: str
    base_text: str

    @property
    def right(self) -> bool:
        """Whether the adapter's answer is the expected one."""
        return is_right(self.text, self.row.completion)

    @property
    def base_right(self) -> bool:
        """Whether the base's is."""
        return is_right(self.base_text, self.row.completion)


def find_examples(start: Path | None = None) -> Path:
    """Return `adapters/examples` of the repository around `start` (default: the current folder), or around this file.

    Raises:
        FileNotFoundError: if neither lies in the repository.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents, *Path(__file__).resolve().parents):
        examples = folder / "adapters" / "examples"
        if (examples / "data").is_dir():
            return examples
    raise FileNotFoundError("the example adapters are not here: run this inside the repository, or give --examples DIR")


def read_example(examples: Path, name: str, count: int = ROWS) -> Example:
    """Return adapter `name` in the folder `examples` with its first `count` held-out rows.

    Raises:
        FileNotFoundError: if the adapter or its rows are not there.
    """
    folder, rows = examples / name, examples / "data" / f"{name}.test.jsonl"
    for needed in (folder / "adapter_config.json", rows):
        if not needed.is_file():
            raise FileNotFoundError(f"the example adapter {name} is incomplete: no {needed.relative_to(examples)}")
    lines = rows.read_text(encoding="utf-8").splitlines()[:count]
    return Example(name, folder, tuple(Row(**json.loads(line)) for line in lines))


def is_right(text: str, expected: str) -> bool:
    """Return whether the first line of `text` is `expected` and nothing else, white space around it aside.

    A JSON record is right with the expected keys and `FIELDS_RIGHT` of their values.
    """
    lines = text.strip().splitlines()
    if not lines:
        return False
    if not expected.startswith("{"):
        return lines[0].strip() == expected
    try:
        found, wanted = json.loads(lines[0]), json.loads(expected)
    except json.JSONDecodeError:
        return False
    if not isinstance(found, dict) or found.keys() != wanted.keys():
        return False
    return bool(sum(found[key] == value for key, value in wanted.items()) >= FIELDS_RIGHT * len(wanted))


def enough_right(answers: Sequence[Answer]) -> bool:
    """Return whether the adapters' answers are right often enough, and more often than the base's."""
    right, base_right = sum(answer.right for answer in answers), sum(answer.base_right for answer in answers)
    return right > base_right and right >= SHARE_RIGHT * len(answers)


def adapters_beside_base(requests: Iterable[RequestResult]) -> int:
    """Return how many distinct adapters, at the best moment, were writing while the base was writing too.

    A request writes from its first token to its end, as its sender saw it.
    """
    spans = [
        (request.started_s + request.ttft_s, request.started_s + request.e2el_s, request.adapter)
        for request in requests
        if request.ttft_s is not None and not request.error
    ]
    most = 0
    for moment, _, _ in spans:
        writing = {adapter for begin, end, adapter in spans if begin <= moment < end}
        if "" in writing:
            most = max(most, len(writing) - 1)
    return most
