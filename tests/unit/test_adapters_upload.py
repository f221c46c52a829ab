"""Uploads: complete and checked, or refused and gone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from loraplex.adapters.errors import InvalidRequestError, ResourceExhaustedError
from loraplex.adapters.formats import read_adapter
from loraplex.adapters.metadata import MetadataChange
from loraplex.adapters.registry import AdapterRegistry
from loraplex.adapters.upload import UploadFile, UploadStager
from tests.adapter_factory import tiny_base, write_adapter


def announced(name: str, data: bytes) -> UploadFile:
    return UploadFile(name, len(data), hashlib.sha256(data).hexdigest())


CONTENT = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "README.md": b"read me"}
LIMIT = 1 << 20
HEADER = [announced(name, data) for name, data in CONTENT.items()]


def test_an_upload_in_odd_chunks_registers_like_a_folder(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source", template="t")
    files = {path.name: path.read_bytes() for path in source.iterdir()} | {"README.md": b"read me"}
    registry = AdapterRegistry(tmp_path / "root", tiny_base())
    header = [announced(name, data) for name, data in files.items()]
    with UploadStager(registry.incoming, header, registry.max_bytes) as stager:
        for name, data in files.items():
            for start in range(0, len(data), 301):
                stager.write(name, data[start : start + 301])
        registration = registry.register_upload("a", stager.finish(), MetadataChange("uploaded"))
    assert registration.record.digest == read_adapter(source).digest
    assert registration.record.metadata.description == "uploaded"
    assert list(registry.incoming.iterdir()) == []
    registry.check_integrity()
    registry.close()


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], "adapter_config.json is missing"),
        ([HEADER[0]], "adapter_model.safetensors is missing"),
        ([*HEADER, announced("../escape", b"x")], "is not one of"),
        ([*HEADER, announced("evil.py", b"x")], "is not one of"),
        ([*HEADER, HEADER[0]], "announced twice"),
        ([*HEADER[:2], UploadFile("README.md", 0, HEADER[2].sha256)], "size of 0"),
        ([*HEADER[:2], UploadFile("README.md", -1, HEADER[2].sha256)], "size of -1"),
        ([*HEADER[:2], UploadFile("README.md", 1, "AB")], "64 lower-case"),
        ([*HEADER[:2], UploadFile("README.md", 1 << 40, HEADER[2].sha256)], "more than the"),
        (HEADER * 1000, "are 3000"),
    ],
)
def test_bad_headers(tmp_path: Path, files: list[UploadFile], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        UploadStager(tmp_path, files, LIMIT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        ([("adapter_model.safetensors", b"weights")], "adapter_config.json is due"),
        ([("adapter_config.json", b"{"), ("adapter_model.safetensors", b"w")], "adapter_config.json is due"),
        ([("adapter_config.json", b"{}}")], "longer than the 2 bytes"),
        ([("adapter_config.json", b"[]"), ("adapter_model.safetensors", b"w")], "does not have the SHA-256"),
        ([("adapter_config.json", b"{}"), ("adapter_model.safetensors", b"weigh")], "ended after 5 of 7 bytes"),
        ([("adapter_config.json", b"{}"), ("adapter_model.safetensors", b"weights")], "ended after 0 of 7 bytes"),
        ([("adapter_config.json", b"{}"), ("other", b"")], "'other'; adapter_model.safetensors is due"),
        (
            [(name, data if name != "README.md" else b"READ ME") for name, data in CONTENT.items()],
            "does not have the SHA",
        ),
        ([], "ended after 0 of 2 bytes"),
    ],
)
def test_bad_chunks_leave_nothing(tmp_path: Path, chunks: list[tuple[str, bytes]], reason: str) -> None:
    def upload() -> None:
        with UploadStager(tmp_path, HEADER, LIMIT) as stager:
            for name, data in chunks:
                stager.write(name, data)
            stager.finish()

    with pytest.raises(InvalidRequestError, match=reason):
        upload()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with UploadStager(tmp_path, HEADER, LIMIT) as stager:
        next(tmp_path.iterdir()).joinpath("adapter_config.json").symlink_to("/dev/full")
        with pytest.raises(ResourceExhaustedError, match="disk is full"):
            stager.write("adapter_config.json", b"{}")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_from_elsewhere_is_not_taken_or_removed(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "elsewhere")
    registry = AdapterRegistry(tmp_path / "root", tiny_base())
    with pytest.raises(ValueError, match="is not a folder in"):
        registry.register_upload("a", folder)
    assert folder.is_dir()
    registry.close()
