"""The files of an adapter folder, read without leaving it.

A name leads to a regular file inside the folder or is refused: a symbolic link may not lead out of it, and a pipe or a
device is never opened. Knows the files' names and sizes, not what they mean.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import BinaryIO

from loraplex.adapters.errors import AdapterFormatError, InvalidRequestError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
_MAX_TEXT_BYTES = {CONFIG_FILE: 1 << 20, TEMPLATE_FILE: 1 << 20, TOKENIZER_CONFIG: 32 << 20}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def require_inside(path: Path, roots: tuple[Path, ...]) -> Path:
    """Return the folder that `path` leads to once symbolic links are followed.

    Raises:
        InvalidRequestError: if it is not below one of `roots` (then nothing about it is revealed), or not a folder.
    """
    try:
        resolved = Path(os.path.realpath(path))
        inside = any(resolved.is_relative_to(root) for root in roots)
        is_folder = inside and resolved.is_dir()
    except (OSError, ValueError) as error:  # a zero byte, an over-long name, a folder that may not be entered
        raise InvalidRequestError.of("path", f"cannot be read: {error!s:.200}") from error
    if not inside:
        allowed = ", ".join(str(root) for root in roots) or "none are configured"
        raise InvalidRequestError.of("path", f"{path} is not below the allowed adapter roots ({allowed})")
    if not is_folder:
        raise InvalidRequestError.of("path", f"{path} is not a folder")
    return resolved


def find_inside(folder: Path, name: str) -> Path | None:
    """Return the resolved path of the regular file `name` in `folder`, or None if there is no such file.

    Raises:
        AdapterFormatError: if it is a link that leads out of the folder or to nothing, or not a regular file.
    """
    path = folder / name
    resolved = Path(os.path.realpath(path))
    if not resolved.is_relative_to(os.path.realpath(folder)):
        raise AdapterFormatError.of(name, "is a symbolic link that leads out of the adapter's folder; copy the file")
    try:
        mode = resolved.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise AdapterFormatError.of(name, "is not a regular file")
    return resolved


def read_inside(folder: Path, name: str) -> bytes:
    """Return the content of the small file `name` in `folder`.

    Raises:
        AdapterFormatError: if it is missing, not a regular file in the folder, or too large.
    """
    path = find_inside(folder, name)
    if path is None:
        raise AdapterFormatError.of(name, "is missing; a PEFT adapter folder has one")
    limit = _MAX_TEXT_BYTES[name]
    with open_inside(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise AdapterFormatError.of(name, f"is larger than {limit >> 20} MiB")
    return data


def require_weights(folder: Path) -> Path:
    """Return the path of the weights in `folder`.

    Raises:
        AdapterFormatError: if there are none, or only pickled ones.
    """
    path = find_inside(folder, WEIGHTS_FILE)
    if path is not None:
        return path
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickled:
        raise AdapterFormatError.of(
            WEIGHTS_FILE,
            f"is missing and {pickled[0]} is a pickle, which is never opened here; convert it to safetensors "
            "(PEFT writes it with save_pretrained(..., safe_serialization=True))",
        )
    raise AdapterFormatError.of(WEIGHTS_FILE, "is missing; a PEFT adapter folder has one")


def read_chat_template(folder: Path) -> str | None:
    """Return the chat template beside the adapter: `chat_template.jinja`, else the one in `tokenizer_config.json`.

    Raises:
        AdapterFormatError: if the file that holds it is not text or JSON.
    """
    try:
        if find_inside(folder, TEMPLATE_FILE) is not None:
            return read_inside(folder, TEMPLATE_FILE).decode()
        if find_inside(folder, TOKENIZER_CONFIG) is None:
            return None
        config = json.loads(read_inside(folder, TOKENIZER_CONFIG))
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError.of("chat template", f"cannot be read: {error}") from error
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):
        named = (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default")
        template = next(named, None)
    if template is None:
        return None
    if not isinstance(template, str) or any("\ud800" <= character <= "\udfff" for character in template):
        raise AdapterFormatError.of(TOKENIZER_CONFIG, "has a chat_template that is not text")
    return template


def open_inside(resolved: Path) -> BinaryIO:
    """Open a path that `find_inside` has returned.

    Raises:
        AdapterFormatError: if it is not a regular file any more.
        OSError: if it cannot be opened.
    """
    # O_NOFOLLOW and O_NONBLOCK: the file may have been exchanged for a link or a pipe since it was looked at.
    descriptor = os.open(resolved, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterFormatError.of(resolved.name, "is not a regular file")
    return os.fdopen(descriptor, "rb")
