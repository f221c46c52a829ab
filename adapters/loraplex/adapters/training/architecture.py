"""What a base model is made of, read from its config alone: its class built without weights, on the meta device.

Any model that transformers can build is inspected the same way; nothing is looked up by its name. No remote code runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraplex.adapters.base_model import HEAD
from loraplex.adapters.errors import NotFoundError, PreconditionError
from loraplex.adapters.training.known_models import KNOWN_MODELS, known_model

CONFIG_FILE = "config.json"
CLASSIFICATION = "sequence-classification"
CAUSAL_LM = "causal-lm"


@dataclass(frozen=True)
class LinearModule:
    """A module with a weight matrix that LoRA can sit on; `name` is its full path in the model.

    `conv1d` says that it stores its weight as (in, out), as GPT-2 does.
    """

    name: str
    in_features: int
    out_features: int
    conv1d: bool = False

    @property
    def leaf(self) -> str:
        """The last part of the name: q_proj."""
        return self.name.rpartition(".")[2]

    @property
    def weights(self) -> int:
        """Numbers in its matrix."""
        return self.in_features * self.out_features

    def lora_parameters(self, rank: int) -> int:
        """Numbers in A and B: r (d + k)."""
        return rank * (self.in_features + self.out_features)


@dataclass(frozen=True, eq=False)
class ModelArchitecture:
    """A base model without its weights.

    Attributes:
        name: what was asked for.
        origin: where the config came from: "folder", "built-in table" or "hub".
        config: transformers' configuration.
        task: "causal-lm" or "sequence-classification".
        architecture: the class, e.g. LlamaForCausalLM.
        parameters: all of them, tied ones once.
        modules: the linear ones, in the model's order; the output layer is among them.
        head: the name of the output layer (lm_head, classifier), empty if there is none.
    """

    name: str
    origin: str
    config: Any
    task: str
    architecture: str
    parameters: int
    modules: tuple[LinearModule, ...]
    head: str

    @property
    def body(self) -> tuple[LinearModule, ...]:
        """The linear modules without the output layer: what "all linear" means to PEFT, and what is quantized."""
        return tuple(module for module in self.modules if module.name != self.head)

    @property
    def hub_id(self) -> str:
        """What loads the model's weights and tokenizer: its folder or id, also for a short name of the table."""
        known = known_model(self.name)
        return known.hub_id if known is not None and self.origin == "built-in table" else self.name

    @property
    def layers(self) -> int:
        """Repeated blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence that it takes."""
        return int(self.config.get_text_config().max_position_embeddings)

    @property
    def key_value_width(self) -> int:
        """Numbers in the keys of one token in one layer."""
        text = self.config.get_text_config()
        heads = int(text.num_attention_heads)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        return int(getattr(text, "num_key_value_heads", None) or heads) * int(head_dim)

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        """Return a fresh model on the meta device: shapes and types, no memory."""
        return _build(self.config, self.task, dtype)


def read_architecture(model: str, task: str = CAUSAL_LM) -> ModelArchitecture:
    """Inspect the model `model`: a folder with a config.json, a name of the built-in table, or a hub id.

    Raises:
        NotFoundError: it is none of them, or the hub cannot be reached; says what to try.
        PreconditionError: its config is broken, or transformers has no class for `task` on such a model.
    """
    config, origin = _read_config(model)
    built = _build(config, task, torch.float32)
    if built.dtype != torch.float32:
        raise AssertionError("the config's dtype must not decide what is planned")
    modules = tuple(_linear_modules(built))
    head = _head_name(built, task)
    return ModelArchitecture(
        name=model,
        origin=origin,
        config=config,
        task=task,
        architecture=type(built).__name__,
        parameters=sum(parameter.numel() for parameter in built.parameters()),
        modules=modules,
        head=head,
    )


def is_masked_encoder(model: str) -> bool:
    """Say whether `model` reads whole texts (BERT and its like) and writes none."""
    config, _ = _read_config(model)
    return not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())


def _read_config(model: str) -> tuple[Any, str]:
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            raise NotFoundError(f"{folder} has no {CONFIG_FILE}: give the folder of a Hugging Face model")
        return _from_pretrained(str(folder)), "folder"
    known = known_model(model)
    if known is not None:
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[known.model_type](architectures=[known.architecture], **known.values), "built-in table"
    if folder.exists() or model.count("/") != 1:
        names = ", ".join(KNOWN_MODELS)
        raise NotFoundError(f"no model {model!r}: give a folder, a hub id (owner/name) or one of {names}")
    return _from_pretrained(model), "hub"


def _from_pretrained(source: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise NotFoundError(
            f"the config of {source} cannot be read: {reason} Without a connection, give a folder or a name of the "
            f"built-in table ({', '.join(KNOWN_MODELS)})"
        ) from error
    except (ValueError, KeyError, json.JSONDecodeError) as error:
        raise PreconditionError(f"the config of {source} cannot be used: {' '.join(str(error).split())}") from error


def _build(config: Any, task: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    factory: Any = AutoModelForSequenceClassification if task == CLASSIFICATION else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return factory.from_config(config, dtype=dtype)
    except (ValueError, KeyError, TypeError, ImportError, AttributeError, RuntimeError) as error:
        raise PreconditionError(
            f"transformers cannot build a {config.model_type} model for {task}: {' '.join(str(error).split())[:300]}"
        ) from error


def _linear_modules(model: Any) -> Iterator[LinearModule]:
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            yield LinearModule(name, module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            rows, columns = module.weight.shape
            yield LinearModule(name, rows, columns, conv1d=True)


def _head_name(model: Any, task: str) -> str:
    output = model.get_output_embeddings() if task == CAUSAL_LM else None
    named: dict[str, Any] = dict(model.named_modules())
    if output is not None:
        return next((name for name, module in named.items() if module is output), "")
    return next((name for name in (HEAD, "classifier", "score") if name in named), "")
