"""The model before a merge: transformers' modules with base weights, and the adapters' parts added to their outputs.

This is PEFT's definition of the unmerged computation (tests compare with PEFT itself), written independently of what
folds adapters into weights: x A^T B^T is added to a module's output, never B A to its weight. Only TIES and DARE, which
are defined on whole matrices, share their mixing with the merge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from loraplex.adapters.base_model import HEAD_WEIGHT
from loraplex.adapters.binding import EmbeddingWeights, ModuleWeights
from loraplex.adapters.blend import Blend, WeightedAdapter
from loraplex.adapters.merge_methods import MergeMethod
from loraplex.adapters.model_folder import ModelFolder
from loraplex.adapters.quantized_values import round_trip
from loraplex.adapters.streamed_model import StreamedModel


def unmerged_model(
    base: ModelFolder, blend: Blend, quantization: str | None, on_module: Callable[[], None] = lambda: None
) -> StreamedModel:
    """Return the model `base`, its blocks' weights rounded as `quantization` does, with `blend` beside the weights."""
    weights = _UnmergedWeights(base, blend, quantization)
    streamed = StreamedModel(base.path, weights, on_module)
    if blend.mixing.method is MergeMethod.LINEAR:
        for part in blend.parts:
            _attach(streamed.model, base, part)
    else:
        _attach_mixed(streamed.model, base, blend)
    return streamed


class _UnmergedWeights:
    """The base's weights, except for what an adapter brings whole."""

    def __init__(self, base: ModelFolder, blend: Blend, quantization: str | None) -> None:
        self._base = base
        self._replaced = {name: t for part in blend.parts for name, t in part.adapter.parameters.items()}
        self._rows = {name: rows for part in blend.parts for name, rows in part.adapter.token_rows.items()}
        blocks = base.block_modules() if quantization else frozenset[str]()
        self._rounded = {f"{module}.weight" for module in blocks} - set(self._replaced)
        self._quantization = quantization

    def __call__(self, name: str) -> torch.Tensor:
        if name in self._replaced:
            weight = self._replaced[name].float()
        else:
            source = {HEAD_WEIGHT: self._base.head_source}.get(name, name)
            source = HEAD_WEIGHT if source not in self._base.tensors and source == self._base.embedding else source
            weight = self._base.read(source).float()
            if name in self._rounded and not self._base.tensors[source].parts:
                assert self._quantization is not None
                transposed = self._base.is_transposed(name)
                weight = round_trip(weight.t() if transposed else weight, self._quantization)
                weight = weight.t() if transposed else weight
        if name in self._rows:
            weight = weight.clone()
            weight[self._rows[name].tokens] = self._rows[name].rows.float()
        return weight


def _attach(model: Any, base: ModelFolder, part: WeightedAdapter) -> None:
    for name, weights in part.adapter.modules.items():
        model.get_submodule(name).register_forward_hook(_low_rank(base, name, weights, part.weight), prepend=True)
    if part.adapter.embedding is not None:
        module = model.get_submodule(base.embedding.removesuffix(".weight"))
        module.register_forward_hook(_embedding(part.adapter.embedding, part.weight), prepend=True)


def _low_rank(base: ModelFolder, name: str, weights: ModuleWeights, weight: float) -> Callable[..., torch.Tensor]:
    a, b, scaling = weights.a, weights.b, weight * weights.scaling

    def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        update = torch.nn.functional.linear(torch.nn.functional.linear(args[0], a.float()), b.float())
        if weights.lora_bias is not None:
            update = update + weights.lora_bias.float()
        output = output + scaling * update
        if weights.magnitude is None:
            return output
        matrix, bias = module.weight, module.bias
        assert isinstance(matrix, torch.Tensor)
        rows = matrix.t() if base.is_transposed(f"{name}.weight") else matrix
        norm: torch.Tensor = torch.linalg.norm(rows + scaling * (b.float() @ a.float()), dim=1)
        offset = bias if isinstance(bias, torch.Tensor) else torch.zeros(())
        stretched: torch.Tensor = (output - offset) * (weights.magnitude.float() / norm)
        return stretched + offset

    return add


def _embedding(low: EmbeddingWeights, weight: float) -> Callable[..., torch.Tensor]:
    def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        rows = low.a.float().t()[args[0]]
        update = torch.nn.functional.linear(rows, low.b.float())
        # A module that multiplies its embeddings (Gemma 3) multiplies the sum.
        return output + weight * low.scaling * update * getattr(module, "embed_scale", 1.0)

    return add


def _attach_mixed(model: Any, base: ModelFolder, blend: Blend) -> None:
    """Add each matrix's mixed update to the output of its module; it is mixed anew whenever the module computes."""
    for name, change in blend.changes(base.base_model()).items():
        if change.updates:
            _attach_matrix(model, base, name, blend)
        elif change.vectors:
            _attach_vectors(model, name, change.vectors)


def _attach_matrix(model: Any, base: ModelFolder, name: str, blend: Blend) -> None:
    change = blend.changes(base.base_model())[name]

    def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(change.updates[0].matrix().shape)
        matrix = change.apply(name, zeros, blend.mixing)
        if name == base.embedding:
            return output + matrix[args[0]] * getattr(module, "embed_scale", 1.0)
        return output + torch.nn.functional.linear(args[0], matrix)

    model.get_submodule(name.removesuffix(".weight")).register_forward_hook(add, prepend=True)


def _attach_vectors(model: Any, name: str, vectors: list[tuple[float, torch.Tensor]]) -> None:
    total = sum(factor * vector.float() for factor, vector in vectors)

    def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + total

    model.get_submodule(name.removesuffix(".bias")).register_forward_hook(add, prepend=True)
