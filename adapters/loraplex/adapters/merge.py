"""Folds one adapter into its base model and writes the result as a Hugging Face folder.

Works tensor by tensor on the files of the base; the model is never built. Each target becomes
W' = W + scale * scaling * B A, computed in float32 and rounded once, to the dtype that is written.

`MergeBase.FULL_PRECISION` starts from the base's own weights and keeps their dtypes unless told otherwise.
`MergeBase.DEQUANTIZED` starts from the weights that a server with `quantization` computes with: every linear module of
the decoder's blocks is quantized and dequantized first. It writes float32 unless told otherwise, because those values
have no exact form in fewer bits: only then the merged model has the same weights as the server's base plus adapter.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch

from loraplex.adapters.binding import BoundAdapter, ModuleWeights, bind
from loraplex.adapters.bnb import QUANTIZATIONS, round_trip
from loraplex.adapters.disk import disk_full_is_typed, free_bytes, move_folder, removed_at_exit, sync_folder
from loraplex.adapters.errors import AlreadyExistsError, InvalidRequestError, PreconditionError, ResourceExhaustedError
from loraplex.adapters.export import Provenance, write_companions
from loraplex.adapters.formats import read_adapter
from loraplex.adapters.model_folder import HEAD, ModelFolder
from loraplex.adapters.tensor_file import TensorPlan, write_tensors

# Called with how many tensors have been written and how many there are.
Progress = Callable[[int, int], None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class MergeBase(Enum):
    """Which weights the adapter is folded into."""

    FULL_PRECISION = "full_precision"
    DEQUANTIZED = "dequantized"


@dataclass(frozen=True)
class MergeResult:
    """What was written: the folder, the version merged, how many modules it changed, the bytes of all weights.

    `dtype` is that of the changed weights; `files` maps each weight file to its SHA-256 in hexadecimal.
    """

    output: Path
    adapter_digest: str
    base: MergeBase
    quantization: str | None
    dtype: torch.dtype
    modules: int
    size_bytes: int
    files: Mapping[str, str]


def merge_adapter(
    model_dir: Path,
    adapter: BoundAdapter | Path,
    output: Path,
    *,
    base: MergeBase = MergeBase.FULL_PRECISION,
    quantization: str | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge `adapter` (bound, or an adapter folder) into the model in `model_dir`; write the new folder `output`.

    `output` appears whole at the end or not at all. `dtype` is that of all floating-point tensors written; None stands
    for what the module's docstring says. What `progress` raises stops the merge.

    Raises:
        InvalidRequestError: arguments that contradict each other.
        AlreadyExistsError: `output` exists.
        PreconditionError: the model cannot be read, the adapter does not fit it, or a merged weight is not finite.
        ResourceExhaustedError: there is not enough space on the disk.
    """
    _check_arguments(output, base, quantization, scale, dtype)
    model = ModelFolder.open(model_dir)
    bound = adapter if isinstance(adapter, BoundAdapter) else bind(read_adapter(adapter), model.base_model())
    _check_fit(model, bound)
    if dtype is None and base is MergeBase.DEQUANTIZED:
        dtype = torch.float32
    merger = _Merger(model, bound, scale, quantization, dtype)
    needed = sum(plan.nbytes for plans in merger.plans.values() for plan in plans)
    if needed > free_bytes(output.parent):
        raise ResourceExhaustedError(f"the merged model needs {needed} bytes below {output.parent}; the disk has fewer")
    partial = output.parent / f".{output.name}.{uuid.uuid4().hex}.partial"
    with disk_full_is_typed("writing the merged model"), removed_at_exit(partial):
        partial.mkdir()
        files = merger.write(partial, progress)
        written = dtype or merger.written_dtype
        provenance = Provenance(bound.digest, base.value, quantization, scale, written, len(bound.modules), files)
        write_companions(model, partial, merger.plans, provenance, bound.chat_template, untied=merger.unties)
        sync_folder(partial)
        _move(partial, output)
    return MergeResult(output, bound.digest, base, quantization, written, len(bound.modules), needed, files)


