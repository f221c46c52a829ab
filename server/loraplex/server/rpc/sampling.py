"""Sampling parameters between messages, the engine's values and what an adapter keeps as its defaults."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict

from loraplex.server.engine.request import SamplingParams
from loraplex.server.errors import FieldViolation, InvalidRequestError
from loraplex.v1 import generation_pb2 as pb

DEFAULT_MAX_TOKENS = SamplingParams().max_tokens
_OPTIONAL = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
    "logprobs",
    "n",
)


def sampling_params(
    message: pb.SamplingParameters, room: int, defaults: Mapping[str, Any] | None = None
) -> SamplingParams:
    """Read a message; what is unset takes the adapter's default, then the field's own, the seed a fresh draw.

    Zero is a value. `room` is how many tokens the prompt leaves: what a caller did not ask for never exceeds it. Lists
    of stop strings and tokens replace the adapter's.
    """
    merged = _with_defaults(message, defaults) if defaults else message
    max_tokens = merged.max_tokens if merged.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    given = {name: getattr(merged, name) for name in _OPTIONAL if merged.HasField(name)}  # type: ignore[arg-type]
    return SamplingParams(
        max_tokens=max_tokens if message.HasField("max_tokens") else max(1, min(max_tokens, room)),
        seed=merged.seed if merged.HasField("seed") else secrets.randbits(63),
        stop=tuple(merged.stop),
        stop_token_ids=tuple(merged.stop_token_ids),
        **given,
    )


def sampling_defaults(message: pb.SamplingParameters, vocab_size: int) -> Mapping[str, Any]:
    """Return what an adapter keeps of `message`: plain values of the fields that are set.

    Raises:
        InvalidRequestError: naming every field that no request could have.
    """
    try:
        sampling_params(message, DEFAULT_MAX_TOKENS).validate(vocab_size)
    except InvalidRequestError as error:
        raise InvalidRequestError(
            [FieldViolation(f"default_{violation.field}", violation.description) for violation in error.violations]
        ) from error
    return MessageToDict(message, preserving_proto_field_name=True)


def sampling_message(defaults: Mapping[str, Any]) -> pb.SamplingParameters:
    """Undo `sampling_defaults`; a field of a newer program is left out."""
    return ParseDict(dict(defaults), pb.SamplingParameters(), ignore_unknown_fields=True)


def _with_defaults(message: pb.SamplingParameters, defaults: Mapping[str, Any]) -> pb.SamplingParameters:
    merged = sampling_message(defaults)
    for name in ("stop", "stop_token_ids"):
        if getattr(message, name):
            merged.ClearField(name)  # merging appends
    merged.MergeFrom(message)
    return merged
