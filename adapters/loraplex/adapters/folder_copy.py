"""Copies what makes an adapter out of a folder that others may write to; looks at its size before taking anything.

Knows of the weights only that they are a safetensors file with a header of a sensible length.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from loraplex.adapters.errors import AdapterFormatError
from loraplex.adapters.folder import (
    CONFIG_FILE,
    TEMPLATE_FILE,
    WEIGHTS_FILE,
    open_inside,
    read_chat_template,
    read_inside,
    require_weights,
)
from loraplex.adapters.weights_file import LENGTH_BYTES, require_sane_header

_CHUNK_BYTES = 1 << 20


def copy_adapter(source: Path, target: Path, max_bytes: int) -> None:
    """Copy what makes an adapter from `source` into the empty folder `target`: config, weights, chat template.

    The template is written as `chat_template.jinja` whatever file held it.

    Raises:
        AdapterFormatError: as the readers of `folder`; or the files have more than `max_bytes` bytes together.
        OSError: if the copy fails, for instance for lack of space.
    """
    config = read_inside(source, CONFIG_FILE)
    template = read_chat_template(source)
    with open_inside(require_weights(source)) as weights:
        size = weights.seek(0, 2)
        total = size + len(config) + len((template or "").encode())
        if total > max_bytes:
            raise AdapterFormatError.of(
                WEIGHTS_FILE, f"makes the adapter {total} bytes large, more than the {max_bytes} that this server takes"
            )
        weights.seek(0)
        require_sane_header(weights.read(LENGTH_BYTES), size)
        weights.seek(0)
        with (target / WEIGHTS_FILE).open("xb") as copy:
            _copy(weights, copy, size)
    (target / CONFIG_FILE).write_bytes(config)
    if template is not None:
        (target / TEMPLATE_FILE).write_bytes(template.encode())


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    """Copy at most `size` bytes: somebody may be appending to the file."""
    while size and (data := source.read(min(size, _CHUNK_BYTES))):
        target.write(data)
        size -= len(data)
