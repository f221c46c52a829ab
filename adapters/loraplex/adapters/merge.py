"""Folds one adapter or several into a base model and writes the result as a Hugging Face folder.

Then it is read again, to say how far it is from base and adapters apart. All of this goes parameter by parameter on the
files of the base; the model is never built with its weights. Each target becomes W' = W + sum of weight * scaling * B A
(or what TIES, DARE, DoRA define), computed in float32 and rounded once, to the dtype that is written.

`MergeBase.FULL_PRECISION` starts from the base's own weights and keeps their dtypes unless told otherwise.
`MergeBase.DEQUANTIZED` starts from the weights that a server with `quantization` computes with: every linear module of
the decoder's blocks is quantized and dequantized first. It writes float32 unless told otherwise, because those values
have no exact form in fewer bits: only then the merged model has the same weights as the server's base plus adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from loraplex.adapters.binding import BoundAdapter, bind
from loraplex.adapters.blend import Blend, WeightedAdapter
from loraplex.adapters.compare import Comparison
from loraplex.adapters.disk import (
    check_new_folder,
    disk_full_is_typed,
    free_bytes,
    move_folder,
    partial_folder,
    sync_folder,
)
from loraplex.adapters.errors import (
    AlreadyExistsError,
    FieldViolation,
    InvalidRequestError,
    PreconditionError,
    ResourceExhaustedError,
)
from loraplex.adapters.export import Provenance, write_card, write_companions
from loraplex.adapters.formats import read_adapter
from loraplex.adapters.merge_check import check_merged
from loraplex.adapters.merge_methods import Mixing, weight_violations
from loraplex.adapters.merge_plan import MergeBase, MergePlan, Output, Target
from loraplex.adapters.model_folder import ModelFolder
from loraplex.adapters.prompts import BUILT_IN, tokenize
from loraplex.adapters.quantized_values import QUANTIZATIONS
from loraplex.adapters.speed_command import SpeedFigures, SpeedJob, measure_speed
from loraplex.adapters.streamed_model import read_config
from loraplex.adapters.tensor_file import write_tensors

# Called with the phase, how much of it is done and how much there is.
Progress = Callable[[str, int, int], None]
MERGING, CHECKING, MEASURING = "merging", "checking", "measuring"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEFAULT_SHARD_BYTES = 5_000_000_000
MIN_SHARD_BYTES = 1 << 16
DEFAULT_MAX_MEAN_KL = 1e-2
"""In nats, for weights that are written as they are. Quantizing them again costs more than any merge should."""


@dataclass(frozen=True)
class AdapterSource:
    """An adapter, bound already or as a folder, and what multiplies its own scaling."""

    adapter: BoundAdapter | Path
    weight: float = 1.0


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    Attributes:
        base: which weights the adapters are folded into.
        quantization: "nf4", "fp4" or "int8", for a dequantized base; else None.
        dtype: of all floating-point tensors written; None stands for what the module's docstring says.
        mixing: how several adapters become one.
        quantize: "" or "nf4": store the linear modules of the decoder's blocks as bitsandbytes does.
        max_shard_bytes: of a weight file.
        max_mean_kl: in nats; None stands for `DEFAULT_MAX_MEAN_KL`, or no limit if the result is quantized.
        prompts: what merged and unmerged model are compared on; none stands for built-in ones.
        speed_command: measures the speed of both; see `speed_command`. Empty: it is not measured.
    """

    base: MergeBase = MergeBase.FULL_PRECISION
    quantization: str | None = None
    dtype: torch.dtype | None = None
    mixing: Mixing = field(default_factory=Mixing)
    quantize: str = ""
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    max_mean_kl: float | None = None
    prompts: tuple[str, ...] = ()
    speed_command: tuple[str, ...] = ()

    @property
    def kl_limit(self) -> float:
        """The mean KL that is accepted."""
        if self.max_mean_kl is not None:
            return self.max_mean_kl
        return float("inf") if self.quantize else DEFAULT_MAX_MEAN_KL


