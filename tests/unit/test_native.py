"""What compiled kernels are made of: numbers as bits, functions, vectors, threads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from loraplex.server.native import team
from loraplex.server.native.intrinsics import atomic_add, atomic_load, f32_at, i64_at, narrow, u16_at, widen
from loraplex.server.native.lane_math import keep_between, maximum, transpose
from loraplex.server.native.product import ROWS, WIDTH, add_product, set_product
from loraplex.server.native.simd import LANES, load, splat, store
from loraplex.server.native.team import Kernel, find_gomp_parallel
from loraplex.server.native.vector import axpy, dot, dot4, exp, exp_lanes, tanh, weighted_rows


def _round_trip(arguments: int) -> None:
    p = i64_at(arguments)
    for i in range(p[0]):
        u16_at(p[2])[i] = narrow(f32_at(p[1])[i], u16_at(p[2])[i])
        f32_at(p[3])[i] = widen(u16_at(p[2])[i])


def _functions(arguments: int) -> None:
    p = i64_at(arguments)
    for i in range(p[0]):
        f32_at(p[2])[i] = exp(f32_at(p[1])[i])
        f32_at(p[3])[i] = tanh(f32_at(p[1])[i])


def _products(arguments: int) -> None:
    """Rows of n: w (5, n), x (4, n); out: four dots, one dot, then two rows of sums."""
    p = i64_at(arguments)
    n, w, x, out, sums = p[0], f32_at(p[1]), f32_at(p[2]), f32_at(p[3]), f32_at(p[4])
    s0, s1, s2, s3 = dot4(w, 0, x, 0, n, n)
    out[0] = s0
    out[1] = s1
    out[2] = s2
    out[3] = s3
    out[4] = dot(w, 4 * n, x, n, n)
    axpy(w, 2 * n, out[4], sums, 0, n)
    weighted_rows(w, 0, n, out, 0, 5, sums, n, n)


def _exponentials(arguments: int) -> None:
    p = i64_at(arguments)
    for i in range(0, p[0], LANES):
        store(f32_at(p[2]), i, exp_lanes(load(f32_at(p[1]), i), splat(f32_at(p[1])[p[0]])))


def _tile_products(arguments: int) -> None:
    """Rows (ROWS, n) times lanes (n, WIDTH), set and added; the rows once more from their transposed form."""
    p = i64_at(arguments)
    n, w, x, w_bf16, x_bf16, out = p[0], f32_at(p[1]), f32_at(p[2]), u16_at(p[3]), u16_at(p[4]), f32_at(p[5])
    size = ROWS * WIDTH
    set_product(w, 0, n, 1, x, 0, WIDTH, n, out, 0, WIDTH)
    add_product(w, 0, n, 1, x, 0, WIDTH, n, out, size, WIDTH)
    set_product(w_bf16, 0, 1, ROWS, x_bf16, 0, WIDTH, n, out, 2 * size, WIDTH)


def _sixteen_lanes(arguments: int) -> None:
    p = i64_at(arguments)
    x, out = f32_at(p[0]), f32_at(p[1])
    transpose(x, 0, 20, out, 0, 16)
    a, b = load(x, 0), load(x, 20)
    store(out, 256, maximum(a, b))
    store(out, 272, keep_between(a, splat(np.float32(-0.5)), b, splat(np.float32(0.75)), np.float32(-7)))


def _count_threads(arguments: int) -> None:
    """Count the calls and wait, not forever, until there have been as many as the second number says."""
    atomic_add(arguments, 1)
    for _ in range(1 << 31):
        if atomic_load(arguments) >= i64_at(arguments)[1]:
            break
    else:
        atomic_add(arguments, -100)


def run(function: Callable[[int], None], *values: int, threads: int = 1) -> npt.NDArray[np.int64]:
    arguments = np.array(values, dtype=np.int64)
    Kernel(function, len(values))(arguments.ctypes.data, threads)
    return arguments


def test_bfloat16_rounds_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, float("inf"), -float("inf"), 3.4e38, 1e-40])
    x = torch.cat([special, anything[~anything.isnan()], torch.tensor([float("nan")])])
    bits, back = np.zeros(x.shape[0], dtype=np.uint16), torch.zeros_like(x)
    run(_round_trip, x.shape[0], x.data_ptr(), bits.ctypes.data, back.data_ptr())
    expected = x.to(torch.bfloat16)
    assert torch.equal(back[:-1], expected[:-1].float())
    assert torch.equal(torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)[:-1], expected[:-1])
    assert back[-1].isnan()


def test_sixteen_exponentials() -> None:
    largest = 3.0
    x = torch.cat([torch.linspace(largest - 86.9, largest, 40_000), torch.full((16,), -1e30), torch.tensor([largest])])
    out = torch.zeros(len(x) - 1)
    run(_exponentials, len(out), x.data_ptr(), out.data_ptr())
    expected = (x[:-1] - largest).double().exp()
    torch.testing.assert_close(out[:-16].double(), expected[:-16], rtol=3e-7, atol=0)
    assert not out[-16:].any()


@pytest.mark.parametrize("n", [0, 1, 7, 64])
def test_tiles_of_products(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    w, x = torch.randn(ROWS, n, generator=generator), torch.randn(n, WIDTH, generator=generator)
    w_bf16, x_bf16 = w.T.contiguous().bfloat16(), x.bfloat16()
    before = torch.randn(3, ROWS, WIDTH, generator=generator)
    out = before.clone()
    run(_tile_products, n, *(t.data_ptr() for t in (w, x, w_bf16, x_bf16, out)))
    expected = torch.stack([w @ x, before[1] + w @ x, w_bf16.T.float() @ x_bf16.float()])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_sixteen_lanes_at_once() -> None:
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(18, 16)
    run(_sixteen_lanes, x.data_ptr(), out.data_ptr())
    a, b = x[0, :16], x[1, :16]
    assert torch.equal(out[:16], x[:, :16].T)
    assert torch.equal(out[16], torch.maximum(a, b))
    assert torch.equal(out[17], torch.where((b >= -0.5) & (b <= 0.75), a, torch.tensor(-7.0)))


def test_exp_and_tanh() -> None:
    x = torch.cat([torch.linspace(-87, 87, 40_001), torch.linspace(-1, 1, 20_001), torch.tensor([0.0, -0.0])])
    e, t = torch.zeros_like(x), torch.zeros_like(x)
    run(_functions, x.shape[0], x.data_ptr(), e.data_ptr(), t.data_ptr())
    torch.testing.assert_close(e.double(), x.double().exp(), rtol=3e-7, atol=0)
    torch.testing.assert_close(t.double(), x.double().tanh(), rtol=3e-7, atol=1e-30)
    far = torch.tensor([-1e30, -200.0, 200.0, float("nan")])
    e, t = torch.zeros_like(far), torch.zeros_like(far)
    run(_functions, far.shape[0], far.data_ptr(), e.data_ptr(), t.data_ptr())
    assert e[:2].max() < 1e-37
    assert e[2] > 1e38
    assert t[:3].tolist() == [-1, -1, 1]
    assert t[3].isnan()


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 63, 64, 65, 130, 576])
def test_products(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    w, x = torch.randn(5, n, generator=generator), torch.randn(4, n, generator=generator)
    out, sums = torch.zeros(5), torch.ones(2, n)
    run(_products, n, w.data_ptr(), x.data_ptr(), out.data_ptr(), sums.data_ptr())
    expected = torch.cat([x @ w[0], (w[4] @ x[1])[None]])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    expected_sums = 1 + torch.stack([out[4] * w[2], out @ w])
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-4)


def test_kernels_run_on_the_threads_that_were_asked_for() -> None:
    """Every thread waits for the others, so this returns only if all of them run at once."""
    if find_gomp_parallel() is None:
        pytest.skip("torch here has no OpenMP library of the kind that kernels can call")
    assert run(_count_threads, 0, 3, threads=3)[0] == 3


def test_without_openmp_a_kernel_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "find_gomp_parallel", lambda: None)
    assert run(_count_threads, 0, 1, threads=3)[0] == 1


def test_where_nothing_can_be_written_kernels_compile_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("cannot cache function: no locator available for file")

    monkeypatch.setattr("numba.core.ccallback.CFunc.enable_caching", refuse)
    assert run(_count_threads, 0, 1)[0] == 1
