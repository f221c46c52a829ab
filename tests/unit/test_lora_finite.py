"""Adapters that packing makes NaN or infinite are refused with the module and the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from loraplex.adapters.binding import BoundAdapter, EmbeddingWeights, ModuleWeights, TokenRows
from loraplex.server.errors import PreconditionError
from loraplex.server.lora.base import BaseNorm, BaseParameters
from loraplex.server.lora.packer import Packer
from loraplex.server.lora.weights import LinearSite
from loraplex.server.models.linear import DenseLinear
from loraplex.server.models.norms import make_norm, norm_tensors

SITES = (LinearSite("0.qk", 4, 10, {"q": (0, 6), "k": (6, 10)}), LinearSite("0.o", 4, 4, {"o": (0, 4)}))
PLAIN = BoundAdapter(
    "sha256:1",
    {
        "q": ModuleWeights(torch.ones(2, 4), torch.ones(6, 2), 1.0),
        "k": ModuleWeights(torch.ones(2, 4), torch.ones(4, 2), 1.0),
    },
)


class Layout:
    """Stands for what adapters of one layout share."""


def base(weight: torch.Tensor | None = None) -> BaseParameters:
    norm = BaseNorm(
        {"norm.weight": torch.ones(4), "norm.bias": torch.zeros(4)},
        lambda parameters: norm_tensors("layer", parameters["norm.weight"], parameters["norm.bias"], torch.float32),
        lambda tensors: make_norm("layer", 1e-5, tensors, torch.float32),
    )
    weights = [DenseLinear(torch.ones(10, 4) if weight is None else weight), DenseLinear(torch.ones(4, 4))]
    tables = {"embed.weight": (5, 4)}
    biases = {"q.bias": torch.zeros(6)}
    return BaseParameters(weights, biases, torch.float32, {"final_norm": norm}, tables, "embed.weight")


def refused(bound: BoundAdapter, dtype: torch.dtype = torch.float32, known: BaseParameters | None = None) -> str:
    with pytest.raises(PreconditionError) as caught:
        Packer(SITES, dtype, known or base(), pinned=False).pack(bound)
    assert bound.digest in str(caught.value)
    return str(caught.value)


def with_k(bound: BoundAdapter, **changes: Any) -> BoundAdapter:
    return replace(bound, modules={**bound.modules, "k": replace(bound.modules["k"], **changes)})


def test_a_scaling_that_overflows_the_dtype_names_module_and_dtype() -> None:
    assert ": k (B with its scaling) has values that are not finite in torch.float16" in refused(
        with_k(PLAIN, scaling=1e6), torch.float16
    )
    assert "k (B with its scaling)" in refused(with_k(PLAIN, scaling=3e38, b=torch.full((4, 2), 10.0)))
    assert "k (A)" in refused(with_k(PLAIN, a=torch.full((2, 4), 1e6)), torch.float16)


def test_adapters_of_a_known_layout_are_checked_too() -> None:
    packer, layout = Packer(SITES, torch.float32, base(), pinned=False), Layout()
    packer.pack(replace(PLAIN, layout=layout))
    with pytest.raises(PreconditionError, match=r"k \(B with its scaling\)"):
        packer.pack(replace(with_k(PLAIN, b=torch.full((4, 2), torch.inf)), layout=layout))


@pytest.mark.parametrize("magnitude", [0.0, 1.0])
def test_dora_on_a_row_of_zeros_is_refused_as_what_it_is(magnitude: float) -> None:
    """PEFT divides by the norm as well, and its logits are NaN."""
    weight = torch.ones(10, 4)
    weight[8] = 0
    b = torch.ones(4, 2)
    b[2] = 0
    dora = with_k(PLAIN, b=b, magnitude=torch.full((4,), magnitude))
    Packer(SITES, torch.float32, base(), pinned=False).pack(dora)
    message = refused(dora, known=base(weight))
    assert ": k has an output whose row of W + s B A has norm 0" in message


def test_everything_else_that_an_adapter_brings_is_checked() -> None:
    bad = torch.full((6, 4), torch.nan)
    assert "q has a bias that" in refused(replace(PLAIN, parameters={"q.bias": bad[:, 0]}))
    assert "k has a bias on B" in refused(with_k(PLAIN, lora_bias=torch.full((4,), torch.inf)))
    assert "0.qk (a trained weight)" in refused(BoundAdapter("d", {}, parameters={"q.weight": bad}))
    rows = TokenRows(torch.tensor([1, 2]), bad[:2])
    assert "0.qk (token rows)" in refused(BoundAdapter("d", {}, token_rows={"q.weight": rows}))
    assert "embedding" in refused(BoundAdapter("d", {}, token_rows={"embed.weight": rows}))
    assert "embedding" in refused(BoundAdapter("d", {}, parameters={"embed.weight": bad[:5]}))
    lora = EmbeddingWeights(torch.ones(2, 5), bad[:4, :2], 1.0)
    assert "embedding" in refused(BoundAdapter("d", {}, embedding=lora))
    assert "final_norm" in refused(BoundAdapter("d", {}, parameters={"norm.weight": bad[0]}))
