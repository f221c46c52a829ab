"""A transformers model that holds no weights: each module gets its own from a mapping for as long as it computes.

So a model is evaluated in float32 with the memory of its largest module. transformers alone decides what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from loraplex.adapters.errors import PreconditionError

# Returns the parameter of that name: float32, in the layout of the model.
Weights = Callable[[str], torch.Tensor]


class StreamedModel:
    """The causal language model whose config lies in a folder."""

    def __init__(self, folder: Path, weights: Weights, on_module: Callable[[], None] = lambda: None) -> None:
        """Build the model without weights; `on_module` is called whenever a module has got its own.

        Raises:
            PreconditionError: if transformers does not know the model without code from elsewhere.
        """
        self.model = empty_model(folder)
        self._weights = weights
        self._on_module = on_module
        self._empty: dict[torch.nn.Module, dict[str, torch.nn.Parameter | None]] = {}
        self.loads = 0
        for name, module in self.model.named_modules():
            names = [own for own, parameter in module.named_parameters(recurse=False) if parameter is not None]
            if names:
                self.loads += 1
                full = {own: f"{name}.{own}" if name else own for own in names}
                module.register_forward_pre_hook(self._loader(full))
                module.register_forward_hook(self._unload, always_call=True)

    def logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the logits (batch, tokens, vocabulary) float32 for `ids` and `mask` (batch, tokens)."""
        with torch.inference_mode():
            found: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found.float()

    def _loader(self, names: Mapping[str, str]) -> Callable[[torch.nn.Module, Any], None]:
        def load(module: torch.nn.Module, args: Any) -> None:
            self._empty[module] = {own: module._parameters[own] for own in names}
            for own, full in names.items():
                module._parameters[own] = torch.nn.Parameter(self._weights(full).float(), requires_grad=False)
            self._on_module()

        return load

    def _unload(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(self._empty.pop(module, {}))


def empty_model(folder: Path) -> Any:
    """Return the causal language model whose config lies in `folder`, without weights, ready to evaluate.

    Raises:
        PreconditionError: if transformers does not know the model without code from elsewhere.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    # Weights come with the values that they stand for, whatever they are stored as.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with init_empty_weights(include_buffers=False):
            build: Any = AutoModelForCausalLM.from_config
            model = build(config, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise PreconditionError(f"transformers cannot build the model in {folder}: {error!s:.300}") from error
    return model.eval()


def read_config(folder: Path) -> Any:
    """Return the config of the model in `folder` as transformers has it, defaults included.

    Raises:
        PreconditionError: if transformers does not know the model without code from elsewhere.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise PreconditionError(f"transformers cannot build the model in {folder}: {error!s:.300}") from error