@dataclass(frozen=True)
class MergeResult:
    """What was written and how it compares.

    Attributes:
        adapter_digests: the versions merged.
        dtype: of the embedding and of all weights that are not quantized.
        parameters: how many the adapters changed.
        size_bytes: of all weights.
        files: the SHA-256 of each weight file, in hexadecimal.
        comparison: the difference from base and adapters apart.
        speed: of both, if it was measured.
    """

    output: Path
    adapter_digests: tuple[str, ...]
    base: MergeBase
    quantization: str | None
    dtype: torch.dtype
    parameters: int
    size_bytes: int
    files: Mapping[str, str]
    comparison: Comparison
    speed: tuple[SpeedFigures, ...] = ()


def merge_adapters(
    model_dir: Path,
    adapters: Sequence[AdapterSource],
    output: Path,
    options: MergeOptions = MergeOptions(),
    progress: Progress = lambda phase, done, total: None,
) -> MergeResult:
    """Merge `adapters` into the model in `model_dir`; write the new folder `output`.

    `output` appears whole at the end, checked, or not at all. What `progress` raises stops the merge.

    Raises:
        InvalidRequestError: arguments that contradict each other, or prompts that cannot be used.
        AlreadyExistsError: `output` exists.
        PreconditionError: the model cannot be read, an adapter does not fit it or cannot be merged, a merged weight is
            not finite, or the merged model is further from the unmerged one than `max_mean_kl`.
        ResourceExhaustedError: there is not enough space on the disk.
    """
    _check_arguments(output, adapters, options)
    model = ModelFolder.open(model_dir)
    _check_base(model, options)
    # Before anything is written: a large model takes minutes.
    prompts = _tokenized(model.path, options.prompts)
    base = model.base_model()
    blend = Blend(tuple(WeightedAdapter(_bound(source, model), source.weight) for source in adapters), options.mixing)
    blend.check(base, str(model.path))
    dtype = options.dtype
    if dtype is None and options.base is MergeBase.DEQUANTIZED and not options.quantize:
        dtype = torch.float32
    target = Target(options.base, options.quantization, dtype, options.quantize, options.max_shard_bytes)
    plan = MergePlan(model, blend, target)
    if plan.nbytes > free_bytes(output.parent):
        raise ResourceExhaustedError(
            f"the merged model needs {plan.nbytes} bytes below {output.parent}; the disk has fewer"
        )
    with disk_full_is_typed("writing the merged model"), partial_folder(output) as partial:
        files = _write_weights(plan, partial, progress)
        provenance = Provenance(blend, target, plan.dtype, plan.changed, files)
        write_companions(model, partial, plan, provenance)
        comparison = check_merged(
            model, blend, options.quantization, partial, prompts, lambda *done: progress(CHECKING, *done)
        )
        _check_comparison(comparison, options.kl_limit)
        speed = _measure(model_dir, adapters, options, partial, lambda *done: progress(MEASURING, *done))
        write_card(model, partial, provenance, comparison)
        sync_folder(partial)
        _move(partial, output)
    return MergeResult(
        output,
        blend.digests,
        options.base,
        options.quantization,
        plan.dtype,
        plan.changed,
        plan.nbytes,
        files,
        comparison,
        speed,
    )


def _tokenized(folder: Path, prompts: Sequence[str]) -> list[list[int]]:
    config = read_config(folder)
    return tokenize(folder, prompts, config.vocab_size, getattr(config, "max_position_embeddings", 1 << 20))


def _bound(source: AdapterSource, model: ModelFolder) -> BoundAdapter:
    if isinstance(source.adapter, BoundAdapter):
        return source.adapter
    return bind(read_adapter(source.adapter), model.base_model())


def _write_weights(plan: MergePlan, folder: Path, progress: Progress) -> dict[str, str]:
    """Write the weight files; return their SHA-256."""
    total, done = len(plan.outputs), 0

    def tensors(outputs: Sequence[Output]) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal done
        for output in outputs:
            yield from plan.make([output])
            done += 1
            progress(MERGING, done, total)

    files = {}
    for file, outputs in plan.shards.items():
        plans = [tensor for output in outputs for tensor in output.tensors]
        files[file] = write_tensors(folder / file, plans, tensors(outputs))
    return files


