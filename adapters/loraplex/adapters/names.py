"""The names of adapters: which are allowed, and how `name@2` or `name@sha256:...` selects one version.

Also the pages of listings sorted by name: a token is the last name of a page, so that it stays valid when names change.
"""

from __future__ import annotations

import base64
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.adapters.errors import InvalidRequestError

MAX_LENGTH = 128
DEFAULT_PAGE, MAX_PAGE = 100, 1000
RESERVED = frozenset({"base"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9._-]+)*")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


def check_name(name: str, field: str = "name") -> str:
    """Return `name` if it may name an adapter or an alias.

    Raises:
        InvalidRequestError: naming `field`, if it may not.
    """
    if not name:
        raise InvalidRequestError.of(field, "is empty")
    if name in RESERVED:
        raise InvalidRequestError.of(field, f"{name!r} stands for the base model alone")
    if len(name) > MAX_LENGTH or not _NAME.fullmatch(name):
        rule = f"at most {MAX_LENGTH} letters, digits and . _ - (and / between parts), beginning with a letter or digit"
        raise InvalidRequestError.of(field, f"{name!r:.140} is not a name; use {rule}")
    return name


@dataclass(frozen=True)
class Selector:
    """A name, and the one version that is asked for by its number or digest, if any; the digest may be a beginning."""

    name: str
    number: int | None = None
    digest: str | None = None

    @property
    def is_bare(self) -> bool:
        """Whether no version is asked for."""
        return self.number is None and self.digest is None


def parse_selector(text: str) -> Selector:
    """Read `name`, `name@2` or `name@sha256:...`; what stands behind the @ and is no number is taken for a digest."""
    name, at, version = text.partition("@")
    if not at:
        return Selector(name)
    if _NUMBER.fullmatch(version):
        return Selector(name, number=int(version))
    return Selector(name, digest=version)


def page_of(names: Sequence[str], size: int, token: str) -> tuple[Sequence[str], str]:
    """Return the page of the sorted `names` that `token` asks for, and the token of the next, empty if there is none.

    A size of 0 means 100; 1000 is the most.

    Raises:
        InvalidRequestError: a negative size, or a token that no earlier page gave.
    """
    if size < 0:
        raise InvalidRequestError.of("page_size", f"must not be negative, got {size}")
    begin = bisect_right(names, _decode(token))
    end = begin + min(size or DEFAULT_PAGE, MAX_PAGE)
    return names[begin:end], _encode(names[end - 1]) if end < len(names) else ""


def _encode(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def _decode(token: str) -> str:
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except ValueError as error:
        raise InvalidRequestError.of("page_token", "is not one that a listing gave") from error
