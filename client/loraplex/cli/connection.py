"""The options that say which server a command talks to, and the client they make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from loraplex.client import Client

# Repeated here because importing the client costs more than the whole of `loraplex --help`; a test compares the two.
DEFAULT_SERVER = "127.0.0.1:50051"

ServerOption = Annotated[
    str, typer.Option("--server", metavar="HOST:PORT", envvar="LORAPLEX_SERVER", help="The server to talk to.")
]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds to wait for the answer.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Write the result as JSON.")]


def connect(server: str, timeout: float = 300.0) -> Client:
    """Return a client of `server` whose calls last at most `timeout` seconds."""
    from loraplex.client import Client

    return Client(server, timeout=timeout)
