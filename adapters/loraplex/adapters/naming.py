"""How the module paths in an adapter's file relate to those of the base model that it is bound to.

The same decoder has other paths where it was trained inside another class: without its head, or as the language part of
a larger model. And what one checkpoint has as one linear module (`qkv_proj`) another has as several; see `fusion`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from loraplex.adapters.base_model import HEAD

_BLOCK = re.compile(r"(?P<root>.*?)(?:layers|h)\.\d+\..+")
# What may stand in place of the base's root in an adapter's paths.
_OTHER_ROOTS = {
    "model.": ("", "model.model.", "language_model.", "model.language_model.", "language_model.model."),
    "transformer.": ("",),
}
_OTHER_HEADS = {"language_model.model.": f"language_model.{HEAD}"}


@dataclass(frozen=True)
class Naming:
    """Paths below `source_root` in the adapter's file are below `base_root` in the base; `head` is its lm_head."""

    source_root: str = ""
    base_root: str = ""
    head: str = HEAD

    def to_base(self, path: str) -> str:
        """Return the base's name of a module or parameter of the adapter's file."""
        if path == self.head or path.startswith(f"{self.head}."):
            return HEAD + path[len(self.head) :]
        return self.base_root + path[len(self.source_root) :] if path.startswith(self.source_root) else path

    def to_source(self, path: str) -> str:
        """Return the name that a module or parameter of the base has in the adapter's file."""
        if path == HEAD or path.startswith(f"{HEAD}."):
            return self.head + path[len(HEAD) :]
        return self.source_root + path[len(self.base_root) :] if path.startswith(self.base_root) else path


def find_naming(source: Iterable[str], base: Iterable[str]) -> Naming:
    """Return how the paths of an adapter's modules relate to the base's: by known roots, else not at all."""
    source_roots, base_roots = _roots(source), _roots(base)
    if len(source_roots) == len(base_roots) == 1:
        (source_root,), (base_root,) = source_roots, base_roots
        if source_root in _OTHER_ROOTS.get(base_root, ()):
            return Naming(source_root, base_root, _OTHER_HEADS.get(source_root, HEAD))
    return Naming()


def _roots(paths: Iterable[str]) -> set[str]:
    matches = (_BLOCK.fullmatch(path) for path in paths)
    return {match["root"] for match in matches if match}
