"""Loads a base model: from a folder, a GGUF file or the hub to a decoder that is ready to run.

Nothing here imports transformers: its configuration classes alone take about four seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraplex.adapters.binding import BaseModel
from loraplex.server.attention.interface import make_attention
from loraplex.server.errors import ModelLoadError
from loraplex.server.models.builder import DecoderBuilder, Pack, StoredWeight
from loraplex.server.models.checkpoint import Checkpoint
from loraplex.server.models.compute_dtype import activation_dtype, compute_dtype
from loraplex.server.models.config import DecoderConfig
from loraplex.server.models.config_reader import ConfigReader, read_json
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.device import resolve_device
from loraplex.server.models.families import context_limits, find_family
from loraplex.server.models.family import Family
from loraplex.server.models.fingerprint import Fingerprint
from loraplex.server.models.layout import LM_HEAD, Layout
from loraplex.server.models.matching import match_tensors
from loraplex.server.models.quantization import (
    QUANTIZATIONS,
    Linear,
    choose_weight_execution,
    from_prequantized,
    make_head,
    make_linear,
)
from loraplex.server.models.source import resolve_model

# Called with how many of the weights have been read, and how many there are.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoadedModel:
    """A base model ready to serve.

    Attributes:
        path: the local Hugging Face folder, where the tokenizer is.
        max_model_len: tokens of prompt and output together that it can take.
        eos_token_ids: tokens that end an answer.
        dtype: of embedding, KV cache and adapters; `quantization` of the layers' weights.
        weight_bytes: memory that the weights take.
    """

    decoder: Decoder
    base: BaseModel
    path: Path
    architecture: str
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    dtype: torch.dtype
    quantization: str
    device: str
    weight_bytes: int


def load_model(
    model: str,
    *,
    quantization: str = "none",
    dtype: str = "auto",
    device: str = "cpu",
    weight_execution: str = "auto",
    max_model_len: int = 0,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load `model`: a Hugging Face folder, a .gguf file, or a hub id.

    The weights of the layers are quantized as they are read; embeddings and lm_head are not, as in bitsandbytes (beside
    quantized layers a CPU may hold lm_head rounded to 13 bits a weight, see `make_head`). Memory peaks near one file of
    the checkpoint plus the result.

    Args:
        model: where it is.
        quantization: "none", "nf4", "fp4" or "int8".
        dtype: "auto", "float32", "bfloat16" or "float16": what products are computed in and the KV cache is kept in.
            On a CPU the activations between products stay float32, which costs little there.
        device: "cpu", "cuda" or "cuda:N".
        weight_execution: how quantized weights are multiplied on a CPU; see `ModelConfig`.
        max_model_len: the context asked for; 0 is the model's usual one. A longrope model (Phi-3) has other frequencies
            for contexts beyond its usual one; all sequences then use those.
        progress: told how far reading is.

    Raises:
        ModelLoadError: saying what is missing, wrong, or not supported.
    """
    target = resolve_device(device)
    compute = compute_dtype(dtype, target)
    path = resolve_model(model)
    values = read_json(path / "config.json")
    family = find_family(values)
    kind, prequantized = _quantization(values, quantization)
    context = _context(family, values, max_model_len)
    config = family.read(values, long_context=context.long)
    layout = Layout(config, family.names)
    pack = _packer(layout, kind, prequantized, compute, target, weight_execution)
    checkpoint = Checkpoint.open(path)
    names = match_tensors(checkpoint.tensors, layout, config)
    builder = DecoderBuilder(config, layout, names.values(), pack, compute, activation_dtype(compute, target), target)
    try:
        fingerprint = _read(checkpoint, names, config, builder, progress)
        decoder = builder.build(make_attention(target))
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(f"the weights do not fit in the memory of {target}: {error}") from error
    return LoadedModel(
        decoder=decoder,
        base=BaseModel(
            name=_name(model, path),
            architecture=family.architecture,
            fingerprint=fingerprint,
            modules=layout.modules(),
            conv1d=family.names.conv1d,
            parameters=layout.parameters(),
            embedding=layout.embedding,
            tied=builder.tied,
        ),
        path=path,
        architecture=family.architecture,
        max_model_len=context.length,
        eos_token_ids=_eos_token_ids(path, family, values),
        vocab_size=config.vocab_size,
        dtype=compute,
        quantization=kind,
        device=str(target),
        weight_bytes=builder.weight_bytes,
    )


