"""A fixed English text to measure a model's quality on: the dialogues of the package chatterbot-corpus."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

PACKAGE = "chatterbot_corpus"


class TextMissingError(RuntimeError):
    """The package that holds the text is not installed."""


def fixed_text() -> str:
    """Return all English dialogues, a sentence a line, in the order of their files.

    Raises:
        TextMissingError: if the package is not installed.
    """
    import yaml

    lines: list[str] = []
    for path in sorted((_package_folder() / "data" / "english").glob("*.yml")):
        for conversation in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            lines += (str(sentence) for sentence in conversation)
    return "\n".join(lines)


def text_name() -> str:
    """Return what the text is, to be written beside a figure."""
    return f"chatterbot-corpus {version('chatterbot-corpus')}, English"


def windows(tokens: list[int], rows: int, length: int) -> list[list[int]]:
    """Return `rows` stretches of `length` tokens, spread evenly over all of them.

    Raises:
        ValueError: if there are not that many tokens.
    """
    if rows * length > len(tokens):
        raise ValueError(f"{rows} windows of {length} tokens need {rows * length}, the text has {len(tokens)}")
    return list(_spread(tokens, rows, length))


def _spread(tokens: list[int], rows: int, length: int) -> Iterator[list[int]]:
    step = len(tokens) // rows
    for row in range(rows):
        yield tokens[row * step : row * step + length]


def _package_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise TextMissingError("the text is not installed: pip install 'loraplex[bench]'")
    return Path(next(iter(spec.submodule_search_locations)))
