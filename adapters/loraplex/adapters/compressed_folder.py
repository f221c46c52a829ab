"""Compresses adapter folders to one new folder, which PEFT and the server load like any other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loraplex.adapters.compress import Budget, Compressed, Factors, compress, total_error
from loraplex.adapters.disk import check_new_folder, disk_full_is_typed, move_folder, partial_folder, sync_folder
from loraplex.adapters.errors import AdapterFormatError, FieldViolation, InvalidRequestError
from loraplex.adapters.folder import CONFIG_FILE, TEMPLATE_FILE, WEIGHTS_FILE
from loraplex.adapters.formats import Adapter, read_adapter
from loraplex.adapters.merge_methods import weight_violations

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ModuleError:
    """What compressing one module cost: the Frobenius norm of what is lost, relative to that of the whole update."""

    module: str
    source_rank: int
    rank: int
    relative_error: float


@dataclass(frozen=True)
class CompressReport:
    """What was written, and what it cost per module and in all; sizes are of the weights."""

    output: str
    digests: tuple[str, ...]
    rank: int
    relative_error: float
    source_bytes: int
    bytes: int
    modules: tuple[ModuleError, ...]


def compress_adapters(
    sources: Sequence[tuple[Path, float]], output: Path, budget: Budget, dtype: torch.dtype | None = None
) -> CompressReport:
    """Write the weighted sum of the adapters in the folders `sources` as one adapter to the new folder `output`.

    Its weights have `dtype`, or that of the first source. A module that some sources lack comes from the others.

    Raises:
        InvalidRequestError: the budget, a weight, the dtype or the output's name makes no sense.
        AlreadyExistsError: `output` exists.
        AdapterFormatError: a folder holds no adapter, or one that is more than A and B; says what.
        PreconditionError: a module's sum is too large, by itself or for the dtype.
        ResourceExhaustedError: the disk is full.
    """
    budget.check()
    violations = weight_violations([weight for _, weight in sources])
    if dtype is not None and dtype not in DTYPES:
        violations.append(FieldViolation("dtype", f"must be one of {', '.join(map(str, DTYPES))}, not {dtype}"))
    if violations:
        raise InvalidRequestError(violations)
    check_new_folder(output)
    adapters = [read_adapter(folder) for folder, _ in sources]
    _check_plain(adapters)
    weights = [weight for _, weight in sources]
    pairs = [{**adapter.pairs, **adapter.embeddings} for adapter in adapters]
    chosen = dtype or next(iter(pairs[0].values())).a.dtype
    modules = compress(_factors(adapters, pairs, weights), budget, chosen)
    embeddings = {path for adapter in adapters for path in adapter.embeddings}
    report = CompressReport(
        output=str(output),
        digests=tuple(adapter.digest for adapter in adapters),
        rank=max(module.rank for module in modules.values()),
        relative_error=total_error(list(modules.values())),
        source_bytes=sum(pair.a.nbytes + pair.b.nbytes for each in pairs for pair in each.values()),
        bytes=sum(module.a.nbytes + module.b.nbytes for module in modules.values()),
        modules=tuple(
            ModuleError(path, module.source_rank, module.rank, module.relative_error)
            for path, module in modules.items()
        ),
    )
    with disk_full_is_typed("writing the compressed adapter"), partial_folder(output) as folder:
        save_file(dict(_tensors(modules, embeddings)), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(_config(adapters, modules), indent=2) + "\n")
        (folder / "README.md").write_text(_card(report, weights))
        templates = {adapter.chat_template for adapter in adapters}
        template = templates.pop() if len(templates) == 1 else None
        if template is not None:
            (folder / TEMPLATE_FILE).write_bytes(template.encode())
        sync_folder(folder)
        move_folder(folder, output)
    return report


def _factors(
    adapters: Sequence[Adapter], pairs: Sequence[Mapping[str, Any]], weights: Sequence[float]
) -> dict[str, list[Factors]]:
    """Return each module's factors, those of one adapter after those of the one before."""
    found: dict[str, list[Factors]] = {}
    for adapter, own, weight in zip(adapters, pairs, weights, strict=True):
        for path, pair in sorted(own.items()):
            others = found.setdefault(path, [])
            if others and (others[0].a.shape[1], others[0].b.shape[0]) != (pair.a.shape[1], pair.b.shape[0]):
                shapes = f"{tuple(pair.b.shape)} and {tuple(pair.a.shape)}"
                raise AdapterFormatError.of(pair.a_key, f"does not fit the other adapters' {path}: {shapes}")
            others.append(Factors(pair.a, pair.b, weight * adapter.spec.scaling_of(path)))
    return dict(sorted(found.items()))


def _check_plain(adapters: Sequence[Adapter]) -> None:
    """Check that A and B say everything.

    Raises:
        AdapterFormatError: naming what else there is.
    """
    violations = [
        FieldViolation(key, reason)
        for adapter in adapters
        for key, reason in _more_than_factors(adapter, alone=len(adapters) == 1)
    ]
    if violations:
        raise AdapterFormatError("the adapter cannot be compressed", violations)


def _more_than_factors(adapter: Adapter, *, alone: bool) -> Iterator[tuple[str, str]]:
    for pair in (*adapter.pairs.values(), *adapter.embeddings.values()):
        if pair.magnitude is not None:
            yield pair.magnitude.key, "is a DoRA magnitude, which holds for these very A and B"
        if pair.bias is not None:
            yield pair.bias.key, "is a bias on B, which no rank can be taken from"
    for tensor in (*adapter.parameters.values(), *adapter.token_rows.values()):
        yield tensor.key, "is trained whole, without A and B"
    if adapter.traits.invocation_tokens and not alone:
        yield "alora_invocation_tokens", "say when the adapter acts, which a sum with others cannot"


def _tensors(modules: Mapping[str, Compressed], embeddings: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for path, module in modules.items():
        a, b = ("lora_embedding_A", "lora_embedding_B") if path in embeddings else ("lora_A.weight", "lora_B.weight")
        yield f"base_model.model.{path}.{a}", module.a
        yield f"base_model.model.{path}.{b}", module.b


def _config(adapters: Sequence[Adapter], modules: Mapping[str, Compressed]) -> dict[str, Any]:
    """Return the config; alpha is each module's rank, so that what multiplies B A is 1."""
    ranks = {path: module.rank for path, module in modules.items()}
    largest = max(ranks.values())
    others = {path: rank for path, rank in ranks.items() if rank != largest}
    invocation = adapters[0].traits.invocation_tokens
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapters[0].spec.base_model,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
        **({"alora_invocation_tokens": list(invocation)} if invocation else {}),
    }


def _card(report: CompressReport, weights: Sequence[float]) -> str:
    sources = "\n".join(
        f"- `{digest}`, times {weight:g}" for digest, weight in zip(report.digests, weights, strict=True)
    )
    return f"""---
library_name: peft
---
# A compressed LoRA adapter

Written by `loraplex adapter compress` from

{sources}

by the singular value decomposition of each module's update. The largest rank is {report.rank}; over all modules
{report.relative_error:.3%} of the updates' Frobenius norm is lost.
"""
