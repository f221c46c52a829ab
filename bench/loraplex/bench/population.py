"""Writes very many distinct adapters of one kind quickly: every one takes another stretch of the same random numbers.

As PEFT would save them, with q_proj and v_proj for targets. Speed does not depend on the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from loraplex.bench.random_adapter import CONFIG, WEIGHTS, ModelShape, peft_config

STD = 0.01
"""Standard deviation of the random numbers: small beside the base."""
TARGETS = ("self_attn.q_proj", "self_attn.v_proj")
STRIDE = 8
"""Numbers between the stretches of two adapters."""
ITEM_BYTES = 2
"""The files are float16."""


@dataclass(frozen=True)
class Population:
    """`count` adapters of one rank for a model of this shape; equal populations write equal files."""

    shape: ModelShape
    rank: int
    count: int

    @property
    def parameters(self) -> int:
        """Numbers in each adapter."""
        return sum(rows * columns for rows, columns in self._tensors.values())

    def write(self, root: Path, on_progress: Callable[[int], None] = lambda _: None) -> list[Path]:
        """Write the adapters below `root` and return their folders; `on_progress` hears how many there are."""
        header, config = self._header(), peft_config(self.rank, TARGETS)
        numbers = self._numbers
        size = self.parameters * ITEM_BYTES
        folders = []
        for index in range(self.count):
            folder = root / f"r{self.rank}-{index:04d}"
            folder.mkdir(parents=True)
            start = index * STRIDE * ITEM_BYTES
            with (folder / WEIGHTS).open("wb") as file:
                file.write(header)
                file.write(numbers[start : start + size])
            (folder / CONFIG).write_text(config, encoding="utf-8")
            folders.append(folder)
            on_progress(index + 1)
        return folders

    @cached_property
    def _tensors(self) -> Mapping[str, tuple[int, int]]:
        """Shapes by name, in the order of the file."""
        shapes = {}
        for layer in range(self.shape.layers):
            for module in TARGETS:
                inputs, outputs = self.shape.projections()[module]
                name = f"base_model.model.model.layers.{layer}.{module}"
                shapes[f"{name}.lora_A.weight"] = (self.rank, inputs)
                shapes[f"{name}.lora_B.weight"] = (outputs, self.rank)
        return shapes

    @cached_property
    def _numbers(self) -> memoryview:
        import numpy as np

        draw = np.random.default_rng(self.rank)
        count = self.parameters + self.count * STRIDE
        return (STD * draw.standard_normal(count, dtype=np.float32)).astype("<f2").data.cast("B")

    def _header(self) -> bytes:
        """Return what a safetensors file begins with: the length of a JSON text, and the text."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (rows, columns) in self._tensors.items():
            end = offset + rows * columns * ITEM_BYTES
            entries[name] = {"dtype": "F16", "shape": [rows, columns], "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text
