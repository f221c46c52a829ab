"""What a row means: a prompt with its completion, a conversation, a text, or a text with a label.

Checks the types of what is used and leaves other columns alone. Knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.training.data_error import DataError
from loraplex.adapters.training.data_rows import DataRow
from loraplex.adapters.training.train_config import TrainConfig

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Sample:
    """One row, checked; which fields are filled depends on the data's format.

    Attributes:
        place: file and line, for messages to people.
        messages: of a conversation; its assistant's turns are learned.
        prompt, completion: of a prompt with its completion.
        text: to be learned from its beginning to its end, or to be labelled.
        label: of a text that is classified.
    """

    place: str
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    text: str = ""
    label: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """What must not be in training and validation at once: the question, or the whole text."""
        return self.messages[:-1], self.prompt, self.text

    @property
    def answer(self) -> str:
        """The text that is expected after the prompt; empty for a plain text."""
        return self.messages[-1].content if self.messages else self.completion


def detect_format(values: Mapping[str, Any], config: TrainConfig, place: str) -> str:
    """Return the data format that the columns of the first row speak for.

    Raises:
        DataError: for none; says which columns there are and which fields name others.
    """
    if config.data_format != "auto":
        return config.data_format
    if config.task == "sequence-classification":
        return "labelled-text"
    if config.messages_field in values:
        return "messages"
    if config.prompt_field in values or config.completion_field in values:
        return "prompt-completion"
    if config.text_field in values:
        return "text"
    wanted = (
        f"{config.messages_field}, or {config.prompt_field} and {config.completion_field}, or {config.text_field}; "
        "messages_field, prompt_field, completion_field and text_field name other ones"
    )
    raise DataError.at(place, f"has the columns {_listed(values)}, but training needs {wanted}")


class SampleReader:
    """Makes samples of rows that all have one format."""

    def __init__(self, config: TrainConfig, data_format: str) -> None:
        self._config = config
        self.data_format = data_format

    def read(self, row: DataRow) -> Sample:
        """Check `row` and return what it means.

        Raises:
            DataError: a field is missing, empty or of another type; names the line and the field.
        """
        config = self._config
        if self.data_format == "messages":
            return Sample(row.place, messages=self._messages(row))
        if self.data_format == "prompt-completion":
            prompt = self._text(row, config.prompt_field)
            return Sample(row.place, prompt=prompt, completion=self._text(row, config.completion_field))
        if self.data_format == "labelled-text":
            return Sample(row.place, text=self._text(row, config.text_field), label=self._label(row))
        return Sample(row.place, text=self._text(row, config.text_field))

    def _text(self, row: DataRow, field: str) -> str:
        value = _value(row, field)
        if not isinstance(value, str):
            raise DataError.at(row.place, f"must be text, not {_kind(value)}", field)
        if not value.strip():
            raise DataError.at(row.place, "is empty", field)
        return _without_surrogates(value, row.place, field)

    def _label(self, row: DataRow) -> str:
        field = self._config.label_field
        value = _value(row, field)
        if isinstance(value, float) or not isinstance(value, str | int) or not str(value).strip():
            raise DataError.at(row.place, f"must be text or a whole number, not {_kind(value)}", field)
        return str(value)

    def _messages(self, row: DataRow) -> tuple[Message, ...]:
        field = self._config.messages_field
        value = _value(row, field)
        if not isinstance(value, list) or not value:
            raise DataError.at(row.place, f"must be a list of messages, not {_kind(value)}", field)
        messages = tuple(_message(item, row.place, f"{field}[{index}]") for index, item in enumerate(value))
        if messages[-1].role != "assistant":
            raise DataError.at(row.place, "must end with a message of the assistant, which is what is learned", field)
        if len(messages) == 1:
            raise DataError.at(row.place, "holds no message that the assistant could answer", field)
        return messages


def _message(item: object, place: str, field: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError.at(place, f"must be an object with role and content, not {_kind(item)}", field)
    for name in ("role", "content"):
        if not isinstance(item.get(name), str) or not item[name].strip():
            found = _kind(item[name]) if name in item else "missing"
            raise DataError.at(place, f"must be text that is not empty; it is {found}", f"{field}.{name}")
    if item["role"] not in ROLES:
        raise DataError.at(place, f"must be one of {', '.join(ROLES)}, not {item['role']!r:.40}", f"{field}.role")
    return Message(item["role"], _without_surrogates(item["content"], place, field))


def _value(row: DataRow, field: str) -> Any:
    if field not in row.values:
        raise DataError.at(row.place, f"is missing; the row has {_listed(row.values)}", field)
    if row.values[field] is None:
        raise DataError.at(row.place, "is missing (null)", field)
    return row.values[field]


def _without_surrogates(text: str, place: str, field: str) -> str:
    """Return `text`, unless JSON's escapes left half a character in it, which no tokenizer takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError.at(place, "holds half of a surrogate pair, which is no character", field)
    return text


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float):
        return f"a number ({value})"
    if isinstance(value, str):
        return "text" if value.strip() else "empty text"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "an object" if isinstance(value, Mapping) else type(value).__name__


def _listed(values: Mapping[str, Any]) -> str:
    names = ", ".join(list(map(str, values))[:12])
    return names or "no columns"
