"""What a LoRA operator does, whatever it runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from loraplex.server.lora.overrides import Overrides
from loraplex.server.lora.segments import Segment
from loraplex.server.lora.weights import PackedAdapter


class LoraOps(Protocol):
    """Adds the adapters' part to the base model's output; stateless between steps.

    Semantics:
        for each segment and each slice (A, B_t, start, end) of its adapter at the site:
            y[t, start:end] += segment.scale * (x[t] @ A^T) @ B_t      for t in segment.start:segment.end
        where the adapter changes the site in other ways too, before and after that what `SiteChanges` says.
    Accumulated in float32 whatever the dtypes of x, y and the weights; y is rounded once by the slices, and at most
    once by each other change. The result is deterministic, and a token's does not depend on which other segments are
    present.
    """

    def prepare(self, segments: Sequence[Segment], slots: Mapping[int, PackedAdapter]) -> object:
        """Return what `add` needs, once a step for all sites. The slots' weights must stay alive until the last `add`.

        Args:
            segments: disjoint token ranges, each with a slot.
            slots: the adapter in each slot that `segments` names.

        Raises:
            KeyError: if a segment names a slot that is not in `slots`.
            ValueError: if its adapter does not hold for the segment's scale.
        """
        ...

    def add(self, y: torch.Tensor, x: torch.Tensor, site: int, prepared: Any) -> None:
        """Add in place to `y`, the base output before the bias.

        Shape:
            y: (T, out_features) float32 or bfloat16, unit stride along the features.
            x: (T, in_features) float32 or bfloat16, unit stride along the features.

        Args:
            y: base output, changed in place.
            x: the input that the base's product had.
            site: index into `PackedAdapter.sites`.
            prepared: what this object's `prepare` returned.

        Raises:
            ValueError: if shapes, strides or dtypes are not as above or a segment lies outside T.
        """
        ...


@runtime_checkable
class StaticLoraOps(LoraOps, Protocol):
    """An operator whose launches can be captured in a graph and replayed for other segments.

    What `add` launches with a reserved `prepared` follows from what was reserved alone: grids cover all that may come,
    and which token uses which weights is read from memory of the device that stays where it is. Weights are read where
    `refill` found them, so that adapters may come and go between replays.
    """

    def reserve(self, tokens: int, segments: int, sites: frozenset[int] | None = None) -> object:
        """Return what `add` takes, naming no adapter yet, with room for up to `segments` segments in `tokens` tokens.

        Adapters may act at `sites` only (None: everywhere), and nothing is launched at others. `add` never writes to
        tokens that are in no segment.
        """
        ...

    def refill(self, prepared: Any, segments: Sequence[Segment], slots: Mapping[int, PackedAdapter]) -> bool:
        """Make `prepared` say what `prepare(segments, slots)` would; return False, with nothing changed, if it cannot.

        It cannot if there are more segments, larger ranks or other sites than were reserved, or if an adapter changes
        more than the slices of A and B do. Takes its turn in the work of the device's current stream, behind what was
        launched with the old content, and waits for nothing.

        Raises:
            KeyError, ValueError: as `prepare` does.
        """
        ...


def adapters_of(segments: Sequence[Segment], slots: Mapping[int, PackedAdapter]) -> list[tuple[Segment, PackedAdapter]]:
    """Return each segment that is not empty with its adapter.

    Raises:
        KeyError, ValueError: as `LoraOps.prepare` does.
    """
    chosen = [(segment, slots[segment.slot]) for segment in segments if segment.end > segment.start]
    for segment, adapter in chosen:
        if segment.scale != 1 and adapter.holds_one_scale:
            raise ValueError(f"adapter {adapter.digest} holds for scale 1 only, not for {segment}")
    return chosen


def largest_extents(adapters: Sequence[PackedAdapter]) -> npt.NDArray[np.int64]:
    """Return per site the largest (in_features, end) of any adapter: (sites, 2); there is at least one adapter."""
    extents: npt.NDArray[np.int64] = np.maximum.reduce([adapter.extents for adapter in adapters])
    return extents


def check_fit(y: torch.Tensor, x: torch.Tensor, in_features: int, out_features: int, end: int) -> None:
    """Refuse shapes and strides for which kernels would read or write wrongly.

    Args:
        y: as `LoraOps.add` takes it.
        x: as `LoraOps.add` takes it.
        in_features: what the adapters read at the site.
        out_features: how far they write.
        end: of the last segment.

    Raises:
        ValueError: saying what does not fit.
    """
    tokens, width = y.shape
    if x.shape != (tokens, in_features) or width < out_features or tokens < end:
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit segments up to {end} of adapters from {in_features} "
            f"to {out_features} features"
        )
    if x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(f"the features of x and y must be contiguous, not strided by {x.stride(1)} and {y.stride(1)}")


@dataclass(frozen=True)
class LoraContext:
    """A step's adapters, as the decoder hands them from layer to layer.

    `tokens` is prepared for all T tokens of the batch, `logits` for the rows that go on to lm_head. `overrides` is for
    adapters that change more than products, None where there are none.
    """

    ops: LoraOps
    tokens: object
    logits: object
    overrides: Overrides | None = None


def make_lora_ops(device: torch.device, weights: torch.dtype = torch.bfloat16) -> LoraOps:
    """Return the fastest operator there is for `device` and adapters in the dtype `weights`."""
    if device.type == "cpu":
        from loraplex.server.lora.ops.cpu import CpuLoraOps

        return CpuLoraOps()
    if device.type == "cuda" and weights in (torch.float32, torch.bfloat16):
        from loraplex.server.lora.ops.triton import TritonLoraOps
        from loraplex.server.lora.ops.triton_plan import Reserved

        return TritonLoraOps(device, Reserved(dtype=weights))
    from loraplex.server.lora.ops.reference import ReferenceLoraOps

    return ReferenceLoraOps()
