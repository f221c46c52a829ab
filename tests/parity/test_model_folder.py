"""A model folder and the server's loader say the same of every tiny model, whichever way it is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.adapters.model_folder import ModelFolder
from loraplex.server.models.loader import load_model
from tests.parity.tiny_models import TINY_MODELS, TinyModel

FILE = "model.safetensors"
TIED = [tiny for tiny in TINY_MODELS if tiny.name in ("llama-tied-llama3", "gpt2-tied", "gemma2-caps")]


def assert_same(folder: Path, tiny: TinyModel) -> None:
    ours, served = ModelFolder.open(folder).base_model(), load_model(str(folder), dtype="float32").base
    assert ours.modules == served.modules
    assert ours.parameters == served.parameters
    assert (ours.embedding, ours.tied, ours.conv1d) == (served.embedding, served.tied, served.conv1d)


@pytest.mark.parametrize("tiny", TINY_MODELS, ids=lambda tiny: tiny.name)
def test_every_family(tmp_path: Path, tiny: TinyModel) -> None:
    tiny.save(tmp_path)
    assert_same(tmp_path, tiny)


@pytest.mark.parametrize("tiny", TIED, ids=lambda tiny: tiny.name)
@pytest.mark.parametrize("stored", ["both", "both, but different", "head"])
def test_the_ways_to_store_tied_matrices(tmp_path: Path, tiny: TinyModel, stored: str) -> None:
    tiny.save(tmp_path)
    embedding = ModelFolder.open(tmp_path).embedding
    tensors = load_file(tmp_path / FILE)
    tensors["lm_head.weight"] = tensors[embedding] * 2 if "different" in stored else tensors[embedding].clone()
    if stored == "head":
        del tensors[embedding]
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    assert_same(tmp_path, tiny)
    model = ModelFolder.open(tmp_path)
    assert model.tied == ("different" not in stored)
    head = model.read(model.head_source)
    assert torch.equal(head, tensors["lm_head.weight"])
