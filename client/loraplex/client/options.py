"""What a caller says about one generation: the prompt and how tokens are chosen. Knows nothing about gRPC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack


@dataclass(frozen=True)
class ChatMessage:
    """One message of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


Prompt = str | Sequence[ChatMessage] | Sequence[Mapping[str, str]] | Sequence[int]
"""Plain text, chat messages (also as `{"role": ..., "content": ...}`), or token ids."""


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; a field left at None takes the server's default, which `loraplex.v1` documents.

    Attributes:
        max_tokens: tokens to generate at most (default 128).
        temperature: 0 is greedy (default 0).
        top_p: keep the most likely tokens that reach this probability together (default 1, off).
        top_k: keep this many of the most likely tokens (default 0, off).
        min_p: keep tokens at least this likely relative to the best one (default 0, off).
        repetition_penalty: weakens tokens seen in prompt or output (default 1, off).
        presence_penalty: subtracted from the logits of tokens seen in the output (default 0).
        frequency_penalty: the same, once per occurrence (default 0).
        seed: same seed, same draws; the server draws one otherwise.
        stop: the output ends before the first of these strings.
        stop_token_ids: the output ends at the first of these tokens.
        ignore_eos: go on past the model's end-of-sequence tokens (default False).
        logprobs: send log probabilities, with this many alternatives (0 to 20; default: none at all).
        n: independent choices for the one prompt (default 1).
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        """Refuse a bare string for `stop`, which would be taken apart into its characters.

        Raises:
            TypeError: if `stop` is a string.
        """
        if isinstance(self.stop, str):
            raise TypeError(f"stop is a sequence of strings: write stop=[{self.stop!r}]")


class SamplingKeywords(TypedDict, total=False):
    """The fields of `SamplingOptions` as keyword arguments of `generate` and `stream`."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool | None
    logprobs: int | None
    n: int | None


class RegistrationKeywords(TypedDict, total=False):
    """What may be said of an adapter when it is registered or uploaded, beside its name and description.

    What is left out stays as an earlier registration of the name left it. `default_sampling` is what a request that
    leaves a field unset gets. Anything else than `expected_digest`, if it is given, is refused.
    """

    tags: Sequence[str]
    owner: str
    default_sampling: SamplingOptions | None
    expected_digest: str


def combine(sampling: SamplingOptions | None, **keywords: Unpack[SamplingKeywords]) -> SamplingOptions:
    """Return `sampling` (default: all defaults) with `keywords` put over it.

    Raises:
        TypeError: for a keyword that is no field of `SamplingOptions`.
    """
    return replace(sampling or SamplingOptions(), **keywords)
