"""What the name of a tensor in an adapter's file means: which module it belongs to, and as what.

Knows the ways in which PEFT has named them over the years, with and without the adapter's name, and the prefixes that
wrappers leave. Knows nothing about values or base models.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass


class Part(enum.Enum):
    """What a tensor is to its module."""

    A = "lora_A"
    B = "lora_B"
    LORA_BIAS = "lora_B.bias"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    TOKEN_ROWS = "trainable_tokens_delta"
    PARAMETER = "parameter"
    BASE_COPY = "base_layer"


@dataclass(frozen=True)
class TensorName:
    """`path` is a module's, or for PARAMETER and BASE_COPY that of a parameter of the unadapted model."""

    path: str
    part: Part


MAX_NAME = 500
_WRAPPERS = ("base_model.model.", "_orig_mod.", "_fsdp_wrapped_module.", "module.")
# Some versions put the adapter's name behind lora_A and its like, some leave it out.
_ADAPTER = r"(?:\.(?!weight$|bias$)[^.]+)?"
_MODULE_PARTS: tuple[tuple[re.Pattern[str], Part], ...] = tuple(
    (re.compile(rf"(?P<path>.+)\.{expression}"), part)
    for expression, part in (
        (rf"lora_A{_ADAPTER}\.weight", Part.A),
        (rf"lora_B{_ADAPTER}\.weight", Part.B),
        (rf"lora_B{_ADAPTER}\.bias", Part.LORA_BIAS),
        (rf"lora_embedding_A{_ADAPTER}(?:\.weight)?", Part.EMBEDDING_A),
        (rf"lora_embedding_B{_ADAPTER}(?:\.weight)?", Part.EMBEDDING_B),
        (rf"lora_magnitude_vector{_ADAPTER}(?:\.weight)?", Part.MAGNITUDE),
        (rf"token_adapter\.trainable_tokens_delta{_ADAPTER}", Part.TOKEN_ROWS),
    )
)
_SAVED = re.compile(r"(?P<path>.+?)\.modules_to_save\.(?:default\.)?(?P<rest>.+)")
_COPY = re.compile(r"(?P<path>.+?)\.(?P<kind>original_module|(?:token_adapter\.)?base_layer)\.(?P<rest>.+)")
_METHODS = re.compile(r"(^|\.)(lora_\w+|ia3_\w+|token_adapter|modules_to_save|base_layer|original_module)(\.|$)")


def parse_name(key: str) -> TensorName | None:
    """Return what `key` means, or None if it means nothing that is known here.

    The bias of a `base_layer` is a trained one and so a PARAMETER: PEFT writes it for `bias="all"` and `"lora_only"`.
    """
    if len(key) > MAX_NAME:
        return None
    path, part = _split(_unwrapped(key))
    if part in (Part.PARAMETER, Part.BASE_COPY) and not path.endswith((".weight", ".bias")):
        return None
    # Marks that are left belong to another method, or to one method inside another.
    return None if _METHODS.search(path) else TensorName(path, part)


def _split(name: str) -> tuple[str, Part]:
    for expression, part in _MODULE_PARTS:
        match = expression.fullmatch(name)
        if match:
            return match["path"], part
    match = _SAVED.fullmatch(name)
    if match:
        return f"{match['path']}.{match['rest']}", Part.PARAMETER
    match = _COPY.fullmatch(name)
    if match:
        trained = (match["kind"], match["rest"]) == ("base_layer", "bias")
        return f"{match['path']}.{match['rest']}", Part.PARAMETER if trained else Part.BASE_COPY
    return name, Part.PARAMETER


def _unwrapped(key: str) -> str:
    while True:
        wrapper = next((wrapper for wrapper in _WRAPPERS if key.startswith(wrapper)), None)
        if wrapper is None:
            return key
        key = key[len(wrapper) :]
