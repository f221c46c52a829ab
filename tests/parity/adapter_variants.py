"""Random adapters of every kind for a tiny model, and what each of them makes of transformers' own weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from loraplex.adapters.binding import BaseModel, BaseModule, BoundAdapter, EmbeddingWeights, ModuleWeights, TokenRows

LM_HEAD = "lm_head"


class Draw:
    """Random tensors, in an order of their own."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def matrix(self, *shape: int) -> torch.Tensor:
        return 1.5 * torch.randn(shape, generator=self._generator) / shape[-1] ** 0.5

    def vector(self, size: int) -> torch.Tensor:
        return 0.5 * torch.randn(size, generator=self._generator)

    def module(self, module: BaseModule) -> ModuleWeights:
        rank = 1 + int(torch.randint(6, (), generator=self._generator))
        a = self.matrix(rank, module.in_features)
        return ModuleWeights(a, self.matrix(module.out_features, rank), scaling=0.5)

    def tokens(self, vocab: int) -> torch.Tensor:
        return torch.randperm(vocab, generator=self._generator)[: vocab // 3].sort().values


def plain(base: BaseModel, draw: Draw) -> BoundAdapter:
    return BoundAdapter("sha256:plain", {name: draw.module(module) for name, module in base.modules.items()})


def dora(base: BaseModel, draw: Draw) -> BoundAdapter:
    """On every other module, beside plain ones."""
    modules = dict(plain(base, draw).modules)
    for name in list(modules)[::2]:
        modules[name] = replace(modules[name], magnitude=1 + draw.vector(base.modules[name].out_features))
    return BoundAdapter("sha256:dora", modules)


def bias_on_b(base: BaseModel, draw: Draw) -> BoundAdapter:
    modules = {
        name: replace(weights, lora_bias=draw.vector(len(weights.b)))
        for name, weights in plain(base, draw).modules.items()
    }
    return BoundAdapter("sha256:bias-on-b", modules)


def all_biases(base: BaseModel, draw: Draw) -> BoundAdapter:
    targets = ("q_proj", "c_attn", "down_proj")
    modules = {name: weights for name, weights in plain(base, draw).modules.items() if name.endswith(targets)}
    biases = {name: draw.vector(shape[0]) for name, shape in base.parameters.items() if name.endswith(".bias")}
    return BoundAdapter("sha256:biases", modules, parameters=biases)


def norms(base: BaseModel, draw: Draw) -> BoundAdapter:
    weights = {
        name: 1 + draw.vector(shape[0])
        for name, shape in base.parameters.items()
        if len(shape) == 1 and name.endswith(".weight")
    }
    return BoundAdapter("sha256:norms", {}, parameters=weights)


def one_norm(base: BaseModel, draw: Draw) -> BoundAdapter:
    name = next(name for name, shape in base.parameters.items() if len(shape) == 1 and name.endswith(".weight"))
    return BoundAdapter("sha256:one-norm", {}, parameters={name: 1 + draw.vector(base.parameters[name][0])})


def head(base: BaseModel, draw: Draw) -> BoundAdapter:
    """A trained lm_head, and the embedding with it where it is tied."""
    module = base.modules[LM_HEAD]
    matrix = draw.matrix(module.out_features, module.in_features)
    parameters = {f"{LM_HEAD}.weight": matrix} | ({base.embedding: matrix} if base.tied else {})
    return BoundAdapter("sha256:head", {}, parameters=parameters)


def embedding(base: BaseModel, draw: Draw) -> BoundAdapter:
    """A trained embedding alone, learned positions too where there are any."""
    tables = {name: draw.matrix(*shape) for name, shape in base.parameters.items() if len(shape) == 2}
    return BoundAdapter("sha256:embedding", {}, parameters=tables)


def layer_weight(base: BaseModel, draw: Draw) -> BoundAdapter:
    """A fully trained linear module in the middle of a packed one, with its bias if it has one."""
    module = base.modules[sorted(name for name in base.modules if name != LM_HEAD)[1]]
    shape = (module.out_features, module.in_features)
    weight = draw.matrix(*(shape[::-1] if base.conv1d else shape))
    parameters = {f"{module.name}.weight": weight}
    if f"{module.name}.bias" in base.parameters:
        parameters[f"{module.name}.bias"] = draw.vector(module.out_features)
    return BoundAdapter("sha256:layer-weight", {}, parameters=parameters)


def token_rows(base: BaseModel, draw: Draw) -> BoundAdapter:
    """Some rows of the embedding, of lm_head too where it is tied, beside LoRA on the layers."""
    vocab, hidden = base.parameters[base.embedding]
    tokens = draw.tokens(vocab)
    rows = TokenRows(tokens, draw.matrix(len(tokens), hidden))
    places = {base.embedding: rows} | ({f"{LM_HEAD}.weight": rows} if base.tied else {})
    modules = {name: w for name, w in plain(base, draw).modules.items() if name != LM_HEAD}
    return BoundAdapter("sha256:token-rows", modules, token_rows=places)


def embedding_lora(base: BaseModel, draw: Draw) -> BoundAdapter:
    vocab, hidden = base.parameters[base.embedding]
    weights = EmbeddingWeights(3 * draw.matrix(3, vocab), draw.matrix(hidden, 3), scaling=2.0)
    return BoundAdapter("sha256:embedding-lora", dict(plain(base, draw).modules), embedding=weights)


def everything(base: BaseModel, draw: Draw) -> BoundAdapter:
    """All of it that goes together."""
    made = {make: make(base, draw) for make in (dora, all_biases, norms, embedding, embedding_lora)}
    parameters = {name: tensor for bound in made.values() for name, tensor in bound.parameters.items()}
    return BoundAdapter(
        "sha256:everything",
        made[dora].modules,
        embedding=made[embedding_lora].embedding,
        parameters=parameters,
        token_rows=token_rows(base, draw).token_rows,
    )


Make = Callable[[BaseModel, Draw], BoundAdapter]
VARIANTS: Mapping[str, Make] = {
    make.__name__: make
    for make in (
        plain,
        dora,
        bias_on_b,
        all_biases,
        norms,
        one_norm,
        head,
        embedding,
        layer_weight,
        token_rows,
        embedding_lora,
        everything,
    )
}


def holds_one_scale_only(adapter: BoundAdapter) -> bool:
    return any(weights.magnitude is not None for weights in adapter.modules.values())


@dataclass
class Edited:
    """transformers' model with an adapter's weights worked into its own, by the words of `BoundAdapter`."""

    base: BaseModel
    scale: float

    def model(self, reference: PreTrainedModel, adapter: BoundAdapter) -> PreTrainedModel:
        model = copy.deepcopy(reference)
        with torch.no_grad():
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
            for name, tensor in adapter.parameters.items():
                model.get_parameter(name).copy_(tensor)
            for name, rows in adapter.token_rows.items():
                model.get_parameter(name)[rows.tokens] = rows.rows
            if adapter.embedding is not None:
                delta = adapter.embedding.scaling * adapter.embedding.b @ adapter.embedding.a
                model.get_parameter(self.base.embedding).add_(self.scale * delta.T)
            for name, weights in adapter.modules.items():
                self._adapt(model.get_submodule(name), name, weights)
        return model

    def _adapt(self, module: torch.nn.Module, name: str, weights: ModuleWeights) -> None:
        weight = module.get_parameter("weight")
        delta = weights.scaling * weights.b @ weights.a
        across = self.base.conv1d and name != LM_HEAD
        merged = (weight.T if across else weight) + self.scale * delta
        if weights.magnitude is not None:
            merged *= (weights.magnitude / merged.norm(dim=1))[:, None]
        weight.copy_(merged.T if across else merged)
        if weights.lora_bias is not None:
            bias, own = self.scale * weights.scaling * weights.lora_bias, module.bias
            module.bias = torch.nn.Parameter(bias + own if isinstance(own, torch.Tensor) else bias)