class _Merger:
    """Plans every output tensor and makes them one at a time."""

    def __init__(
        self,
        model: ModelFolder,
        adapter: BoundAdapter,
        scale: float,
        quantization: str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self._model = model
        self._scale = scale
        self._quantization = quantization
        self._merged = {f"{module}.weight": weights for module, weights in adapter.modules.items()}
        quantized = model.block_modules() if quantization else frozenset[str]()
        self._quantized = {f"{module}.weight" for module in quantized}
        # A merged lm_head is no longer the embedding; the other of the two is then written beside it.
        self.unties = HEAD in self._merged
        sources = {name: name for name in model.tensors}
        if self.unties:
            sources[HEAD] = model.head_source
            sources.setdefault(model.embedding, HEAD)
        self._sources = sources
        self.plans = self._plan(dtype)

    @property
    def written_dtype(self) -> torch.dtype:
        """The dtype of the first merged weight."""
        planned = {plan.name: plan.dtype for plans in self.plans.values() for plan in plans}
        return planned[next(iter(self._merged))]

    def write(self, folder: Path, progress: Progress | None) -> dict[str, str]:
        """Write all files into `folder`; return their SHA-256."""
        total, done = len(self._sources), 0

        def make(plan: TensorPlan) -> torch.Tensor:
            nonlocal done
            tensor = self._make(plan)
            done += 1
            if progress is not None:
                progress(done, total)
            return tensor

        return {file: write_tensors(folder / file, plans, make) for file, plans in self.plans.items()}

    def _plan(self, dtype: torch.dtype | None) -> dict[str, list[TensorPlan]]:
        """Put each tensor in the file that its source has in the base."""
        plans: dict[str, list[TensorPlan]] = {file: [] for file in self._model.files}
        for name, source in self._sources.items():
            stored = self._model.tensors[source]
            target = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
            plans[stored.file].append(TensorPlan(name, target, stored.shape))
        return plans

    def _make(self, plan: TensorPlan) -> torch.Tensor:
        """Return the tensor of `plan` in its dtype."""
        tensor = self._model.read(self._sources[plan.name])
        adapter = self._merged.get(plan.name)
        if adapter is None and plan.name not in self._quantized:
            return tensor if tensor.dtype == plan.dtype else _cast(tensor, plan)
        transposed = self._model.conv1d and plan.name != HEAD
        weight = tensor.float().t() if transposed else tensor.float()
        if self._quantization is not None and plan.name in self._quantized:
            weight = round_trip(weight, self._quantization)
        if adapter is not None:
            weight = weight + _delta(adapter, self._scale)
        made = (weight.t() if transposed else weight).to(plan.dtype)
        if not bool(torch.isfinite(made).all()):
            raise PreconditionError(
                f"{plan.name} would hold NaN or infinite values in {plan.dtype}; nothing is written"
            )
        return made


def _delta(weights: ModuleWeights, scale: float) -> torch.Tensor:
    """Return scale * scaling * B A: (out, in) float32."""
    return (weights.b.float() @ weights.a.float()) * (scale * weights.scaling)


def _cast(tensor: torch.Tensor, plan: TensorPlan) -> torch.Tensor:
    made = tensor.to(plan.dtype)
    if not bool(torch.isfinite(made).all()):
        raise PreconditionError(f"{plan.name} would hold NaN or infinite values in {plan.dtype}; nothing is written")
    return made


def _check_arguments(
    output: Path, base: MergeBase, quantization: str | None, scale: float, dtype: torch.dtype | None
) -> None:
    if base is MergeBase.DEQUANTIZED and quantization not in QUANTIZATIONS:
        raise InvalidRequestError.of(
            "quantization", f"must be one of {', '.join(QUANTIZATIONS)} for a dequantized base"
        )
    if base is MergeBase.FULL_PRECISION and quantization is not None:
        raise InvalidRequestError.of("quantization", "has no meaning for a full-precision base")
    if not math.isfinite(scale):
        raise InvalidRequestError.of("scale", f"must be finite, not {scale}")
    if dtype is not None and dtype not in DTYPES:
        raise InvalidRequestError.of("dtype", f"must be one of {', '.join(map(str, DTYPES))}, not {dtype}")
    if os.path.lexists(output):
        raise AlreadyExistsError(f"{output} exists; choose another output folder")
    if not output.parent.is_dir():
        raise InvalidRequestError.of("output", f"{output.parent} is not a folder")


def _check_fit(model: ModelFolder, adapter: BoundAdapter) -> None:
    """Check a bound adapter against the files: it may have been bound to another model than this."""
    modules = model.base_model().modules
    for name, weights in adapter.modules.items():
        module = modules.get(name)
        if module is None:
            raise PreconditionError(f"{model.path} has no linear module {name}; it is not the adapter's base model")
        found = (weights.a.shape[1], weights.b.shape[0])
        if found != (module.in_features, module.out_features):
            raise PreconditionError(
                f"{name} has {module.in_features} inputs and {module.out_features} outputs in {model.path}, but "
                f"{found[0]} and {found[1]} in the adapter; it is not the adapter's base model"
            )


def _move(partial: Path, output: Path) -> None:
    try:
        move_folder(partial, output)
    except (FileExistsError, NotADirectoryError) as error:
        raise AlreadyExistsError(f"{output} was made by someone else meanwhile") from error
    except OSError as error:
        if output.is_dir():
            raise AlreadyExistsError(f"{output} was made by someone else meanwhile") from error
        raise
