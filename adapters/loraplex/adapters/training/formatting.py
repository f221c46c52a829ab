"""A sample as tokens: what the model reads and which of it it learns.

A prompt ends where a server's prompt ends, so that what is learned is what is asked for later: with the chat template
that is its own generation prompt. Knows tokenizers, no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.training.data_error import DataError
from loraplex.adapters.training.sample import Message, Sample

IGNORED = -100
"""The label of a token that is read and not learned."""


@dataclass(frozen=True)
class EncodedSample:
    """`input_ids` and `labels`, of one length; labels are the ids, or -100 where nothing is learned."""

    input_ids: list[int]
    labels: list[int]

    @property
    def learned(self) -> int:
        """How many tokens are learned; the first has nothing before it to be told from."""
        return sum(label != IGNORED for label in self.labels[1:])

    def truncated(self, length: int) -> EncodedSample:
        """Return the first `length` tokens."""
        return EncodedSample(self.input_ids[:length], self.labels[:length])


class Formatter:
    """Turns samples into tokens with one tokenizer."""

    def __init__(self, tokenizer: Any, *, chat: bool, completion_only: bool) -> None:
        """Keep `tokenizer`; `chat` says whether prompts and completions become turns of its chat template."""
        self.tokenizer = tokenizer
        self._chat = chat
        self._completion_only = completion_only

    def encode(self, sample: Sample) -> EncodedSample:
        """Return the tokens of `sample` with its answer, ended as the model ends a text or a turn.

        Raises:
            DataError: the chat template cannot render it, or renders earlier turns otherwise when more follow.
        """
        messages = self._as_messages(sample)
        if messages:
            return self._encode_chat(messages, sample.place)
        if sample.text:
            ids = self._ended(self._plain(sample.text))
            return EncodedSample(ids, list(ids))
        prompt = self._plain(sample.prompt)
        joined = self._plain(sample.prompt + sample.completion)
        # Where the two texts merge into one token, the prompt is kept as a server will read it.
        if joined[: len(prompt)] == prompt and len(joined) > len(prompt):
            answer = joined[len(prompt) :]
        else:
            answer = self.tokenizer(sample.completion, add_special_tokens=False)["input_ids"]
        ids = self._ended([*prompt, *answer])
        return EncodedSample(ids, self._labels(ids, [(len(prompt), len(ids))]))

    def prompt_ids(self, sample: Sample) -> list[int]:
        """Return the tokens of what stands before the last answer of `sample`.

        Raises:
            DataError: the chat template cannot render it.
        """
        messages = self._as_messages(sample)
        if messages:
            return self._tokens(self._text(messages[:-1], sample.place, generate=True))
        return self._plain(sample.prompt)

    def _as_messages(self, sample: Sample) -> tuple[Message, ...]:
        if sample.messages or sample.text or not self._chat:
            return sample.messages
        return Message("user", sample.prompt), Message("assistant", sample.completion)

    def _encode_chat(self, messages: Sequence[Message], place: str) -> EncodedSample:
        """Return the whole conversation, in which each of the assistant's turns begins where its prompt would end.

        Templates whose turns end in plain text let a prompt's last token merge with the answer; the text is then cut
        there, so that the prompt is the one that a server reads.
        """
        text = self._text(messages, place, generate=False)
        cuts = []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                before = self._text(messages[:index], place, generate=True)
                until = text if index == len(messages) - 1 else self._text(messages[: index + 1], place, generate=False)
                if not (text.startswith(before) and text.startswith(until)):
                    raise DataError.at(
                        place,
                        "cannot be learned as one row: the chat template renders earlier turns otherwise when more "
                        "turns follow; make a row of each answer, with the turns before it",
                    )
                cuts.append((len(before), len(until)))
        joined = self._tokens(text)
        spans = [(len(self._tokens(text[:start])), len(self._tokens(text[:end]))) for start, end in cuts]
        clean = all(
            joined[: len(tokens)] == tokens for cut in cuts for tokens in (self._tokens(text[:end]) for end in cut)
        )
        if not clean:
            joined, spans = self._cut(text, cuts)
        return EncodedSample(joined, self._labels(joined, spans))

    def _cut(self, text: str, cuts: Sequence[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens of the pieces between `cuts`, and where those of the answers begin and end."""
        ids: list[int] = []
        spans, position = [], 0
        for start, end in cuts:
            ids += self._tokens(text[position:start])
            begin = len(ids)
            ids += self._tokens(text[start:end])
            spans.append((begin, len(ids)))
            position = end
        return ids + self._tokens(text[position:]), spans

    def _text(self, messages: Sequence[Message], place: str, *, generate: bool) -> str:
        plain: list[Mapping[str, str]] = [{"role": each.role, "content": each.content} for each in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(plain, add_generation_prompt=generate, tokenize=False)
        except Exception as error:  # a template is a program: Jinja's errors, and whatever its expressions raise
            raise DataError.at(place, f"cannot be rendered by the chat template: {error!s:.200}") from error
        return text

    def _tokens(self, text: str) -> list[int]:
        """Return the tokens of a rendered text, which has its special tokens already."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return ids

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def _ended(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    def _labels(self, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
        if not self._completion_only:
            return list(ids)
        labels = [IGNORED] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        return labels
