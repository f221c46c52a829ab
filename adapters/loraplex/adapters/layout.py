"""Reads adapters that differ from a known one in their numbers only, without looking at every name again.

The adapters of one training set-up have the same config, names, types and shapes. What was found out about one of them,
where each tensor goes and what the canonical form has between the tensors, holds for all. The digest is computed over
every byte each time all the same. Knows plain LoRA only; others are read in full.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from loraplex.adapters.bound import BoundAdapter, ModuleWeights
from loraplex.adapters.digest import PREFIX
from loraplex.adapters.files import AdapterFiles
from loraplex.adapters.formats import Adapter
from loraplex.adapters.weights_file import view

KEPT_LAYOUTS = 64


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the weights file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.dtype.itemsize * torch.Size(self.shape).numel()

    def of(self, content: bytearray) -> torch.Tensor:
        return view(content, self.dtype, self.shape, self.offset)


@dataclass(frozen=True, eq=False)
class Layout:
    """What all adapters with one `AdapterFiles.layout_key` have in common.

    Attributes:
        pieces: of the canonical form.
        modules: where A and B of each module lie, and its scaling.
        example: one of the adapters, bound, without its modules.
        rank: the largest of any module.
        target_modules: last names of the modules, as the adapter's author names them.
    """

    pieces: tuple[bytes | _Place, ...]
    modules: Mapping[str, tuple[_Place, _Place, float]]
    example: BoundAdapter
    rank: int
    target_modules: tuple[str, ...]

    @classmethod
    def of(cls, files: AdapterFiles, adapter: Adapter, bound: BoundAdapter) -> Layout | None:
        """Return the layout of an adapter that was read from `files`, None if it is no plain LoRA.

        The tensors are views of the files' content.
        """
        if bound.embedding or bound.parameters or bound.token_rows:
            return None
        if any(m.magnitude is not None or m.lora_bias is not None for m in bound.modules.values()):
            return None
        start = torch.frombuffer(files.weights, dtype=torch.uint8).data_ptr()

        def place(tensor: torch.Tensor) -> _Place | None:
            offset = tensor.data_ptr() - start
            inside = offset >= 0 and offset + tensor.nbytes <= len(files.weights)
            return _Place(tensor.dtype, tuple(tensor.shape), offset) if inside and tensor.is_contiguous() else None

        pieces = [piece if isinstance(piece, bytes) else place(piece) for piece in adapter.canonical_form]
        modules = {name: (place(m.a), place(m.b), m.scaling) for name, m in bound.modules.items()}
        known = {name: (a, b, scaling) for name, (a, b, scaling) in modules.items() if a and b}
        if None in pieces or len(known) < len(modules):
            return None  # something was put together anew
        joined = _joined(piece for piece in pieces if piece is not None)
        return cls(joined, known, replace(bound, modules={}), adapter.rank, adapter.target_modules)

    def is_finite(self, files: AdapterFiles) -> bool:
        """Say whether all numbers of an adapter of this layout are finite."""
        places = [piece for piece in self.pieces if not isinstance(piece, bytes)]
        first, end = min(place.offset for place in places), max(place.end for place in places)
        if len({place.dtype for place in places}) == 1:
            # They fill the file's body without gaps.
            count = (end - first) // places[0].dtype.itemsize
            places = [_Place(places[0].dtype, (count,), first)]
        return all(bool(torch.isfinite(place.of(files.weights)).all()) for place in places)

    def digest(self, files: AdapterFiles) -> str:
        """Return the digest of an adapter of this layout."""
        hasher = hashlib.sha256()
        content = memoryview(files.weights)
        for piece in self.pieces:
            hasher.update(piece if isinstance(piece, bytes) else content[piece.offset : piece.end])
        return PREFIX + hasher.hexdigest()

    def bound(self, files: AdapterFiles) -> BoundAdapter:
        """Return an adapter of this layout as binding would."""
        content = files.weights
        modules = {name: ModuleWeights(a.of(content), b.of(content), s) for name, (a, b, s) in self.modules.items()}
        return replace(self.example, digest=self.digest(files), modules=modules, layout=self)


class Layouts:
    """The layouts that were seen lately, for one base model. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[bytes, str | None, int, bytes], Layout] = OrderedDict()

    def find(self, files: AdapterFiles) -> Layout | None:
        """Return the layout of an adapter, if another one had it."""
        with self._lock:
            layout = self._known.get(files.layout_key)
            if layout is not None:
                self._known.move_to_end(files.layout_key)
            return layout

    def add(self, files: AdapterFiles, layout: Layout) -> None:
        """Keep a layout; the one that was not used for longest goes if there are too many."""
        with self._lock:
            self._known[files.layout_key] = layout
            if len(self._known) > KEPT_LAYOUTS:
                self._known.popitem(last=False)


def _joined(pieces: Iterable[bytes | _Place]) -> tuple[bytes | _Place, ...]:
    """Put neighbouring constants together."""
    joined: list[bytes | _Place] = []
    for piece in pieces:
        if isinstance(piece, bytes) and joined and isinstance(joined[-1], bytes):
            joined[-1] += piece
        else:
            joined.append(piece)
    return tuple(joined)
