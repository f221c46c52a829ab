"""The GPU's targets (8B shape, 512 tokens of context, decode): what each is about, and what the model says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Steps = Mapping[str, Mapping[str, Any]]
"""Of `step_model.model_document`."""


@dataclass(frozen=True)
class Target:
    """One row of the table; `key` is its key in gpu.json.

    `at_least` says that larger is better; `modelled` gives the model's figure, None where it says nothing.
    """

    key: str
    what: str
    unit: str
    value: float
    at_least: bool
    modelled: Callable[[Steps], float] | None

    @property
    def text(self) -> str:
        """The target with its sign."""
        return f"{'>=' if self.at_least else '<='} {self.value:g}{self.unit}"

    def met(self, figure: float) -> bool:
        """Whether a figure meets it."""
        return figure >= self.value if self.at_least else figure <= self.value


def _ms(name: str, without: str = "") -> Callable[[Steps], float]:
    def difference(steps: Steps) -> float:
        ms: float = steps[name]["modelled_ms"]
        return ms - steps[without]["modelled_ms"] if without else ms

    return difference


def _kept(steps: Steps) -> float:
    base: float = steps["32 rows"]["modelled_ms"]
    return 100 * base / float(steps["32 rows, 32 adapters of rank 8 on q and v"]["modelled_ms"])


def _over_bfloat16(steps: Steps) -> float:
    base: float = steps["32 rows"]["modelled_ms"]
    return base / float(steps["32 rows, weights in bfloat16"]["modelled_ms"])


TARGETS = (
    Target("step_1_row_ms", "step, 1 row, base NF4", " ms", 3.2, False, _ms("1 row")),
    Target("step_32_rows_ms", "step, 32 rows, base NF4", " ms", 4.5, False, _ms("32 rows")),
    Target("nf4_over_bfloat16", "the same over weights in bfloat16", "", 1.0, False, _over_bfloat16),
    Target(
        "lora_8_adapters_ms",
        "what LoRA adds, 32 rows, 8 adapters rank 16, all linear",
        " ms",
        0.6,
        False,
        _ms("32 rows, 8 adapters of rank 16", "32 rows"),
    ),
    Target(
        "lora_32_adapters_ms",
        "what LoRA adds, 32 rows, 32 adapters rank 16, all linear",
        " ms",
        1.6,
        False,
        _ms("32 rows, 32 adapters of rank 16", "32 rows"),
    ),
    Target("mixed_over_base_percent", "mixed / base, rank 8, q and v only", " %", 93.0, True, _kept),
    Target("over_peft", "transformers + PEFT `adapter_names` over ours, same batch", "x", 15.0, True, None),
    Target(
        "many_adapters_percent", "2,000 adapters rank 8 on q and v, Zipf 1.0, against 5, warm", " %", 94.0, True, None
    ),
)
