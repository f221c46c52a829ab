"""Packs what an adapter has for one site: slices of A and B, and what it changes there beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from loraplex.adapters.binding import BoundAdapter, ModuleWeights, TokenRows
from loraplex.server.lora.base import BaseParameters
from loraplex.server.lora.buffer import Buffer
from loraplex.server.lora.changes import ReplacedColumns, ReplacedRows, SiteChanges
from loraplex.server.lora.dora import column_factors
from loraplex.server.lora.weights import LinearSite, SliceWeights

T = TypeVar("T")


@dataclass(frozen=True)
class _Part(Generic[T]):
    """Something of the adapter under its full name, and its columns of the site's output."""

    name: str
    value: T
    start: int
    end: int

    @property
    def width(self) -> int:
        return self.end - self.start


class SitePacker:
    """What one adapter has for one site. `taken` is all of the adapter that has its place here."""

    def __init__(
        self, bound: BoundAdapter, index: int, site: LinearSite, dtype: torch.dtype, base: BaseParameters | None
    ) -> None:
        """Find everything and check that it fits.

        Raises:
            ValueError: saying what does not fit, or that `base` is needed.
        """
        self._digest, self._index, self._site = bound.digest, index, site
        self._dtype, self._base = dtype, base
        self._modules = self._find(bound.modules, "")
        self._weights = self._find(bound.parameters, ".weight")
        self._biases = self._find(bound.parameters, ".bias")
        self._rows = self._find(bound.token_rows, ".weight")
        self.taken = {("modules", part.name) for part in self._modules}
        self.taken |= {("parameters", part.name) for part in (*self._weights, *self._biases)}
        self.taken |= {("token_rows", part.name) for part in self._rows}
        self._is_dora = any(part.value.magnitude is not None for part in self._modules)
        self._has_scaled_bias = any(part.value.lora_bias is not None for part in self._modules)
        self._is_plain = not (self._is_dora or self._has_scaled_bias or self._weights or self._biases or self._rows)
        if base is None and not self._is_plain:
            raise ValueError(f"adapter {bound.digest} is no plain LoRA at {site.name}: the base is needed")
        self._check()

    def pack(self, buffer: Buffer) -> tuple[tuple[SliceWeights, ...], SiteChanges | None]:
        """Put everything into `buffer`; return the slices by start, and the changes if there are any."""
        slices = tuple(self._slice(part, buffer) for part in self._modules)
        return slices, None if self._is_plain else self._pack_changes(buffer)

    def _find(self, given: Mapping[str, T], ending: str) -> list[_Part[T]]:
        """Return what `given` has for this site, by start."""
        spans = sorted((span, f"{target}{ending}") for target, span in self._site.targets.items())
        return [_Part(name, given[name], *span) for span, name in spans if name in given]

    def _slice(self, part: _Part[ModuleWeights], buffer: Buffer) -> SliceWeights:
        module = part.value

        def b_t() -> torch.Tensor:
            b = module.b.float() * module.scaling
            if module.magnitude is not None:
                b = b * self._factors[part.start : part.end, None].to(b.device)
            return b.T

        a = buffer.put((module.rank, self._site.in_features), self._dtype, lambda: module.a.float())
        return SliceWeights(a, buffer.put((module.rank, part.width), self._dtype, b_t), part.start, part.end)

    def _pack_changes(self, buffer: Buffer) -> SiteChanges:
        def vector(wanted: bool, values: Callable[[], torch.Tensor]) -> torch.Tensor | None:
            return buffer.put((self._site.out_features,), torch.float32, values) if wanted else None

        return SiteChanges(
            in_features=self._site.in_features,
            out_features=self._site.out_features,
            columns=tuple(self._columns(part, buffer) for part in self._weights),
            rows=tuple(self._token_rows(part, buffer) for part in self._rows),
            factors=vector(self._is_dora, lambda: self._factors),
            scaled_bias=vector(self._has_scaled_bias, self._scaled_bias),
            bias=vector(bool(self._biases), self._bias),
        )

    def _columns(self, part: _Part[torch.Tensor], buffer: Buffer) -> ReplacedColumns:
        weight = buffer.put_once(self._oriented(part), self._known_base.activations)
        return ReplacedColumns(weight, part.start, part.end)

    def _token_rows(self, part: _Part[TokenRows], buffer: Buffer) -> ReplacedRows:
        # By column of the site's output.
        tokens = buffer.put((len(part.value.tokens),), torch.int64, lambda: part.value.tokens + part.start)
        return ReplacedRows(tokens, buffer.put_once(part.value.rows, self._known_base.activations))

    @functools.cached_property
    def _factors(self) -> torch.Tensor:
        # Kept here too: the cache may have no room for the factors of one large adapter.
        return self._known_base.factors.get(self._digest, self._index, self._computed_factors)

    def _computed_factors(self) -> torch.Tensor:
        weight = self._known_base.weights[self._index].dequantize()
        for part in self._weights:
            weight[part.start : part.end] = self._oriented(part)
        for rows in self._rows:
            weight[rows.start + rows.value.tokens] = rows.value.rows.to(weight)
        return column_factors(weight, [(part.value, part.start, part.end) for part in self._modules])

    def _scaled_bias(self) -> torch.Tensor:
        bias = torch.zeros(self._site.out_features)
        for part in self._modules:
            if part.value.lora_bias is not None:
                bias[part.start : part.end] = part.value.lora_bias.float() * part.value.scaling
        return bias

    def _bias(self) -> torch.Tensor:
        bias = torch.zeros(self._site.out_features)
        for part in self._biases:
            bias[part.start : part.end] = part.value.float() - self._known_base.biases[part.name].float().cpu()
        return bias

    def _oriented(self, part: _Part[torch.Tensor]) -> torch.Tensor:
        """Return a weight as (out, in), which the base's checkpoint may store across."""
        return part.value.t() if part.name in self._known_base.stored_across else part.value

    @property
    def _known_base(self) -> BaseParameters:
        assert self._base is not None, "checked at the beginning"
        return self._base

    def _check(self) -> None:
        width = self._site.in_features
        for module in self._modules:
            self._check_module(module)
        for weight in self._weights:
            self._check_shape(weight, self._oriented(weight), (weight.width, width))
        for rows in self._rows:
            self._check_shape(rows, rows.value.rows, (len(rows.value.tokens), width))
        for bias in self._biases:
            if bias.name not in self._known_base.biases:
                raise ValueError(f"adapter {self._digest} replaces {bias.name}, which the model does not have")
            self._check_shape(bias, bias.value, (bias.width,))

    def _check_module(self, part: _Part[ModuleWeights]) -> None:
        module = part.value
        self._check_shape(part, module.a, (module.rank, self._site.in_features))
        self._check_shape(part, module.b, (part.width, module.rank))
        for vector in (module.magnitude, module.lora_bias):
            if vector is not None:
                self._check_shape(part, vector, (part.width,))
        if module.magnitude is not None and module.lora_bias is not None:
            raise ValueError(f"adapter {self._digest}: {part.name} has both a magnitude and a bias on B")

    def _check_shape(self, part: _Part[T], tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"adapter {self._digest} at {self._site.name}, {part.name}: {tuple(tensor.shape)} instead of {expected}"
            )
