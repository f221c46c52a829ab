"""Do a checkpoint's tensors make up the model that its configuration describes? Decided from headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

from loraplex.server.errors import ModelLoadError
from loraplex.server.models.checkpoint import TensorInfo
from loraplex.server.models.config import DecoderConfig
from loraplex.server.models.layout import LM_HEAD, Layout

_FLOATS = ("F32", "F16", "BF16")
_SHOWN = 6
# What bitsandbytes stores beside a quantized weight.
_QUANTIZED = re.compile(
    r"(?P<module>.+)\.(weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)"
    r"|SCB|weight_format)"
)


def match_tensors(tensors: Mapping[str, TensorInfo], layout: Layout, config: DecoderConfig) -> Mapping[str, str]:
    """Return for each tensor of the checkpoint that is needed the name that the model has for it.

    Checkpoints saved from the model without its head lack the first part of every name. Every tensor must be needed or
    known to be of no use, and every needed one present with the right shape. The tensors of ready-quantized weights are
    taken as they are: only what reads them can tell their shape.

    Raises:
        ModelLoadError: naming the tensors that are missing, unknown or of the wrong shape or type.
    """
    shapes = layout.shapes()
    names: dict[str, str] = {}
    unknown: list[str] = []
    ignored = re.compile("|".join(rf"(.*\.)?{pattern}" for pattern in layout.names.ignored))
    for name in tensors:
        known = _known_name(name, layout, shapes)
        if known is not None:
            names[name] = known
        elif not ignored.fullmatch(name):
            unknown.append(name)
    missing = set(shapes) - set(names.values())
    if config.tied_embeddings and len(missing & {layout.embedding, f"{LM_HEAD}.weight"}) == 1:
        missing -= {layout.embedding, f"{LM_HEAD}.weight"}
    _refuse("lacks tensors that its config.json asks for", sorted(missing))
    _refuse("holds tensors that this architecture does not have", sorted(unknown))
    stored = {f"{match['module']}.weight" for known in names.values() if (match := _QUANTIZED.fullmatch(known))}
    plain = {name: known for name, known in names.items() if known in shapes and known not in stored}
    wrong = [
        f"{name} is {_size(tensors[name].shape)} instead of {_size(shapes[known])}"
        for name, known in plain.items()
        if tensors[name].shape != shapes[known]
    ]
    _refuse("contradicts its config.json", wrong)
    strange = [f"{name} ({tensors[name].dtype})" for name in plain if tensors[name].dtype not in _FLOATS]
    _refuse(f"holds numbers of a type that is not served ({', '.join(_FLOATS)} are)", strange)
    return names


def _known_name(name: str, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return the model's own name for a tensor: a float one, or one that belongs to a quantized linear module."""
    for candidate in (name, f"{layout.names.root}.{name}"):
        quantized = _QUANTIZED.fullmatch(candidate)
        if candidate in shapes or (quantized and quantized["module"] in layout.module_names):
            return candidate
    return None


def _refuse(what: str, found: list[str]) -> None:
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ModelLoadError(f"the checkpoint {what}: {', '.join(found[:_SHOWN])}{more}")


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"