def _check_comparison(comparison: Comparison, limit: float) -> None:
    # Not "larger than": NaN must not pass.
    if not comparison.mean_kl <= limit:
        raise PreconditionError(
            f"the merged model is too far from base and adapters apart: mean KL {comparison.mean_kl:.3g} nats over "
            f"{comparison.positions} positions, at most {limit:g} is allowed (largest logit difference "
            f"{comparison.max_logit_difference:.3g}, the best token agrees at {comparison.top1_agreement:.1%}); "
            "nothing is written. A finer dtype or a higher max_mean_kl would let it pass"
        )


def _measure(
    model_dir: Path,
    adapters: Sequence[AdapterSource],
    options: MergeOptions,
    merged: Path,
    progress: Callable[[int, int], None],
) -> tuple[SpeedFigures, ...]:
    if not options.speed_command:
        return ()
    (source,) = adapters
    assert isinstance(source.adapter, Path)
    job = SpeedJob(model_dir, source.adapter, source.weight, merged, options.prompts or BUILT_IN)
    return measure_speed(options.speed_command, job, progress)


def _check_arguments(output: Path, adapters: Sequence[AdapterSource], options: MergeOptions) -> None:
    violations = [
        *weight_violations([source.weight for source in adapters]),
        *options.mixing.violations(len(adapters)),
        *(FieldViolation(name, problem) for name, holds, problem in _checks(adapters, options) if not holds),
    ]
    if violations:
        raise InvalidRequestError(violations)
    check_new_folder(output)
    if not output.parent.is_dir():
        raise InvalidRequestError.of("output", f"{output.parent} is not a folder")


def _checks(adapters: Sequence[AdapterSource], options: MergeOptions) -> Iterator[tuple[str, bool, str]]:
    """Yield field, whether it is in order, and what is wrong if it is not."""
    quantization, dtype = options.quantization, options.dtype
    if options.base is MergeBase.DEQUANTIZED:
        known = ", ".join(QUANTIZATIONS)
        yield "quantization", quantization in QUANTIZATIONS, f"must be one of {known} for a dequantized base"
    else:
        yield "quantization", quantization is None, "has no meaning for a full-precision base"
    yield "dtype", dtype is None or dtype in DTYPES, f"must be one of {', '.join(map(str, DTYPES))}, not {dtype}"
    yield "quantize", options.quantize in ("", "nf4"), f"must be nf4 or empty, not {options.quantize!r:.80}"
    size, limit = options.max_shard_bytes, options.max_mean_kl
    yield "max_shard_bytes", size >= MIN_SHARD_BYTES, f"must be at least {MIN_SHARD_BYTES}, not {size}"
    yield "max_mean_kl", limit is None or limit >= 0, f"must not be negative, got {limit}"
    single = len(adapters) == 1 and isinstance(adapters[0].adapter, Path)
    reason = "compares with one adapter served unmerged; with several there is nothing to compare with"
    yield "measure_speed", single or not options.speed_command, reason


def _check_base(model: ModelFolder, options: MergeOptions) -> None:
    if model.quantization is None or options.quantization == model.quantization:
        return
    if options.base is MergeBase.FULL_PRECISION:
        raise PreconditionError(
            f"{model.path} is already quantized to {model.quantization}: merge into the dequantized base, or into the "
            "model that it was made from"
        )
    raise PreconditionError(f"{model.path} is quantized to {model.quantization}, not to {options.quantization}")


def _move(partial: Path, output: Path) -> None:
    try:
        move_folder(partial, output)
    except (FileExistsError, NotADirectoryError) as error:
        raise AlreadyExistsError(f"{output} was made by someone else meanwhile") from error
    except OSError as error:
        if output.is_dir():
            raise AlreadyExistsError(f"{output} was made by someone else meanwhile") from error
        raise
