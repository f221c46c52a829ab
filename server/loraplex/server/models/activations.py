"""The MLP's activation functions, plain and gated."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from loraplex.server.models.config import ActivationKind

Activation = Callable[[torch.Tensor], torch.Tensor]


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


_FUNCTIONS: dict[ActivationKind, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
}


def make_activation(kind: ActivationKind, device: torch.device, *, gated: bool) -> Activation:
    """Return the function of that kind: of x (T, n), or gated: of gate and up side by side (T, 2n), to (T, n)."""
    function = _FUNCTIONS[kind]
    if not gated:
        return function
    if device.type == "cpu" and kind in ("silu", "gelu_tanh"):
        from loraplex.server.models.pointwise import CpuGate

        return CpuGate(gelu=kind == "gelu_tanh")

    def gate(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return function(gate).mul_(up)

    return gate
