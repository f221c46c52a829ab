"""Fetches an adapter's files from a URL through fsspec, whose drivers may be slow, hang or fail in any way.

Only the files that make an adapter are fetched, by name. Knows nothing about which URLs are allowed, or what is in the
files.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraplex.adapters.disk import disk_full_is_typed
from loraplex.adapters.errors import LoraplexError, NotFoundError, ResourceExhaustedError, SourceError
from loraplex.adapters.folder import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_CONFIG, WEIGHTS_FILE

DRIVERS = {"hf": "huggingface_hub", "s3": "s3fs", "gs": "gcsfs", "memory": "fsspec"}
"""What fsspec needs to read a scheme."""
CHUNK_BYTES = 1 << 20
MAX_FETCHES = 4
"""How many URLs are read at a time."""
MAX_DRIVERS = 16
"""How many threads are in a driver, those included that it has kept after their time was up."""
RETRY_AFTER_S = 5.0
_LOOK_EVERY_S = 0.1
_FILES = {CONFIG_FILE: True, WEIGHTS_FILE: True, TEMPLATE_FILE: False, TOKENIZER_CONFIG: False}
"""What is fetched, and whether an adapter must have it."""


class Fetcher:
    """Reads a few URLs at a time. Thread-safe."""

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        """Take at most `max_bytes` bytes of a URL, in at most `timeout_s` seconds."""
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._fetches = threading.Semaphore(MAX_FETCHES)
        self._drivers = threading.Semaphore(MAX_DRIVERS)

    def fetch(self, url: str, target: Path, cancelled: threading.Event) -> None:
        """Read the adapter's files at `url` into the folder `target`, unless `cancelled` is set meanwhile.

        Raises:
            NotFoundError: a file that every adapter has is not there.
            SourceError: the driver is missing or fails, the files are too large, it takes too long or was cancelled.
            ResourceExhaustedError: too many others are being read, or the disk is full.
        """
        if not self._fetches.acquire(blocking=False):
            raise ResourceExhaustedError(
                f"{MAX_FETCHES} adapters are being fetched from URLs already; try again", RETRY_AFTER_S
            )
        try:
            self._fetch(url, target, cancelled)
        finally:
            self._fetches.release()

    def _fetch(self, url: str, target: Path, cancelled: threading.Event) -> None:
        failure: list[BaseException] = []
        deadline = time.monotonic() + self._timeout_s

        def check() -> None:
            if cancelled.is_set():
                raise SourceError(f"{url} is not fetched any more: the caller has gone, or the server stops")
            if time.monotonic() > deadline:
                raise SourceError(f"{url} could not be read within {self._timeout_s:g} s")

        def run() -> None:
            try:
                _read_all(_file_system(url), url, target, self._max_bytes, check)
            except BaseException as error:  # a driver's SystemExit, too, means that not all was read
                failure.append(error)
            finally:
                self._drivers.release()

        if not self._drivers.acquire(blocking=False):
            raise ResourceExhaustedError(f"{MAX_DRIVERS} sources hang; try again, or restart the server", RETRY_AFTER_S)
        # On a thread that may be left behind: nothing ends a driver that hangs, but it has lost its folder and its
        # caller, and such threads are counted.
        thread = threading.Thread(target=run, name="fetch", daemon=True)
        try:
            thread.start()
        except BaseException:
            self._drivers.release()
            raise
        while thread.is_alive():
            thread.join(min(_LOOK_EVERY_S, self._timeout_s))
            if thread.is_alive():
                check()
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


def _read_all(driver: Any, url: str, target: Path, max_bytes: int, check: Callable[[], None]) -> None:
    left = max_bytes
    for name, required in _FILES.items():
        check()
        try:
            source = driver.open(f"{url.rstrip('/')}/{name}", "rb")
        except FileNotFoundError as error:
            if required:
                raise NotFoundError(f"{url} has no {name}; an adapter folder has one") from error
            continue
        with source, disk_full_is_typed("fetching an adapter"), (target / name).open("xb") as copy:
            while data := source.read(CHUNK_BYTES):
                check()
                left -= len(data)
                if left < 0:
                    raise SourceError(f"{url} holds more than the {max_bytes} bytes that this server takes")
                copy.write(data)
