"""Writes plain Python values into the fields of messages; what does not fit is the error that the server would give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from loraplex.client.errors import InvalidRequestError
from loraplex.client.options import SamplingOptions
from loraplex.v1 import generation_pb2


@contextmanager
def field_named(name: str) -> Iterator[None]:
    """Turn what protobuf says about a value that does not fit its field into the error the server would give.

    Raises:
        InvalidRequestError: naming the field `name`.
    """
    try:
        yield
    except ValueError as error:
        raise InvalidRequestError.of(name, str(error)) from error


def set_sampling(message: generation_pb2.SamplingParameters, sampling: SamplingOptions, field: str) -> None:
    """Write what is not None into `message`, which is the field named `field`.

    Raises:
        InvalidRequestError: for a value that does not fit its field.
    """
    for option in fields(sampling):
        value = getattr(sampling, option.name)
        if value is None:
            continue
        with field_named(f"{field}.{option.name}"):
            if option.name in ("stop", "stop_token_ids"):
                getattr(message, option.name).extend(value)
            else:
                setattr(message, option.name, value)
