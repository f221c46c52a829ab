"""`adapter_config.json` -> `AdapterSpec`; whatever changes the mathematics and is not computed here is refused by name.

Keys are those of PEFT's `LoraConfig`. An unknown key is refused if it is set, never ignored. Knows nothing about
tensors or base models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from loraplex.adapters.errors import AdapterFormatError, FieldViolation
from loraplex.adapters.patterns import pattern_problem
from loraplex.adapters.spec import ALL_LINEAR, AdapterSpec

MAX_RANK = 65536
# Names or patterns in one key: every one is compared with every module. The largest models have some 1,000 modules.
MAX_NAMES = 4096
MAX_SAVED_MODULES = 256
# It is a word or a turn's beginning, some ten tokens, and is looked for in every prompt.
MAX_INVOCATION_TOKENS = 1024
_MAX_TOKEN = 2**31 - 1
_MAX_ALPHA = (2 - 2**-23) * 2.0**127  # the largest float32

# Keys that leave the result of a forward pass as it is: bookkeeping, training, or how the matrices were first filled.
# fan_in_fan_out is among them because PEFT itself sets it from the type of the base's layer.
IGNORED_KEYS = frozenset(
    {
        "peft_type",
        "peft_version",
        "auto_mapping",
        "revision",
        "inference_mode",
        "lora_dropout",
        "fan_in_fan_out",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
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
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "lora_bias",
        "use_dora",
        "modules_to_save",
        "trainable_token_indices",
        "alora_invocation_tokens",
        "ensure_weight_tying",
        "init_lora_weights",
        "task_type",
        "base_model_name_or_path",
        "loraplex_base_fingerprint",
    }
)
# Any value but "off" is refused, with this reason.
REFUSED_KEYS: Mapping[str, str] = {
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
# Those that take something out of the base's weights. PEFT writes `true` instead once it has converted the adapter.
_CHANGING_INITS: Mapping[str, str] = {
    "pissa": "PiSSA takes the principal components out of the base",
    "olora": "OLoRA takes an orthonormal part out of the base",
    "corda": "CorDA takes the components that it starts from out of the base",
    "lora_ga": "LoRA-GA takes what it starts from out of the base",
}
# Adapters of models whose head gives no tokens.
_HEADS: Mapping[str, str] = {"SEQ_CLS": "classes", "TOKEN_CLS": "classes of tokens", "QUESTION_ANS": "spans"}
_CONVERT = "save the adapter with path_initial_model_for_weight_conversion, which turns it into a plain one"


def parse_config(data: bytes) -> tuple[AdapterSpec, dict[str, Any]]:
    """Parse the bytes of an `adapter_config.json` into the spec and the JSON object it came from.

    Raises:
        AdapterFormatError: not JSON, not LoRA, or a key with a value that cannot be honoured; names every such key.
    """
    config = _load_json(data)
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        found = "is missing" if peft_type is None else f"{peft_type!r:.80} is not supported"
        hint = "PEFT's save_as_lora converts some other methods" if peft_type else "PEFT writes it with save_pretrained"
        raise AdapterFormatError.of("peft_type", f"{found}; only LORA adapters can be served ({hint})")
    reader = _Reader(config)
    spec = reader.spec()
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
        """Return the declarations; worth nothing if there are violations afterwards."""
        config = self._config
        spec = AdapterSpec(
            rank=self._value("r", _is_rank, f"a whole number from 1 to {MAX_RANK}", 1, optional=False),
            alpha=self._value("lora_alpha", _is_alpha, "a number that float32 holds", 1.0, optional=False),
            use_rslora=self._flag("use_rslora"),
            rank_pattern=self._pattern("rank_pattern", _is_rank, "positive whole numbers"),
            alpha_pattern=self._pattern("alpha_pattern", _is_alpha, "numbers that float32 holds"),
            target_modules=self._selector("target_modules"),
            exclude_modules=self._selector("exclude_modules"),
            layers=self._integers("layers_to_transform", single=True),
            layers_patterns=self._names("layers_pattern", r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", single=True),
            bias=self._value("bias", lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only", "none"),
            lora_bias=self._flag("lora_bias"),
            use_dora=self._flag("use_dora"),
            modules_to_save=self._names("modules_to_save", r"(^|.*\.){}($|\..*)"),
            token_indices=self._token_indices(),
            invocation_tokens=self._integers("alora_invocation_tokens"),
            ensure_weight_tying=self._flag("ensure_weight_tying"),
            base_model=str(config.get("base_model_name_or_path") or ""),
            base_fingerprint=str(config.get("loraplex_base_fingerprint") or ""),
        )
        self._check_init()
        self._check_task()
        self._check_keys()
        self._check_together(spec)
        return spec

    def _check_init(self) -> None:
        init = self._config.get("init_lora_weights", True)
        if isinstance(init, bool | None) or str(init).lower() in PLAIN_INITS:
            return
        kind = next((kind for kind in _CHANGING_INITS if str(init).lower().startswith(kind)), None)
        if kind:
            self._refuse("init_lora_weights", f"{init!r:.80}: {_CHANGING_INITS[kind]}; {_CONVERT}")
        elif str(init).lower() == "loftq":
            reason = "LoftQ replaces the base's weights; use replace_lora_weights_loftq on the quantized base instead"
            self._refuse("init_lora_weights", f"{init!r}: {reason}")
        else:
            self._refuse("init_lora_weights", f"{init!r:.80} is not known here and may change the base's weights")

    def _check_task(self) -> None:
        head = _HEADS.get(str(self._config.get("task_type")))
        if head:
            reason = (
                f"a server generates text and has no head for {head}; `loraplex merge` folds a classifier's adapter in"
            )
            self._refuse("task_type", f"{self._config['task_type']}: {reason}")

    def _check_keys(self) -> None:
        for key, value in self._config.items():
            if key in REFUSED_KEYS and value:
                self._refuse(key, REFUSED_KEYS[key])
            elif key not in REFUSED_KEYS and key not in READ_KEYS and key not in IGNORED_KEYS and value:
                self._refuse(key, f"is not known here, and {value!r:.80} may change what the adapter computes")

    def _check_together(self, spec: AdapterSpec) -> None:
        """Refuse what PEFT refuses too, and what would act before an aLoRA is invoked."""
        if isinstance(spec.target_modules, str) and (spec.layers or spec.layers_patterns):
            self._refuse("layers_to_transform", "has no meaning beside a target_modules that is an expression")
        if spec.layers_patterns and not spec.layers:
            self._refuse("layers_pattern", "has no meaning without layers_to_transform")
        if spec.use_dora and spec.lora_bias:
            self._refuse("lora_bias", "cannot be combined with use_dora")
        if not spec.invocation_tokens:
            return
        if len(spec.invocation_tokens) > MAX_INVOCATION_TOKENS:
            count = len(spec.invocation_tokens)
            self._refuse("alora_invocation_tokens", f"are {count}; {MAX_INVOCATION_TOKENS} are the most")
        others = {
            "use_dora": spec.use_dora,
            "bias": spec.bias != "none",
            "modules_to_save": bool(spec.modules_to_save),
            "trainable_token_indices": bool(spec.token_indices),
        }
        for key in (key for key, used in others.items() if used):
            self._refuse(key, "cannot be combined with alora_invocation_tokens: it would act before the invocation")

    def _refuse(self, key: str, reason: str) -> None:
        self.violations.append(FieldViolation(key, reason))

    def _value(
        self, key: str, accepts: Callable[[object], bool], kind: str, default: Any, *, optional: bool = True
    ) -> Any:
        value = self._config.get(key)
        if (value is None and optional) or accepts(value):
            return default if value is None else value
        self._refuse(key, f"must be {kind}, not {value!r:.80}")
        return default

    def _flag(self, key: str) -> bool:
        return bool(self._value(key, lambda value: isinstance(value, bool), "true or false", False))

    def _pattern(self, key: str, accepts: Callable[[object], bool], kind: str) -> dict[str, Any]:
        value = self._config.get(key) or {}
        if not isinstance(value, dict) or not all(accepts(v) for v in value.values()):
            self._refuse(key, f"must map module names or regular expressions to {kind}")
            return {}
        if len(value) > MAX_NAMES:
            self._refuse(key, f"has {len(value)} patterns; {MAX_NAMES} are the most")
            return {}
        for pattern in value:
            self._check_pattern(key, pattern, rf"(.*\.)?({pattern})")
        return value

    def _selector(self, key: str) -> tuple[str, ...] | str | None:
        value = self._config.get(key)
        if isinstance(value, str):
            if value.lower() != ALL_LINEAR:
                self._check_pattern(key, value, value)
            return value
        if value is None:
            return None
        if not _is_list(value, str) or len(value) > MAX_NAMES:
            self._refuse(key, f"must be a list of at most {MAX_NAMES} module names, or a regular expression")
            return None
        return tuple(value)

    def _names(self, key: str, used_as: str, *, single: bool = False) -> tuple[str, ...]:
        """Read a list of names that PEFT puts into the expression `used_as` as they are."""
        value = self._config.get(key) or []
        names = [value] if single and isinstance(value, str) else value
        if not _is_list(names, str) or not all(names) or len(names) > MAX_SAVED_MODULES:
            self._refuse(key, f"must be a list of at most {MAX_SAVED_MODULES} names")
            return ()
        for name in names:
            self._check_pattern(key, name, used_as.replace("{}", name))
        return tuple(names)

    def _integers(self, key: str, *, single: bool = False) -> tuple[int, ...]:
        value = self._config.get(key)
        numbers = [value] if single and isinstance(value, int) else value or []
        if not _is_list(numbers, int) or not all(0 <= number <= _MAX_TOKEN for number in numbers):
            self._refuse(key, f"must be a list of whole numbers from 0 to {_MAX_TOKEN}, not {value!r:.80}")
            return ()
        return tuple(numbers)

    def _token_indices(self) -> dict[str, tuple[int, ...]]:
        key = "trainable_token_indices"
        value = self._config.get(key) or {}
        by_module = value if isinstance(value, dict) else {"": value}
        for tokens in by_module.values():
            if not _is_list(tokens, int) or not tokens or not all(0 <= token <= _MAX_TOKEN for token in tokens):
                self._refuse(key, "must be lists of token ids, one for each module")
                return {}
            if len(set(tokens)) < len(tokens):
                self._refuse(key, "names a token twice, so that it is not said which of its rows counts")
        return {module: tuple(tokens) for module, tokens in by_module.items()}

    def _check_pattern(self, key: str, pattern: str, used_as: str) -> None:
        problem = pattern_problem(used_as)
        if problem:
            self._refuse(key, f"{pattern!r:.80} {problem}")


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_RANK


def _is_alpha(value: object) -> bool:
    # B is multiplied by it in float32. JSON can hold integers too long for any float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_ALPHA


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(type(item) is kind for item in value)
