"""Turn a GGUF file into a normal Hugging Face folder, once, so that everything else reads one format.

The weights are dequantized to bfloat16 by transformers; the folder carries config, generation config, tokenizer with
its chat template, and `model.safetensors`. Knows nothing about which families the decoder can serve.
"""

from __future__ import annotations

import os
import shutil
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraplex.server.errors import ModelLoadError

GGUF_MAGIC = b"GGUF"
_COMPLETE = ("config.json", "tokenizer.json", "tokenizer_config.json")
# What transformers and its GGUF reader raise on a truncated or unsupported file, once the magic has matched.
_UNREADABLE = (ValueError, KeyError, IndexError, TypeError, NotImplementedError, RuntimeError, struct.error)


class GgufError(ModelLoadError, ValueError):
    """The file is missing, is not GGUF, is damaged, or holds an architecture that transformers cannot convert."""


class OutputExistsError(ModelLoadError, ValueError):
    """The output path is taken by something that is not a converted model; nothing was touched."""


def is_model_folder(path: Path) -> bool:
    """Return whether `path` is a complete Hugging Face folder: config, tokenizer and safetensors weights."""
    return all((path / name).is_file() for name in _COMPLETE) and any(path.glob("*.safetensors"))


def import_gguf(gguf: Path, output: Path, *, overwrite: bool = False) -> Path:
    """Convert the GGUF file `gguf` into a Hugging Face folder with bfloat16 weights, and return `output`.

    The folder is written beside `output` under a temporary name and renamed, so `output` is complete or absent, also
    when several processes convert at once (the first rename wins, the others' work is dropped). A complete `output` is
    returned as it is, without looking at `gguf`, unless `overwrite` is set.

    Raises:
        GgufError: `gguf` is missing, not a GGUF file, damaged, or of an unknown architecture.
        OutputExistsError: `output` exists and is not a model folder.
    """
    if is_model_folder(output) and not overwrite:
        return output
    _check_magic(gguf)
    if output.exists() and not is_model_folder(output) and (not output.is_dir() or any(output.iterdir())):
        raise OutputExistsError(f"{output} exists and is not a model folder: remove it or choose another output")
    with _temporary_sibling(output) as folder:
        _convert(gguf, folder)
        _move_into_place(folder, output, overwrite=overwrite)
    return output


def _check_magic(gguf: Path) -> None:
    """Raise GgufError unless `gguf` is a readable file that starts with the GGUF magic."""
    if not gguf.is_file():
        raise GgufError(f"no such GGUF file: {gguf}")
    with gguf.open("rb") as stream:
        magic = stream.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise GgufError(f"{gguf} is not a GGUF file: it starts with {magic!r}, not {GGUF_MAGIC!r}")


@contextmanager
def _temporary_sibling(output: Path) -> Iterator[Path]:
    """Yield an empty folder on the same file system as `output`, removed at the end if it is still there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.parent / f".{output.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of `gguf` into the empty `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(str(gguf.parent), **source)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **source)
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **source
        )
    except _UNREADABLE as error:
        raise GgufError(f"{gguf} cannot be converted: {error}") from error
    # GGUF says nothing about the tokenizer's limit, and how this one was loaded is no property of the model.
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    for path in folder.iterdir():  # safetensors leaves its file readable by the owner alone
        path.chmod(0o644)


def _move_into_place(folder: Path, output: Path, *, overwrite: bool) -> None:
    """Rename `folder` to `output`; where another process was first, keep that one's folder unless `overwrite`."""
    if overwrite and is_model_folder(output):
        retired = folder.with_suffix(".old")
        output.rename(retired)
        folder.rename(output)
        shutil.rmtree(retired)
        return
    try:
        folder.rename(output)
    except OSError:
        if not is_model_folder(output):
            raise
