"""The files of an adapter, read into memory once, before anybody knows what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from loraplex.adapters.folder import CONFIG_FILE, read_chat_template, read_inside, require_weights
from loraplex.adapters.weights_file import header_of, read_weights_file


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """Config and chat template, and the whole weights file; what happens to the files afterwards does not reach it."""

    config: bytes
    chat_template: str | None
    weights: bytearray

    @classmethod
    def read(cls, folder: Path) -> AdapterFiles:
        """Read the adapter in `folder`.

        Raises:
            AdapterFormatError: if a file is missing, too large, damaged, or not where it should be.
            OSError: if it cannot be read.
        """
        config = read_inside(folder, CONFIG_FILE)
        template = read_chat_template(folder)
        return cls(config, template, read_weights_file(require_weights(folder)))

    @cached_property
    def layout_key(self) -> tuple[bytes, str | None, int, bytes]:
        """Everything but the numbers: adapters with equal keys differ in their numbers only."""
        return self.config, self.chat_template, len(self.weights), header_of(self.weights)
