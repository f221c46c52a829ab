"""Reads the rotary settings of a `config.json`, in the several spellings that are around.

The rules are those of transformers (`modeling_rope_utils`): `rope_parameters` (5.x) or `rope_scaling` with `rope_theta`
beside it, `rope_type` or `type`. Unknown kinds are refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from loraplex.server.errors import ModelLoadError
from loraplex.server.models.config import RopeConfig
from loraplex.server.models.config_reader import ConfigReader

# Settings of other kinds of models that would change the result, by the key that gives them away.
_REFUSED_KEYS = ("mrope_section", "full_attention", "sliding_attention")


def read_rope(config: ConfigReader, head_dim: int, *, phi: bool = False, long_context: bool = False) -> RopeConfig:
    """Return the rotary settings; `phi` reads them as Phi-3 does.

    A longrope model has two sets of frequencies, for contexts up to the original one and for longer ones. One cache can
    hold keys of one set only, so `long_context` chooses for all sequences.

    Raises:
        ModelLoadError: naming what is unknown or wrong.
    """
    rope = _settings(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if phi and kind in ("su", "yarn"):
        kind = "longrope"
    partial = rope.number_or("partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2 or partial > 1:
        raise rope.error("partial_rotary_factor", f"such that an even part of the {head_dim} numbers of a head remains")
    if partial != 1 and not phi:
        raise rope.error("partial_rotary_factor", "1 for this architecture")
    base = RopeConfig(rotary_dim, rope.number_or("rope_theta", 10000.0))
    maximum = config.integer("max_position_embeddings")
    match kind:
        case "default" | "dynamic":  # dynamic changes nothing within max_position_embeddings, and nothing goes beyond
            return base
        case "linear":
            return dataclasses.replace(base, kind="linear", factor=rope.number("factor"))
        case "llama3":
            return _llama3(base, rope, original_context(config))
        case "yarn":
            return _yarn(base, rope, maximum, original_context(config))
        case "longrope":
            return _longrope(base, rope, maximum, original_context(config), long_context)
    raise ModelLoadError(
        f"config.json: unknown rope_type {kind!r}; known: default, dynamic, linear, llama3, longrope, yarn"
    )


def original_context(config: ConfigReader) -> int:
    """Return the context that a stretched model was first trained for; `max_position_embeddings` where nothing says."""
    if config.get("original_max_position_embeddings") is not None:
        return config.integer("original_max_position_embeddings")
    settings = _settings(config)
    return settings.integer_or("original_max_position_embeddings", config.integer("max_position_embeddings"))


def _settings(config: ConfigReader) -> ConfigReader:
    """Return the rotary settings, with what stands beside them filled in."""
    nested: Any = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(nested, dict):
        raise config.error("rope_parameters", "an object")
    refused = [key for key in _REFUSED_KEYS if nested.get(key) is not None]
    if refused:
        raise ModelLoadError(f"config.json: rotary settings with {', '.join(refused)} are not supported")
    beside = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    return ConfigReader(nested, beside, "config.json, rotary settings")


def _llama3(base: RopeConfig, rope: ConfigReader, original: int) -> RopeConfig:
    return dataclasses.replace(
        base,
        kind="llama3",
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=original,
    )


def _yarn(base: RopeConfig, rope: ConfigReader, maximum: int, original: int) -> RopeConfig:
    factor = rope.number_or("factor", maximum / original)
    mscale, mscale_all = rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")
    if mscale and mscale_all:
        attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
    else:
        attention_factor = _yarn_mscale(factor, 1.0)
    return dataclasses.replace(
        base,
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=rope.number_or("beta_fast", 32.0),
        beta_slow=rope.number_or("beta_slow", 1.0),
        truncate=True if rope.get("truncate") is None else rope.flag("truncate"),
        attention_factor=rope.number_or("attention_factor", attention_factor),
    )


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(base: RopeConfig, rope: ConfigReader, maximum: int, original: int, long_context: bool) -> RopeConfig:
    count = base.rotary_dim // 2
    both = {"short_factor": rope.numbers("short_factor", count), "long_factor": rope.numbers("long_factor", count)}
    factor = rope.number_or("factor", maximum / original)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return dataclasses.replace(
        base,
        kind="longrope",
        factors=both["long_factor" if long_context else "short_factor"],
        attention_factor=rope.number_or("attention_factor", default),
    )
