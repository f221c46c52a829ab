"""How a model's packed products divide among several devices: the seam for tensor parallelism.

Megatron's division (Shoeybi et al. 2019): qkv and gate_up by outputs, o and down by inputs, so that a layer needs two
sums across devices; lm_head by vocabulary. Pure numbers, read off the layout; nothing here moves a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loraplex.server.lora.weights import LinearSite
from loraplex.server.models.config import DecoderConfig
from loraplex.server.models.layout import LM_HEAD

Range = tuple[int, int]


@dataclass(frozen=True)
class SiteShard:
    """One device's part of a packed product.

    Attributes:
        inputs: the columns of W that it multiplies with; if they are not all, the devices' results are to be added.
        outputs: each module's rows of W, as ranges of the whole packed output, in its order.
    """

    inputs: Range
    outputs: Mapping[str, Range]


def shard_site(site: LinearSite, config: DecoderConfig, index: int, parts: int) -> SiteShard:
    """Return the part of `site` for device `index` of `parts`.

    Heads stay whole. Where there are fewer KV heads than devices, several devices hold the same ones.

    Raises:
        ValueError: if the model does not divide by `parts`, or its q, k and v, or gate and up, are one module.
    """
    kind = site.name.rpartition(".")[2]
    if kind in ("o", "down"):
        units = config.num_heads if kind == "o" else config.intermediate_size
        return SiteShard(_share(site.name, (0, site.in_features), units, index, parts), site.targets)
    if kind == "qkv":
        return SiteShard((0, site.in_features), _qkv(site, config, index, parts))
    assert kind in ("gate_up", LM_HEAD), f"{site.name} is no packed product of a decoder"
    if kind == "gate_up" and config.gated_mlp and len(site.targets) == 1:
        raise ValueError(f"{site.name}: gate and up are one module, of which a device has no single range of outputs")
    outputs = {name: _share(site.name, span, span[1] - span[0], index, parts) for name, span in site.targets.items()}
    return SiteShard((0, site.in_features), outputs)


def _qkv(site: LinearSite, config: DecoderConfig, index: int, parts: int) -> Mapping[str, Range]:
    if len(site.targets) == 1:
        raise ValueError(f"{site.name}: q, k and v are one module, of which a device has no single range of outputs")
    outputs: dict[str, Range] = {}
    for heads, (name, span) in zip((config.num_heads, *[config.num_kv_heads] * 2), site.targets.items(), strict=True):
        shared = heads < parts and parts % heads == 0
        owner, owners = (index * heads // parts, heads) if shared else (index, parts)
        outputs[name] = _share(site.name, span, heads, owner, owners)
    return outputs


def _share(site: str, span: Range, units: int, index: int, parts: int) -> Range:
    """Return the part `index` of `span`, which is made of `units` that stay whole."""
    start, end = span
    if units % parts:
        raise ValueError(f"{site}: {units} units do not divide among {parts} devices")
    size = (end - start) // parts
    return start + index * size, start + (index + 1) * size
