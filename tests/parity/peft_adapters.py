"""Random adapters made and saved by PEFT, strong enough to change every text."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA = 16


@dataclass(frozen=True)
class RandomAdapter:
    """`strength` is about how large the adapter's part of a projection's output is, in units of the input.

    Weights are float32 and a function of the name, whatever the model's dtype. Adapters with the same rank and targets
    take turns in one PEFT adapter, the slot: PEFT needs seconds to give a model another one.
    """

    name: str
    rank: int
    strength: float
    targets: tuple[str, ...] = ALL_PROJECTIONS

    @property
    def slot(self) -> str:
        return f"rank{self.rank}-{'-'.join(self.targets)}"

    def config(self) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=ALPHA,
            target_modules=list(self.targets),
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        )

    def draw(self, model: PeftModel) -> None:
        """Put this adapter's weights into its slot."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and self.slot in layer.lora_A:
                a, b = (module.get_parameter(f"{self.slot}.weight") for module in (layer.lora_A, layer.lora_B))
                # A x is then about as large as x, and so is the sum of B's columns before the strength.
                a.data.copy_(torch.randn(a.shape, generator=generator) * a.shape[1] ** -0.5)
                std = self.strength * self.rank**0.5 / ALPHA
                b.data.copy_(torch.randn(b.shape, generator=generator) * std)


def save_random_adapters(model: PreTrainedModel, adapters: Sequence[RandomAdapter], folder: Path) -> PeftModel:
    """Save all `adapters` under `folder` by their names; return `model` as PEFT wraps it, for `active`."""
    slots = {adapter.slot: adapter.config() for adapter in adapters}
    first, *others = slots.items()
    wrapped = get_peft_model(model, first[1], adapter_name=first[0])
    for slot, config in others:
        wrapped.add_adapter(slot, config)
    for adapter in adapters:
        adapter.draw(wrapped)
        wrapped.save_pretrained(str(folder), selected_adapters=[adapter.slot], save_embedding_layers=False)
        (folder / adapter.slot).rename(folder / adapter.name)
    return wrapped.eval()


@contextmanager
def active(model: PeftModel, adapter: RandomAdapter | None) -> Iterator[Any]:
    """Yield `model` with one adapter, or with none."""
    if adapter is None:
        with model.disable_adapter(), torch.inference_mode():
            yield model
    else:
        adapter.draw(model)
        model.set_adapter(adapter.slot)
        with torch.inference_mode():
            yield model
