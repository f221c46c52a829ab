"""One RPC, ready to be sent by either client: which method, which message, and how to read the answer."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from loraplex.client.channel import Stubs
from loraplex.client.errors import REQUEST_ID_KEY

ADAPTER_KEY = "x-loraplex-adapter"

ResultT = TypeVar("ResultT")


def new_request_id() -> str:
    """Return an id that no other call has."""
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Call(Generic[ResultT]):
    """What to call and what comes of it.

    Attributes:
        method: picks the stub's method; sync or asyncio, by the channel the stubs were made on.
        request: the request message.
        parse: response message to result; for a stream, one message of it.
        adapter: the adapter's name, repeated in the metadata for routers.
        retried: whether UNAVAILABLE and RESOURCE_EXHAUSTED are tried again.
    """

    method: Callable[[Stubs], Any]
    request: Any
    parse: Callable[[Any], ResultT]
    adapter: str = ""
    request_id: str = field(default_factory=new_request_id)
    retried: bool = True

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata to send; HTTP/2 headers take printable ASCII only, so anything else stays in the message."""
        pairs = ((REQUEST_ID_KEY, self.request_id), (ADAPTER_KEY, self.adapter))
        return tuple((key, value) for key, value in pairs if value and value.isascii() and value.isprintable())
