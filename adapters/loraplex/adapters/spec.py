"""`adapter_config.json` -> `AdapterSpec`: the ranks, scalings and targets that an adapter declares.

Follows PEFT's rules (`peft/tuners/lora`, `peft.utils.other.get_pattern_key`) and refuses by name whatever changes the
mathematics and is not computed here. Knows nothing about tensors or base models.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import regex

from loraplex.adapters.errors import AdapterFormatError, FieldViolation

MAX_RANK = 65536
# For one match; an honest one takes microseconds, and Python's own engine could not be stopped at all.
_MATCH_TIMEOUT_S = 0.2

# Keys that leave the result of a forward pass as it is: bookkeeping, training, or how the matrices were first filled.
# fan_in_fan_out is among them because PEFT itself sets it from the type of the base's layer; ensure_weight_tying only
# acts on embedding adapters, whose tensors are refused.
IGNORED_KEYS = frozenset(
    {
        "peft_type",
        "peft_version",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
        "fan_in_fan_out",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
        "ensure_weight_tying",
        "merge_weights",
    }
)
READ_KEYS = frozenset(
    {
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "bias",
        "init_lora_weights",
    }
)
# Any value but "off" is refused, with this reason.
REFUSED_KEYS: Mapping[str, str] = {
    "use_dora": "DoRA is not supported yet",
    "lora_bias": "a bias on B is not supported yet",
    "modules_to_save": "fully trained modules are not supported yet; train with LoRA on the linear modules only",
    "trainable_token_indices": "trained token rows are not supported yet",
    "alora_invocation_tokens": "aLoRA is not supported yet",
    "layer_replication": "the adapter belongs to a model with repeated layers, which is another base",
    "megatron_config": "Megatron's parallel layers are not supported; save the adapter for the Hugging Face model",
    "target_parameters": "LoRA on bare parameters (mixture-of-experts weights) is not supported",
    "use_qalora": "QALoRA pools the input of A, which is not supported",
    "use_bdlora": "BD-LoRA's block-diagonal factors are not supported",
    "arrow_config": "Arrow routes tokens between adapters, which is not supported",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples the adapter's weights, which is not supported",
    "velora_config": "VeLoRA is not supported",
    "enable_lora": "merged-linear LoRA of old PEFT versions is not supported; save the adapter with a current PEFT",
}
# Initialisations that leave the base's weights as they are; the saved tensors then say everything.
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})


@dataclass(frozen=True)
class AdapterSpec:
    """What a LoRA adapter declares about itself.

    Patterns keep the config's order, because PEFT takes the first that matches. `target_modules` is a tuple of names,
    a regular expression, or None where the config names none.
    """

    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    base_model: str = ""

    def rank_of(self, module: str) -> int:
        """Return the rank that the config gives `module` (its full path)."""
        return self.rank_pattern.get(pattern_key(self.rank_pattern, module), self.rank)

    def scaling_of(self, module: str) -> float:
        """Return what multiplies B A in `module`: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        alpha = self.alpha_pattern.get(pattern_key(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def unmatched_targets(self, adapted: Iterable[str], base_modules: Iterable[str]) -> tuple[str, ...]:
        """Return the declared targets that none of the `adapted` modules answers to.

        A target whose every module in the base is excluded by `exclude_modules` is in order.
        """
        adapted, base_modules = tuple(adapted), tuple(base_modules)
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return ()
            return () if any(_selects(self.target_modules, m) for m in adapted) else (self.target_modules,)
        return tuple(
            target
            for target in self.target_modules or ()
            if not any(_selects((target,), m) for m in adapted) and not self._excludes_all(target, base_modules)
        )

    def _excludes_all(self, target: str, base_modules: tuple[str, ...]) -> bool:
        meant = [m for m in base_modules if _selects((target,), m)]
        excluded = self.exclude_modules
        return bool(meant) and excluded is not None and all(_selects(excluded, m) for m in meant)


def pattern_key(patterns: Iterable[str], module: str) -> str:
    """Return the first pattern that matches `module` from a dot to its end, or `module` (PEFT `get_pattern_key`)."""
    for pattern in patterns:
        if _matches(rf"(.*\.)?({pattern})", module):
            return pattern
    return module


def _selects(selector: tuple[str, ...] | str, module: str) -> bool:
    """PEFT's rule for target and exclude lists: a regex matches the whole path, a name its end at a dot."""
    if isinstance(selector, str):
        return _matches(selector, module)
    return any(module == name or module.endswith(f".{name}") for name in selector)


def _matches(pattern: str, module: str) -> bool:
    try:
        # Other threads go on meanwhile.
        return _compiled(pattern).fullmatch(module, timeout=_MATCH_TIMEOUT_S, concurrent=True) is not None
    except TimeoutError as error:
        reason = f"the regular expression {pattern!r:.80} takes too long to match; use a simpler one"
        raise AdapterFormatError.of("adapter_config.json", reason) from error


@functools.lru_cache(maxsize=8192)  # EVA and AdaLoRA leave a pattern for each module
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)


def parse_config(data: bytes) -> tuple[AdapterSpec, dict[str, Any]]:
    """Parse the bytes of an `adapter_config.json` into the spec and the JSON object it came from.

    Raises:
        AdapterFormatError: not JSON, not LoRA, or a key with a value that cannot be honoured; names every such key.
    """
    config = _load_json(data)
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        found = "is missing" if peft_type is None else f"{peft_type!r} is not supported"
        raise AdapterFormatError.of("peft_type", f"{found}; only LORA adapters can be served")
    reader = _Reader(config)
    spec = reader.spec()
    reader.refuse_unsupported()
    if reader.violations:
        raise AdapterFormatError("adapter_config.json cannot be honoured", reader.violations)
    return spec, config


def _load_json(data: bytes) -> dict[str, Any]:
    def refuse(literal: str) -> NoReturn:
        raise ValueError(f"{literal} is not JSON")

    try:
        config = json.loads(data, parse_constant=refuse)
        # What cannot be written back (1e999, half a surrogate pair, endless nesting) could not be stored or digested.
        json.dumps(config, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError.of("adapter_config.json", f"is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterFormatError.of("adapter_config.json", "is not a JSON object")
    return config


class _Reader:
    """Reads typed values out of a config and collects every violation on the way."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.violations: list[FieldViolation] = []
        self._config = config

    def spec(self) -> AdapterSpec:
        config = self._config
        if not _is_rank(config.get("r")):
            self._refuse("r", f"must be a whole number from 1 to {MAX_RANK}, not {config.get('r')!r:.80}")
        if not _is_number(config.get("lora_alpha")):
            self._refuse("lora_alpha", f"must be a finite number, not {config.get('lora_alpha')!r:.80}")
        if not isinstance(config.get("use_rslora", False), bool):
            self._refuse("use_rslora", "must be true or false")
        rank_pattern = self._pattern("rank_pattern", _is_rank, "positive whole numbers")
        alpha_pattern = self._pattern("alpha_pattern", _is_number, "finite numbers")
        targets, excluded = self._selector("target_modules"), self._selector("exclude_modules")
        if self.violations:
            return AdapterSpec(1, 1.0)
        return AdapterSpec(
            rank=config["r"],
            alpha=config["lora_alpha"],
            use_rslora=config.get("use_rslora", False),
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            target_modules=targets,
            exclude_modules=excluded,
            base_model=str(config.get("base_model_name_or_path") or ""),
        )

    def refuse_unsupported(self) -> None:
        config = self._config
        if config.get("bias", "none") not in ("none", None):
            self._refuse("bias", f"trained biases ({config['bias']!r}) are not supported yet; only 'none' is")
        init = config.get("init_lora_weights", True)
        if not isinstance(init, bool | None) and init not in PLAIN_INITS:
            self._refuse(
                "init_lora_weights",
                f"{init!r} changes the base's weights; save the adapter with "
                "path_initial_model_for_weight_conversion, which turns it into a plain one",
            )
        for key, value in config.items():
            if key in REFUSED_KEYS and value:
                self._refuse(key, REFUSED_KEYS[key])
            elif key not in REFUSED_KEYS and key not in READ_KEYS and key not in IGNORED_KEYS and value:
                self._refuse(key, f"is not known here, and {value!r:.80} may change what the adapter computes")

    def _refuse(self, key: str, reason: str) -> None:
        self.violations.append(FieldViolation(key, reason))

    def _pattern(self, key: str, accepts: Callable[[object], bool], kind: str) -> dict[str, Any]:
        value = self._config.get(key) or {}
        if not isinstance(value, dict) or not all(accepts(v) for v in value.values()):
            self._refuse(key, f"must map module names or regular expressions to {kind}")
            return {}
        for pattern in value:
            self._check_regex(key, pattern, rf"(.*\.)?({pattern})")
        return value

    def _selector(self, key: str) -> tuple[str, ...] | str | None:
        value = self._config.get(key)
        if isinstance(value, str):
            self._check_regex(key, value, value)
            return value
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self._refuse(key, "must be a list of module names or a regular expression")
            return None
        return tuple(value)

    def _check_regex(self, key: str, pattern: str, used_as: str) -> None:
        try:
            re.compile(used_as)  # what PEFT would do with it
            _compiled(used_as)
        except (re.error, regex.error, RecursionError) as error:
            self._refuse(key, f"{pattern!r:.80} is not a regular expression: {error}")


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_RANK


def _is_number(value: object) -> bool:
    # The comparison also refuses integers too long for a float, which JSON can hold.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
