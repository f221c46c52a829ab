"""The content-addressed store: whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from loraplex.adapters.errors import NotFoundError, ResourceExhaustedError
from loraplex.adapters.store import LocalBlobStore

DIGEST = "sha256:" + "a" * 64


def put(store: LocalBlobStore, text: str, digest: str = DIGEST, *, replace: bool = False) -> None:
    with store.staging() as staged:
        (staged / "file").write_text(text)
        store.put(digest, staged, replace=replace)


def staging(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "staging").iterdir())


def test_what_was_put_is_found_until_it_is_deleted(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path)
    put(store, "content")
    assert (store.folder(DIGEST) / "file").read_text() == "content"
    assert store.digests() == {DIGEST}
    assert LocalBlobStore(tmp_path).digests() == {DIGEST}
    store.delete(DIGEST)
    store.delete(DIGEST)
    assert store.digests() == frozenset()
    with pytest.raises(NotFoundError):
        store.folder(DIGEST)
    assert staging(tmp_path) == []


def test_the_same_digest_again_is_dropped_unless_it_replaces(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path)
    put(store, "first")
    put(store, "second")
    assert (store.folder(DIGEST) / "file").read_text() == "first"
    put(store, "third", replace=True)
    assert (store.folder(DIGEST) / "file").read_text() == "third"
    assert staging(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = LocalBlobStore(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceExhaustedError, match="disk is full"):
        put(store, "content")
    assert store.digests() == frozenset()
    assert staging(tmp_path) == []


def test_half_written_folders_of_an_earlier_process_are_removed(tmp_path: Path) -> None:
    LocalBlobStore(tmp_path)
    (tmp_path / "staging" / "left").mkdir()
    LocalBlobStore(tmp_path)
    assert staging(tmp_path) == []


@pytest.mark.parametrize("digest", ["", "sha256:..", "../../etc", "sha256:" + "A" * 64, "sha256:" + "a" * 63 + "/"])
def test_only_digests_become_paths(tmp_path: Path, digest: str) -> None:
    store = LocalBlobStore(tmp_path)
    for call in (store.folder, store.delete):
        with pytest.raises(NotFoundError):
            call(digest)