def _packer(
    layout: Layout, kind: str, prequantized: bool, dtype: torch.dtype, device: torch.device, weight_execution: str
) -> Pack:
    """Return what makes the products of the layers and lm_head; how they are multiplied is decided once for all."""
    layers = [module for site in layout.linears[:-1] for module in site.modules]
    size = sum(module.in_features * module.out_features for module in layers)
    execution = choose_weight_execution(weight_execution, kind, dtype, device, size)

    def pack(site: str, weights: Sequence[StoredWeight]) -> Linear:
        if any(len(weight) > 1 for weight in weights):
            return from_prequantized(weights, dtype, device, execution)
        matrices = [weight["weight"] for weight in weights]
        if site == LM_HEAD:
            return make_head(matrices[0], kind, dtype, device, execution)
        # An unquantized layer of a quantized checkpoint was left alone on purpose.
        return make_linear(matrices, "none" if prequantized else kind, dtype, device, execution)

    return pack


def _read(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    config: DecoderConfig,
    builder: DecoderBuilder,
    progress: Progress | None,
) -> str:
    """Give every needed tensor to `builder`; return the fingerprint."""
    total = sum(checkpoint.tensors[name].numel for name in names)
    done = 0
    with Fingerprint() as fingerprint:
        for name, tensor in checkpoint.read():
            if name not in names:
                continue
            fingerprint.add(names[name], tensor)
            builder.add(names[name], tensor)
            done += tensor.numel()
            if progress is not None:
                progress(done, total)
        return fingerprint.finish(config)


@dataclass(frozen=True)
class _Context:
    """How many tokens, and whether that takes the frequencies for long contexts."""

    length: int
    long: bool


def _context(family: Family, values: Mapping[str, Any], wanted: int) -> _Context:
    usual, longest = context_limits(family, values)
    if wanted > longest:
        raise ModelLoadError(f"a context of {wanted} tokens was asked for; the model's positions end at {longest}")
    return _Context(wanted or usual, wanted > usual)


def _quantization(values: Mapping[str, Any], wanted: str) -> tuple[str, bool]:
    """Return the quantization that the layers will have, and whether the checkpoint has it already.

    Raises:
        ModelLoadError: for an unknown name, a checkpoint quantized by something else than bitsandbytes, or in another
            way than wanted.
    """
    if wanted not in QUANTIZATIONS:
        raise ModelLoadError(f"unknown quantization {wanted!r}: {', '.join(QUANTIZATIONS)}")
    stored = values.get("quantization_config")
    if not stored:
        return wanted, False
    config = ConfigReader(stored, {}, "config.json, quantization_config")
    if config.flag("load_in_4bit"):
        kind = config.get("bnb_4bit_quant_type") or "fp4"
    elif config.flag("load_in_8bit"):
        kind = "int8"
    else:
        method = config.get("quant_method") or "an unknown method"
        raise ModelLoadError(
            f"the checkpoint is quantized by {method}, which is not supported: give the unquantized model and let "
            "--quantization quantize it"
        )
    if wanted not in ("none", kind):
        raise ModelLoadError(f"the checkpoint is already quantized to {kind}, which cannot become {wanted}")
    return str(kind), True


def _eos_token_ids(path: Path, family: Family, values: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids that the generation config names, or the config where there is none."""
    generation = path / "generation_config.json"
    found = read_json(generation).get("eos_token_id") if generation.is_file() else None
    if found is None:
        found = family.reader(values).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token, int) for token in ids):
        raise ModelLoadError(f"{path}: eos_token_id must be one or several token ids, got {found!r}")
    return tuple(ids)


def _name(model: str, path: Path) -> str:
    """Return what to call the model: the hub id, or the last part of a path."""
    local = Path(model).expanduser()
    if local.suffix.lower() == ".gguf":
        return local.stem
    return path.resolve().name if local.is_dir() else model
