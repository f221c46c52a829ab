"""What transformers and PEFT make of a base model and an adapter: the reference that nothing of ours takes part in.

The one thing of ours is the rounding of weights to what a quantizing server computes with. All weights are in memory in
float32, four bytes a parameter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loraplex.adapters.base_model import HEAD_WEIGHT
from loraplex.adapters.bnb import import_bitsandbytes
from loraplex.adapters.model_folder import ModelFolder
from loraplex.adapters.quantized_values import round_trip
from loraplex.adapters.streamed_model import empty_model


def adapted_model(model: Path, adapter: Path, quantization: str | None) -> Any:
    """Return the model in the folder `model` with PEFT's adapter of the folder `adapter` beside it.

    With a `quantization` the blocks' weights have the values that they have once they are quantized.

    Raises:
        PreconditionError: the model cannot be read, or transformers does not know it.
        ValueError: PEFT cannot load the adapter into the model.
    """
    import_bitsandbytes()  # before PEFT does
    from peft import PeftModel

    return PeftModel.from_pretrained(plain_model(model, quantization), str(adapter)).eval()


def plain_model(folder: Path, quantization: str | None = None) -> Any:
    """Return the model in `folder` as transformers builds it, in float32.

    Raises:
        PreconditionError: the model cannot be read, or transformers does not know it.
    """
    files = ModelFolder.open(folder)
    rounded = {f"{module}.weight" for module in files.block_modules()} if quantization else set()

    def read(name: str) -> torch.Tensor:
        source = files.head_source if name == HEAD_WEIGHT else name
        weight = files.read(source).float()
        if quantization is None or name not in rounded or files.tensors[source].parts:
            return weight.clone()
        if files.is_transposed(name):
            return round_trip(weight.t(), quantization).t().contiguous()
        return round_trip(weight, quantization)

    model = empty_model(folder)
    shared: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for path, module in model.named_modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in shared:
                weight = read(f"{path}.{own}" if path else own)
                shared[parameter] = torch.nn.Parameter(weight, requires_grad=False)
            setattr(module, own, shared[parameter])
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the logits (tokens, vocabulary) float32 of one sequence."""
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return found.float()
