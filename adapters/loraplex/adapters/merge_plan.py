"""Which tensors a merged model has, in which files, and how each is made from the base's.

Works on one parameter at a time: memory peaks at a few float32 copies of the largest one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from loraplex.adapters import stored_quantized
from loraplex.adapters.base_model import HEAD_WEIGHT
from loraplex.adapters.blend import Blend, Change
from loraplex.adapters.errors import PreconditionError
from loraplex.adapters.model_folder import SINGLE_FILE, ModelFolder
from loraplex.adapters.quantized_values import round_trip
from loraplex.adapters.tensor_file import TensorPlan


class MergeBase(StrEnum):
    """Which weights the adapter is folded into."""

    FULL_PRECISION = "full_precision"
    DEQUANTIZED = "dequantized"


@dataclass(frozen=True)
class Target:
    """What is written.

    Attributes:
        base: the weights to start from.
        quantization: how a server quantizes them, for a dequantized base, else None.
        dtype: of all floating-point tensors that are not quantized; None is the base's own.
        quantize: "" or "nf4", for the linear modules of the decoder's blocks.
        max_shard_bytes: of a file, unless a single parameter is larger.
    """

    base: MergeBase
    quantization: str | None
    dtype: torch.dtype | None
    quantize: str
    max_shard_bytes: int


@dataclass(frozen=True)
class Output:
    """One parameter of the merged model: where it comes from, and the tensors that it is written as."""

    name: str
    source: str
    change: Change | None
    tensors: tuple[TensorPlan, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(plan.nbytes for plan in self.tensors)


class MergePlan:
    """The merged model before it is made."""

    def __init__(self, model: ModelFolder, blend: Blend, target: Target) -> None:
        """Plan to merge `blend`, which fits `model`, into it."""
        self._model = model
        self._mixing = blend.mixing
        self._target = target
        self._blocks = {f"{module}.weight" for module in model.block_modules()}
        changes = blend.changes(model.base_model())
        self.unties = self._settle_head(changes)
        sources = {name: name for name in model.tensors}
        if self.unties:
            # An lm_head that is no longer the embedding is written beside it, whichever of the two was stored.
            sources[HEAD_WEIGHT] = model.head_source
            sources.setdefault(model.embedding, HEAD_WEIGHT)
        self.outputs = [self._output(name, source, changes.get(name)) for name, source in sources.items()]
        self.shards = _shards(self.outputs, target.max_shard_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def changed(self) -> int:
        """How many parameters the adapters change."""
        return sum(output.change is not None for output in self.outputs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, which a model's config names as its own."""
        embedding = self._model.embedding if self._model.embedding in self._model.tensors else HEAD_WEIGHT
        return next(output.tensors[0].dtype for output in self.outputs if output.name == embedding)

    def make(self, outputs: Sequence[Output]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of `outputs` with their names.

        Raises:
            PreconditionError: if one would hold NaN or infinite values.
        """
        for output in outputs:
            yield from self._make(output)

    def _make(self, output: Output) -> Iterator[tuple[str, torch.Tensor]]:
        change, name = output.change, output.name
        replaced = change is not None and change.replacement is not None
        tensor = change.replacement if change and change.replacement is not None else self._model.read(output.source)
        quantized = self._is_quantized(name)
        rounded = self._target.quantization is not None and name in self._blocks and not replaced
        # A weight that is stored quantized has its values already.
        rounded = rounded and not self._model.tensors[output.source].parts
        plan = output.tensors[0]
        if change is None and not rounded and not quantized:
            yield name, tensor if tensor.dtype == plan.dtype else _finite(name, tensor.to(plan.dtype))
            return
        transposed = self._model.is_transposed(name)
        weight = _finite(name, tensor.float().t() if transposed else tensor.float())
        if rounded:
            assert self._target.quantization is not None
            weight = round_trip(weight, self._target.quantization)
        if change is not None:
            weight = _finite(name, change.apply(name, weight, self._mixing))
        if quantized:
            module = name.removesuffix("weight")
            for part, stored in stored_quantized.store_four_bit(weight, self._target.quantize).items():
                yield module + part, stored
            return
        yield name, _finite(name, (weight.t() if transposed else weight).to(plan.dtype))

    def _settle_head(self, changes: dict[str, Change]) -> bool:
        """Return whether lm_head and the embedding become two matrices; drop the change of one that stays the other."""
        embedding = self._model.embedding
        if not self._model.tied or not (HEAD_WEIGHT in changes or embedding in changes):
            return False
        if HEAD_WEIGHT in changes and changes[HEAD_WEIGHT].same_as(changes.get(embedding)):
            del changes[embedding if HEAD_WEIGHT in self._model.tensors else HEAD_WEIGHT]
            return False
        return True

    def _output(self, name: str, source: str, change: Change | None) -> Output:
        stored = self._model.tensors[source]
        shape = stored.shape
        if self._is_quantized(name):
            shape = shape[::-1] if self._model.is_transposed(name) else shape
            module = name.removesuffix("weight")
            layout = stored_quantized.four_bit_layout(shape, self._target.quantize)
            tensors = tuple(TensorPlan(module + part, dtype, size) for part, (dtype, size) in layout.items())
            return Output(name, source, change, tensors)
        dtype = self._target.dtype if self._target.dtype and stored.dtype.is_floating_point else stored.dtype
        return Output(name, source, change, (TensorPlan(name, dtype, shape),))

    def _is_quantized(self, name: str) -> bool:
        return bool(self._target.quantize) and name in self._blocks


def _shards(outputs: Sequence[Output], limit: int) -> dict[str, list[Output]]:
    """Put the outputs, in their order, into as few files as their sizes allow."""
    groups: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if groups[-1] and size + output.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.nbytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise PreconditionError(f"{name} would hold NaN or infinite values in {tensor.dtype}; nothing is written")
    return tensor
