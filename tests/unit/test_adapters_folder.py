"""The files of an adapter folder: templates, copies, and what is never opened."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from loraplex.adapters.errors import AdapterFormatError, InvalidRequestError
from loraplex.adapters.folder import require_inside
from loraplex.adapters.folder_copy import copy_adapter
from loraplex.adapters.formats import read_adapter
from tests.adapter_factory import write_adapter


def refusal(folder: Path) -> AdapterFormatError:
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(folder)
    return caught.value


def test_template_comes_from_its_file_or_from_the_tokenizers_config(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "from config"}))
    assert read_adapter(tmp_path).chat_template == "from config"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "the default"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_adapter(tmp_path).chat_template == "the default"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert read_adapter(tmp_path).chat_template == "from file"


def test_a_copy_is_the_same_adapter(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": "line\r\nline"}))
    (source / "unrelated.py").write_text("raise SystemExit")
    (tmp_path / "copy").mkdir()
    copy_adapter(source, tmp_path / "copy", 1 << 20)
    assert read_adapter(tmp_path / "copy").digest == read_adapter(source).digest
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
    ]


def test_a_copy_begins_only_if_it_may_end(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source", template="t")
    (tmp_path / "copy").mkdir()
    total = sum(path.stat().st_size for path in source.iterdir())
    weights = source / "adapter_model.safetensors"
    for max_bytes, size, reason in (
        (total - 1, weights.stat().st_size, f"{total} bytes large, more than the {total - 1}"),
        (1 << 30, 1 << 40, "more than the 1073741824 that this server takes"),  # sparse
    ):
        os.truncate(weights, size)
        with pytest.raises(AdapterFormatError, match=reason):
            copy_adapter(source, tmp_path / "copy", max_bytes)
    weights.write_bytes(b"\xff" * 8)
    os.truncate(weights, 1 << 40)
    with pytest.raises(AdapterFormatError, match="so it is no adapter"):
        copy_adapter(source, tmp_path / "copy", 1 << 50)
    assert list((tmp_path / "copy").iterdir()) == []


def test_a_copy_at_the_limit_is_taken(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source", template="")
    (tmp_path / "copy").mkdir()
    copy_adapter(source, tmp_path / "copy", sum(path.stat().st_size for path in source.iterdir()))
    assert read_adapter(tmp_path / "copy").digest == read_adapter(source).digest


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"])
def test_links_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    folder = write_adapter(tmp_path / "adapter", template="t")
    outside = (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(outside)
    assert "leads out of the adapter's folder" in str(refusal(folder))
    (folder / name).unlink()
    (folder / "inner").write_bytes(outside.read_bytes())
    (folder / name).symlink_to("inner")
    assert read_adapter(folder).chat_template == "t"


def test_pipes_and_folders_are_not_opened(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    assert "not a regular file" in str(refusal(folder))
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").mkdir()
    assert "not a regular file" in str(refusal(folder))


def test_oversized_text_files(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, template="x" * ((1 << 20) + 1))
    assert "larger than 1 MiB" in str(refusal(folder))


@pytest.mark.parametrize("template", [7, [{"name": "default", "template": 7}], "\ud800"])
def test_templates_that_are_not_text(tmp_path: Path, template: object) -> None:
    folder = write_adapter(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert "chat_template" in str(refusal(folder))


def test_paths_outside_the_allowed_roots(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_adapter(root / "inside")
    write_adapter(tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    assert require_inside(root / "inside", (root,)) == root / "inside"
    for path in (tmp_path / "outside", root / "link", root / ".." / "outside", tmp_path / "absent", Path("/etc")):
        with pytest.raises(InvalidRequestError, match="not below the allowed adapter roots") as caught:
            require_inside(path, (root,))
        assert str(root) in str(caught.value)
    with pytest.raises(InvalidRequestError, match="is not a folder"):
        require_inside(root / "absent", (root,))
