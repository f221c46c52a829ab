"""Bytes that training takes, for full fine-tuning, LoRA and QLoRA, from a model's config alone.

Weights, gradients and optimizer states are counted; activations come from a traced step (`step_trace`). What the
process itself needs (interpreter, libraries, a CUDA context: 0.5 to 1 GB) is not in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from loraplex.adapters.errors import InvalidRequestError
from loraplex.adapters.training.architecture import CLASSIFICATION, ModelArchitecture
from loraplex.adapters.training.step_trace import Batch, trace_step

Method = Literal["full", "lora", "qlora"]
METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
# bitsandbytes: 4 bits a weight and a scale for each block of 64, of 32 bits, or of 8 bits with a second scale of 32
# bits for each 256 of them.
BLOCK = 64
PLAIN_SCALE_BYTES = 4 / BLOCK
DOUBLE_SCALE_BYTES = 1 / BLOCK + 4 / (BLOCK * 256)
ADAM_STATES = 2


@dataclass(frozen=True)
class TrainingShape:
    """What decides how much memory a training run takes.

    Attributes:
        rows, length: of one forward pass, in sequences and tokens.
        dtype: of the base's weights, and in which is computed.
        checkpointing: compute activations again in the backward pass.
        accumulation: forward passes of one optimizer step.
        rank, targets, rank_pattern, dropout: of the adapter; `targets` as PEFT takes them.
        double_quant: whether the block scales of 4 bits are quantized too.
    """

    rows: int = 4
    length: int = 512
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = False
    accumulation: int = 1
    rank: int = 16
    targets: tuple[str, ...] | str = "all-linear"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    dropout: float = 0.05
    double_quant: bool = True


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the peak of a training step, by what they are for. `adapters` are the weights that LoRA adds."""

    method: Method
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    trained: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """The bytes by name."""
        names = ("weights", "adapters", "gradients", "optimizer", "activations")
        return {name: getattr(self, name) for name in names}


def training_memory(model: ModelArchitecture, method: Method, shape: TrainingShape) -> TrainingMemory:
    """Plan one training run.

    Full fine-tuning is done in `dtype` throughout (weights, gradients and both states of Adam). LoRA keeps A, B and
    their states in float32, as our trainer does, beside a base in `dtype`. QLoRA's base is 4 bits wide except for
    embeddings, norms and the output layer.

    Raises:
        InvalidRequestError: no module answers to `targets`.
    """
    built = model.build(shape.dtype)
    base = sum(parameter.nbytes for parameter in _unique(built.parameters()))
    adapters = 0
    if method != "full":
        built = _with_lora(built, model, shape)
        adapters = sum(parameter.nbytes for parameter in built.parameters() if parameter.requires_grad)
    trained = sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)
    trained_bytes = sum(parameter.nbytes for parameter in built.parameters() if parameter.requires_grad)
    step = trace_step(built, Batch(shape.rows, shape.length, shape.checkpointing, shape.accumulation > 1))
    activations = step.activations
    if method == "qlora":
        base -= saved_by_four_bits(model, shape.dtype, shape.double_quant)
        # One weight at a time is written out for its product.
        activations += max(module.weights for module in model.body) * shape.dtype.itemsize
    return TrainingMemory(method, base, adapters, step.gradients, ADAM_STATES * trained_bytes, activations, trained)


def saved_by_four_bits(model: ModelArchitecture, dtype: torch.dtype, double_quant: bool) -> int:
    """Return by how many bytes the linear modules shrink; embeddings and the output layer stay as they are."""
    weights = sum(module.weights for module in model.body)
    scale = DOUBLE_SCALE_BYTES if double_quant else PLAIN_SCALE_BYTES
    return round(weights * (dtype.itemsize - 0.5 - scale))


def _with_lora(built: Any, model: ModelArchitecture, shape: TrainingShape) -> Any:
    import peft

    config = peft.LoraConfig(
        r=shape.rank,
        lora_alpha=2 * shape.rank,
        lora_dropout=shape.dropout,
        target_modules=shape.targets if isinstance(shape.targets, str) else list(shape.targets),
        rank_pattern=dict(shape.rank_pattern),
        task_type="SEQ_CLS" if model.task == CLASSIFICATION else "CAUSAL_LM",
    )
    try:
        # PEFT sets fan_in_fan_out for GPT-2's layers by itself, and says so.
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(built, config)
    except ValueError as error:
        raise InvalidRequestError.of("target_modules", " ".join(str(error).split())[:300]) from error


def _unique(parameters: Any) -> list[torch.nn.Parameter]:
    return list({id(parameter): parameter for parameter in parameters}.values())
