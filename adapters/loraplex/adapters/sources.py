"""Where adapters may be registered from: folders below allowed roots, and URLs below allowed prefixes.

A URL is read through fsspec: `hf://org/repo@revision`, `s3://`, `gs://`, `memory://`; `file://` is a folder like any
other. Only the files that make an adapter are fetched, by name. Knows nothing about what is in them.
"""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.adapters.disk import disk_full_is_typed, removed_at_exit
from loraplex.adapters.errors import InvalidRequestError, LoraplexError, NotFoundError, SourceError
from loraplex.adapters.folder import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_CONFIG, WEIGHTS_FILE, require_inside

DRIVERS = {"hf": "huggingface_hub", "s3": "s3fs", "gs": "gcsfs", "memory": "fsspec"}
"""What fsspec needs to read a scheme."""
CHUNK_BYTES = 1 << 20
_FILES = {CONFIG_FILE: True, WEIGHTS_FILE: True, TEMPLATE_FILE: False, TOKENIZER_CONFIG: False}
"""What is fetched, and whether an adapter must have it."""
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

    @contextmanager
    def folder(self, source: str) -> Iterator[Path]:
        """Yield the folder of the adapter at `source`, a path or a URL; what was fetched is removed afterwards.

        Raises:
            InvalidRequestError: it is not allowed, or no folder.
            NotFoundError: a file that every adapter has is not there.
            SourceError: it cannot be read, is too large or takes too long.
            ResourceExhaustedError: the disk is full.
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
            fetch(source, target, self.policy)
            yield target


def parse_url(url: str) -> tuple[str, str] | None:
    """Return scheme and rest of a URL that may be read, or None."""
    found = _URL.fullmatch(url)
    if found is None or found[1] not in ("file", *DRIVERS) or {".", ".."} & set(found[2].split("/")):
        return None
    if found[1] == "file" and not found[2].startswith("/"):
        return None
    return found[1], found[2]


def fetch(url: str, target: Path, policy: SourcePolicy) -> None:
    """Read the adapter's files at `url` into the folder `target`.

    Raises:
        NotFoundError: a file that every adapter has is not there.
        SourceError: the driver is missing or fails, the files are too large, or it takes too long.
        ResourceExhaustedError: the disk is full.
    """
    failure: list[Exception] = []
    deadline = time.monotonic() + policy.timeout_s
    late = SourceError(f"{url} could not be read within {policy.timeout_s:g} s")

    def check_time() -> None:
        if time.monotonic() > deadline:
            raise late

    def run() -> None:
        try:
            _read_all(_file_system(url), url, target, policy.max_bytes, check_time)
        except Exception as error:
            failure.append(error)

    # On a thread that may be left behind: nothing ends a driver that hangs, but it has lost its folder and its caller.
    thread = threading.Thread(target=run, name="fetch", daemon=True)
    thread.start()
    thread.join(policy.timeout_s)
    if thread.is_alive():
        raise late
    if not failure:
        return
    if isinstance(failure[0], LoraplexError):
        raise failure[0]
    raise SourceError(f"{url} cannot be read: {type(failure[0]).__name__}: {failure[0]!s:.300}") from failure[0]


def _file_system(url: str) -> Any:
    """Return fsspec's driver for `url`.

    Raises:
        SourceError: it is not installed.
    """
    import fsspec

    scheme = url.partition("://")[0]
    try:
        driver = fsspec.filesystem(scheme)
    except ImportError as error:
        package = DRIVERS[scheme]
        raise SourceError(f"{scheme}:// needs the Python package {package} where the server runs: {error}") from error
    driver.invalidate_cache()  # what is there may have changed since it was looked at
    return driver


def _read_all(driver: Any, url: str, target: Path, max_bytes: int, check_time: Callable[[], None]) -> None:
    left = max_bytes
    for name, required in _FILES.items():
        check_time()
        try:
            source = driver.open(f"{url.rstrip('/')}/{name}", "rb")
        except FileNotFoundError as error:
            if required:
                raise NotFoundError(f"{url} has no {name}; an adapter folder has one") from error
            continue
        with source, disk_full_is_typed("fetching an adapter"), (target / name).open("xb") as copy:
            while data := source.read(CHUNK_BYTES):
                check_time()
                left -= len(data)
                if left < 0:
                    raise SourceError(f"{url} holds more than the {max_bytes} bytes that this server takes")
                copy.write(data)
