"""Where a base model comes from: a folder, a GGUF file, or a hub id; all end as a Hugging Face folder on disk."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from loraplex.server.errors import ModelLoadError
from loraplex.server.models.demo import cache_root
from loraplex.server.models.gguf import import_gguf

# What a server needs of a repository: no pickles, no weights in other formats, no code.
HUB_FILES = ("*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.txt", "model*.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PREFIX_BYTES = 1 << 20


def resolve_model(model: str) -> Path:
    """Return the local folder of `model`: a folder as it is, a GGUF file converted, a hub id downloaded.

    Raises:
        ModelLoadError: saying what was not found or could not be fetched, and what to try.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.suffix.lower() == ".gguf":
        return _converted(path)
    if path.is_file():
        raise ModelLoadError(f"{path} is a file: give the model's folder, a .gguf file or a hub id")
    if not _HUB_ID.fullmatch(model):
        raise ModelLoadError(f"no model at {path}: there is no such folder, and it is no hub id (owner/name)")
    return _downloaded(model)


def _converted(gguf: Path) -> Path:
    """Return the folder that a GGUF file was converted to, in the cache; converts on the first call."""
    if not gguf.is_file():
        raise ModelLoadError(f"no such GGUF file: {gguf}")
    status = gguf.stat()
    with gguf.open("rb") as stream:
        start = stream.read(_PREFIX_BYTES)
    digest = hashlib.sha256(f"{gguf.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode() + start)
    return import_gguf(gguf, cache_root() / "models" / f"{gguf.stem}-{digest.hexdigest()[:12]}")


def _downloaded(model: str) -> Path:
    """Return the cached snapshot of a hub repository, fetched where needed and possible."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(model, allow_patterns=list(HUB_FILES)))
    except GatedRepoError as error:
        raise ModelLoadError(
            f"{model} is gated: accept its terms on the hub and log in (hf auth login or HF_TOKEN)"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelLoadError(
            f"no model {model!r}: neither a folder here nor a repository on the hub (or a private one: set HF_TOKEN)"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelLoadError(
            f"{model} is neither a folder here nor in the hub's cache, and the hub cannot be reached: give the path of "
            "a local folder, or fetch the model where there is a connection (and unset HF_HUB_OFFLINE)"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelLoadError(f"{model} could not be fetched from the hub: {error}") from error
