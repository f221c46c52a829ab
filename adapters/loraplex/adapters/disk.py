"""What writing safely to a disk takes: a full disk as a typed error, and files that survive a crash."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from loraplex.adapters.errors import AlreadyExistsError, InvalidRequestError, PreconditionError, ResourceExhaustedError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}\.partial")


@contextmanager
def disk_full_is_typed(doing: str) -> Iterator[None]:
    """Turn "no space left" into a `ResourceExhaustedError` that says what was being done."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ResourceExhaustedError(f"the disk is full while {doing}; free some space and try again") from error


@contextmanager
def removed_at_exit(folder: Path) -> Iterator[Path]:
    """Yield `folder` and remove it with its content afterwards, unless it was moved away."""
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_new_folder(folder: Path) -> None:
    """Check that `folder` can be what `partial_folder` fills.

    Raises:
        InvalidRequestError: its name is that of a folder left by a killed process, which the next one would remove.
        AlreadyExistsError: it exists.
    """
    if _PARTIAL.fullmatch(folder.name):
        raise InvalidRequestError.of("output", f"{folder.name} is named like an unfinished folder: choose another name")
    if os.path.lexists(folder):
        raise AlreadyExistsError(f"{folder} exists; choose another output folder")


@contextmanager
def parents_made(folder: Path) -> Iterator[None]:
    """Make the folders above `folder` that are not there; remove them again if the block fails and they are empty.

    Raises:
        OSError: if one cannot be made.
    """
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """Make a folder beside `target` to fill and rename to it; it is removed afterwards unless that was done.

    What a killed process left beside `target` in this way goes first: a folder whose maker lives is locked.

    Raises:
        OSError: if the folder cannot be made.
    """
    with _locked(target.parent):
        for left in target.parent.glob(".*.partial"):
            if _PARTIAL.fullmatch(left.name):
                _remove_left(left)
        folder = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with removed_at_exit(folder):
            yield folder
    finally:
        os.close(lock)


def _remove_left(folder: Path) -> None:
    try:
        with _locked(folder, wait=False):
            shutil.rmtree(folder, ignore_errors=True)
    except (BlockingIOError, FileNotFoundError, NotADirectoryError):
        return


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the files directly in `folder`, and their names, are on the disk."""
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def move_folder(source: Path, target: Path) -> None:
    """Rename the synced folder `source` to `target`, and wait until the new name is on the disk.

    Raises:
        OSError: if `target` is a folder with something in it, or on another file system.
    """
    source.rename(target)
    _sync(target.parent)


def free_bytes(folder: Path) -> int:
    """Return how many bytes can still be written below `folder`."""
    return shutil.disk_usage(folder).free


def lock_folder(folder: Path) -> BinaryIO:
    """Take `folder` for this process alone until the returned file is closed or the process ends.

    Raises:
        PreconditionError: if another process has it.
    """
    file = (folder / "lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise PreconditionError(f"{folder} is in use by another process; give each its own folder") from error
    return file


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
