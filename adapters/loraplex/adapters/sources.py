"""Where adapters may be registered from: folders below allowed roots, and URLs below allowed prefixes.

A URL is read through fsspec: `hf://org/repo@revision`, `s3://`, `gs://`, `memory://`; `file://` is a folder like any
other. Knows nothing about what is in them.
"""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loraplex.adapters.disk import removed_at_exit
from loraplex.adapters.errors import InvalidRequestError
from loraplex.adapters.fetch import DRIVERS, Fetcher
from loraplex.adapters.folder import require_inside

# No query, fragment, escape, glob or chain: what is compared with the prefixes is what the driver reads.
_URL = re.compile(r"([a-z0-9]+)://([^\x00-\x20\x7f?#%\\*\[\]{}:]+)")


@dataclass(frozen=True)
class SourcePolicy:
    """What is taken from elsewhere.

    Attributes:
        url_prefixes: URLs below which `register` may read; none are allowed unless they are named.
        max_bytes: the largest adapter that is taken in, from wherever, all its files together.
        timeout_s: how long fetching one may take, in seconds.
    """

    url_prefixes: tuple[str, ...] = ()
    max_bytes: int = 4 << 30
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: naming the one that is wrong.
        """
        for prefix in self.url_prefixes:
            parsed = parse_url(prefix)
            if parsed is None:
                raise ValueError(f"{prefix} is no URL prefix: use one of file, {', '.join(DRIVERS)} and ://")
            if not parsed[1].strip("/") and parsed[0] != "file":
                raise ValueError(f"{prefix} is no URL prefix: name a place behind ://")
        if self.max_bytes < 1 or not self.timeout_s > 0:
            raise ValueError("max_bytes and timeout_s must be above 0")

    def allows(self, url: str) -> bool:
        """Whether `url` is one of the prefixes or lies below one.

        A special ref of a model hub (`hf://org/repo@refs/pr/7`) is allowed by a prefix that names it alone: anybody may
        open a pull request on a repository that only its owners write to.
        """
        return any(
            (rest == "" or rest[0] in "/@") and not (url.startswith("hf://") and "@refs/" in f"{rest}/")
            for rest in (url.removeprefix(stem) for stem in self._stems if url.startswith(stem))
        )

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders that file:// prefixes allow."""
        urls = (prefix for prefix in self.url_prefixes if prefix.startswith("file://"))
        return tuple(Path(url.removeprefix("file://")).resolve() for url in urls)

    @property
    def _stems(self) -> tuple[str, ...]:
        return tuple(prefix.rstrip("/") for prefix in self.url_prefixes)


class AdapterSources:
    """Turns what a caller names into a local folder with the adapter's files."""

    def __init__(self, roots: Sequence[Path], policy: SourcePolicy, scratch: Path) -> None:
        """Read below `roots` and as `policy` allows; `scratch` holds what is being fetched."""
        self.policy = policy
        self._roots = (*(root.resolve() for root in roots), *policy.roots)
        self._scratch = scratch
        self._fetcher = Fetcher(policy.max_bytes, policy.timeout_s)

    @contextmanager
    def folder(self, source: str, cancelled: threading.Event | None = None) -> Iterator[Path]:
        """Yield the folder of the adapter at `source`, a path or a URL; what was fetched is removed afterwards.

        Once `cancelled` is set, nothing is fetched any more.

        Raises:
            InvalidRequestError: it is not allowed, or no folder.
            NotFoundError: a file that every adapter has is not there.
            SourceError: it cannot be read, is too large or takes too long, or was `cancelled`.
            ResourceExhaustedError: the disk is full, or too many sources are being read.
        """
        if "://" not in source:
            yield require_inside(Path(source), self._roots)
            return
        parsed = parse_url(source)
        if parsed is None:
            raise InvalidRequestError.of("path", f"is no URL of file, {', '.join(DRIVERS)} without . or .. in its path")
        scheme, rest = parsed
        if scheme == "file":
            yield require_inside(Path(rest), self._roots)
            return
        if not self.policy.allows(source):
            allowed = ", ".join(self.policy.url_prefixes) or "none are configured"
            raise InvalidRequestError.of("path", f"{source} is not below the allowed adapter sources ({allowed})")
        with removed_at_exit(Path(tempfile.mkdtemp(dir=self._scratch))) as target:
            self._fetcher.fetch(source, target, cancelled or threading.Event())
            yield target


def is_remote(source: str) -> bool:
    """Whether `source` is to be fetched, rather than a folder here."""
    return "://" in source and not source.startswith("file://")


def parse_url(url: str) -> tuple[str, str] | None:
    """Return scheme and rest of a URL that may be read, or None."""
    found = _URL.fullmatch(url)
    if found is None or found[1] not in ("file", *DRIVERS) or {".", ".."} & set(found[2].split("/")):
        return None
    if found[1] == "file" and not found[2].startswith("/"):
        return None
    return found[1], found[2]
