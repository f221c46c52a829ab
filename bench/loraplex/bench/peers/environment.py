"""Gives a peer an environment of its own: a venv below a cache folder, with exactly its packages and theirs."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

MARKER = "installed.json"
_LOG_LINES = 6


class EnvironmentMissingError(RuntimeError):
    """What a peer needs could not be installed; the message ends with what pip said."""


def ensure_environment(
    folder: Path, packages: Sequence[str], without: Sequence[str] = (), torch_index: str = ""
) -> Path:
    """Return the interpreter of the venv in `folder`, installing `packages` the first time and when they change.

    `without` is removed again after that. `torch_index` is one more package index, for instance one with CPU-only
    builds of torch.

    Raises:
        EnvironmentMissingError: if pip fails.
    """
    python = folder / "venv" / "bin" / "python"
    marker = folder / MARKER
    wanted = [list(packages), list(without)]
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == wanted:
        return python
    marker.unlink(missing_ok=True)
    if not python.exists():
        venv.create(folder / "venv", with_pip=True)
    index = ["--extra-index-url", torch_index] if torch_index else []
    _pip(python, ["install", *index, *packages], folder / "install.log")
    if without:
        _pip(python, ["uninstall", "--yes", *without], folder / "uninstall.log")
    marker.write_text(json.dumps(wanted), encoding="utf-8")
    return python


def _pip(python: Path, arguments: Sequence[str], log: Path) -> None:
    with log.open("wb") as output:
        command = ["nice", "-n", "10", str(python), "-m", "pip", *arguments]
        status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT).returncode
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise EnvironmentMissingError("\n".join([f"pip {arguments[0]} failed", *lines[-_LOG_LINES:]]))


def own_interpreter() -> Path:
    """Return the interpreter that this runs in."""
    return Path(sys.executable)
