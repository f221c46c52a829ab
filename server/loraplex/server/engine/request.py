"""What goes into the engine and what comes out: plain picklable values, no transport, no tensors."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass

from loraplex.server.errors import FieldViolation, InvalidRequestError, LoraplexError

MAX_LOGPROBS = 20
MAX_CHOICES = 64
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKENS = 256
MAX_ADAPTER_SCALE = 100.0


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen; the fields are those of `loraplex.v1.SamplingParameters`.

    Call `validate` before use: construction alone checks nothing, so that every violation can be reported at once.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def validate(self, vocab_size: int) -> None:
        """Check every field.

        Raises:
            InvalidRequestError: naming every field that is out of range.
        """
        bad = [FieldViolation(f"sampling.{name}", problem) for name, ok, problem in self._checks(vocab_size) if not ok]
        if bad:
            raise InvalidRequestError(bad)

    def _checks(self, vocab_size: int) -> list[tuple[str, bool, str]]:
        def finite(value: float, low: float, high: float) -> bool:
            return math.isfinite(value) and low <= value <= high

        return [
            ("max_tokens", self.max_tokens >= 1, f"must be at least 1, got {self.max_tokens}"),
            ("temperature", finite(self.temperature, 0, 100), f"must be within 0 and 100, got {self.temperature}"),
            ("top_p", finite(self.top_p, 0, 1) and self.top_p > 0, f"must be above 0 and at most 1, got {self.top_p}"),
            ("top_k", self.top_k >= 0, f"must be 0 (off) or more, got {self.top_k}"),
            ("min_p", finite(self.min_p, 0, 1), f"must be within 0 and 1, got {self.min_p}"),
            (
                "repetition_penalty",
                finite(self.repetition_penalty, 0, 100) and self.repetition_penalty > 0,
                f"must be above 0 and at most 100, got {self.repetition_penalty}",
            ),
            ("presence_penalty", finite(self.presence_penalty, -2, 2), "must be within -2 and 2"),
            ("frequency_penalty", finite(self.frequency_penalty, -2, 2), "must be within -2 and 2"),
            ("stop", len(self.stop) <= MAX_STOP_STRINGS, f"at most {MAX_STOP_STRINGS} strings"),
            (
                "stop",
                all(len(stop) <= MAX_STOP_LENGTH for stop in self.stop),
                f"a stop string has at most {MAX_STOP_LENGTH} characters",
            ),
            ("stop_token_ids", len(self.stop_token_ids) <= MAX_STOP_TOKENS, f"at most {MAX_STOP_TOKENS} tokens"),
            ("stop", all(self.stop), "an empty stop string would end the output at once"),
            (
                "stop_token_ids",
                all(0 <= t < vocab_size for t in self.stop_token_ids),
                f"token ids lie within 0 and {vocab_size - 1}",
            ),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"must be within 0 and {MAX_LOGPROBS}, got {self.logprobs}",
            ),
            ("n", 1 <= self.n <= MAX_CHOICES, f"must be within 1 and {MAX_CHOICES}, got {self.n}"),
            ("seed", self.seed is None or 0 <= self.seed < 2**64, "must be an unsigned 64-bit number"),
        ]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt with everything that decides its answer.

    `adapter_digest` is None for the base alone. `adapter_start` is the first prompt token on which the adapter acts;
    None if there is none (an activated adapter that the prompt does not invoke), and then the base answers. `seed`
    inside `params` is always set here: the caller draws one where the user gave none. `deadline` is on
    `time.monotonic`'s clock, in seconds.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    adapter_digest: str | None = None
    adapter_scale: float = 1.0
    adapter_start: int | None = 0
    adapter_name: str = ""
    cache_salt: str = ""
    tenant: str = ""
    deadline: float | None = None

    @property
    def acting_digest(self) -> str | None:
        """The adapter that has a part in the answer; None where the base alone gives it."""
        return None if self.adapter_start is None else self.adapter_digest

    def validate(self, vocab_size: int, max_model_len: int, *, fixed_scale: bool = False) -> None:
        """Check prompt, scale and sampling parameters against what the model can take.

        `fixed_scale` says that the adapter holds for the scale that it was trained with only (`AdapterTraits`).

        Raises:
            InvalidRequestError: naming every field that is out of range.
        """
        bad = list(self._prompt_violations(vocab_size, max_model_len))
        if not (math.isfinite(self.adapter_scale) and abs(self.adapter_scale) <= MAX_ADAPTER_SCALE):
            bad.append(
                FieldViolation("adapters.scale", f"must be within ±{MAX_ADAPTER_SCALE}, got {self.adapter_scale}")
            )
        elif fixed_scale and self.adapter_scale != 1:
            bad.append(
                FieldViolation(
                    "adapters.scale",
                    f"must be 1, got {self.adapter_scale}: DoRA's magnitudes belong to the scale of the training",
                )
            )
        try:
            self.params.validate(vocab_size)
        except InvalidRequestError as error:
            bad.extend(error.violations)
        if bad:
            raise InvalidRequestError(bad)

    def _prompt_violations(self, vocab_size: int, max_model_len: int) -> Iterator[FieldViolation]:
        length = len(self.prompt_token_ids)
        if not length:
            yield FieldViolation("prompt", "is empty: give at least one token")
        elif length >= max_model_len:
            yield FieldViolation(
                "prompt", f"has {length} tokens; the context holds {max_model_len}, one of them for the answer"
            )
        elif length + self.params.max_tokens > max_model_len:
            yield FieldViolation(
                "sampling.max_tokens",
                f"{self.params.max_tokens} with a prompt of {length} tokens exceeds the context of {max_model_len}; "
                f"at most {max_model_len - length} fit",
            )
        if any(not 0 <= token < vocab_size for token in self.prompt_token_ids):
            yield FieldViolation("prompt", f"token ids lie within 0 and {vocab_size - 1}")


class FinishReason(enum.Enum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class Logprobs:
    """Natural log probabilities at one output position, before temperature and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ChoiceDelta:
    """What one engine step added to one choice."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Usage:
    """Token counts of a finished request; `completion_tokens` is over all choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class RequestOutput:
    """What one engine step has for one request. The last one has `finished` set, with `usage` or with `error`."""

    request_id: str
    choices: tuple[ChoiceDelta, ...] = ()
    finished: bool = False
    usage: Usage | None = None
    error: LoraplexError | None = None
    adapter_digest: str | None = None
