"""The CPU's norms, rotation and gates do what PyTorch's do, in float32 and bfloat16, for one row and for many."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from loraplex.server.models.activations import make_activation
from loraplex.server.models.config import RopeConfig
from loraplex.server.models.norms import RmsNorm
from loraplex.server.models.pointwise import CpuGate, CpuRmsNorm
from loraplex.server.models.rotary import Rotary, TorchRotation, rope_frequencies

# Relative to the float64 result; bfloat16 is one rounding, 2^-9.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
ROWS = (1, 3, 16, 130)


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value: torch.dtype = request.param
    return value


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 1e-1)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [7, 64, 577])
def test_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    x, delta = random(rows, size, dtype=dtype, scale=3), random(rows, size, dtype=dtype)
    weight = random(size, dtype=torch.float32)
    norm, reference = CpuRmsNorm(weight, 1e-3, dtype), RmsNorm(weight.double(), 1e-3)
    assert_close(norm(x), reference(x.double()), dtype)
    total = x + delta
    normalized = norm.add(x, delta)
    assert torch.equal(x, total)
    assert_close(normalized, reference(total.double()), dtype)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("rotary_dim", [64, 12])
def test_rotation(rows: int, rotary_dim: int, dtype: torch.dtype) -> None:
    config = RopeConfig(rotary_dim, theta=500.0, attention_factor=1.25)
    positions = torch.arange(rows) * 70  # the last ones lie beyond the table that is made first
    qkv = random(rows, 9, 64, dtype=dtype)
    angles = positions[:, None].float() * rope_frequencies(config)
    cos, sin = 1.25 * angles.cos().double(), 1.25 * angles.sin().double()
    reference = TorchRotation(torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1))
    expected = qkv.double()
    expected[:, :6] = reference.apply(expected[:, :6].clone())
    rotated = Rotary(config, dtype, torch.device("cpu")).rotation(positions, 70 * rows).apply(qkv[:, :6])
    assert torch.equal(rotated, qkv[:, :6])
    torch.testing.assert_close(qkv.double(), expected, rtol=0, atol=4 * TOLERANCE[dtype])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("gelu", [False, True])
def test_gate(rows: int, gelu: bool, dtype: torch.dtype) -> None:
    x = random(rows, 2 * 301, dtype=dtype, scale=6)
    gate, up = x.double().chunk(2, -1)
    function = torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)
    torch.testing.assert_close(
        CpuGate(gelu=gelu)(x).double(), function * up, rtol=2 * TOLERANCE[dtype], atol=20 * TOLERANCE[torch.float32]
    )


def test_gate_at_the_ends_of_the_range() -> None:
    x = torch.tensor([[0.0, -0.0, 89.0, -89.0, 3e38, -3e38, 1e-30, torch.nan, torch.inf]])
    both = torch.cat((x, torch.ones_like(x)), -1)
    silu = CpuGate(gelu=False)(both)
    torch.testing.assert_close(silu[:, :7], torch.nn.functional.silu(x[:, :7]), atol=1e-6, rtol=1e-6)
    assert silu[0, 7].isnan()
    assert silu[0, 8].isinf()
    torch.testing.assert_close(
        CpuGate(gelu=True)(both)[:, :4], torch.nn.functional.gelu(x, approximate="tanh")[:, :4], atol=1e-6, rtol=1e-6
    )


def test_rows_do_not_depend_on_each_other() -> None:
    norm, gate = CpuRmsNorm(torch.ones(64), 1e-6, torch.float32), CpuGate(gelu=False)
    x = random(130, 64, dtype=torch.float32)
    assert torch.equal(norm(x)[77:78], norm(x[77:78].clone()))
    assert torch.equal(gate(x)[77:78], gate(x[77:78].clone()))


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
def test_plain_and_gated_functions_agree(kind: str) -> None:
    x = random(5, 32, dtype=torch.float32)
    device = torch.device("cpu")
    plain = make_activation(kind, device, gated=False)  # type: ignore[arg-type]
    gated = make_activation(kind, device, gated=True)  # type: ignore[arg-type]
    torch.testing.assert_close(gated(torch.cat((x, x), -1)), plain(x) * x)
