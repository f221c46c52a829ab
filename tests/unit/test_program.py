"""Recorded kernel calls, and the memory that they write to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraplex.server.native import shares
from loraplex.server.native.intrinsics import atomic_add, f32_at, i64_at
from loraplex.server.native.program import Program, StepArguments, record
from loraplex.server.native.team import Kernel, kernel_calls
from loraplex.server.native.workspace import Workspace, alias, empty, memory_from, team_size

X, Y, UNITS, FACTOR, SHARES, TICKET, COUNTERS = 0, 1, 2, 3, 4, 8, 16
NUM_ARGUMENTS = COUNTERS + shares.WORDS
NUMBERS = 1000  # of a unit: long enough for two threads to meet


def _scale(arguments: int) -> None:
    """Set each unit of y to FACTOR times the unit of x that mirrors it: what another thread wrote before."""
    p = i64_at(arguments)
    x, y, own = f32_at(p[X]), f32_at(p[Y]), atomic_add(arguments + 8 * TICKET, 1)
    unit = shares.take(arguments + 8 * COUNTERS, p[UNITS], p[SHARES], own)
    while unit >= 0:
        for i in range(NUMBERS):
            y[unit * NUMBERS + i] = p[FACTOR] * x[(p[UNITS] - 1 - unit) * NUMBERS + i]
        unit = shares.take(arguments + 8 * COUNTERS, p[UNITS], p[SHARES], own)


@pytest.fixture(scope="module")
def scale() -> Kernel:
    return Kernel(_scale, NUM_ARGUMENTS)


def call(kernel: Kernel, x: torch.Tensor, y: torch.Tensor, factor: int, threads: int) -> None:
    arguments = np.zeros(NUM_ARGUMENTS, dtype=np.int64)
    arguments[: SHARES + 1] = (x.data_ptr(), y.data_ptr(), len(x), factor, threads)
    kernel(arguments.ctypes.data, threads)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("units", [1, 2, 7])
def test_calls_run_one_after_the_other_as_often_as_asked(scale: Kernel, threads: int, units: int) -> None:
    """A chain of calls, each of which reads what the one before wrote on other threads."""
    steps = 40
    x = torch.randint(-3, 4, (units, NUMBERS)).float()
    between = [torch.full_like(x, torch.nan) for _ in range(steps)]
    with record() as recording:
        for index, y in enumerate(between):
            call(scale, x if index == 0 else between[index - 1], y, -1 if index % 2 else 1, threads)
    assert all(y.isnan().all() for y in between)  # nothing ran yet
    program = Program(recording)
    for _ in range(20):
        x.copy_(torch.randint(-3, 4, (units, NUMBERS)).float())
        program.run(threads)
        assert torch.equal(between[-1], x)  # an even number of mirrors and of signs
        assert torch.equal(between[0], x.flip(0))


def test_what_changes_is_set_in_every_call_of_its_kernel(scale: Kernel) -> None:
    x, y, z = torch.ones(2, NUMBERS), torch.zeros(2, NUMBERS), torch.zeros(2, NUMBERS)
    with record() as recording:
        call(scale, x, y, 1, 1)
        call(scale, y, z, 1, 1)
    program = Program(recording)
    program.update(StepArguments(scale, FACTOR, np.array([5], dtype=np.int64), None))
    program.run(1)
    assert y.unique().tolist() == [5]
    assert z.unique().tolist() == [25]
    program.update(StepArguments(Kernel(_scale, NUM_ARGUMENTS), FACTOR, np.array([9], dtype=np.int64), None))
    program.run(1)
    assert z.unique().tolist() == [25]  # no call of that kernel was recorded


def test_an_error_ends_the_recording(scale: Kernel) -> None:
    with pytest.raises(KeyError), record():
        raise KeyError
    assert kernel_calls.take is None
    x, y = torch.ones(1, NUMBERS), torch.zeros(1, NUMBERS)
    call(scale, x, y, 2, 1)
    assert y.unique().tolist() == [2]


def test_nothing_recorded_is_no_program() -> None:
    with record() as recording:
        pass
    with pytest.raises(ValueError, match="nothing was recorded"):
        Program(recording)


@given(st.integers(0, 50), st.integers(1, 8), st.data())
def test_every_unit_is_taken_once_whoever_comes(units: int, count: int, data: st.DataObject) -> None:
    counters = np.zeros(shares.WORDS + 8, dtype=np.int64)
    address = counters.ctypes.data
    taken: list[int] = []
    left = list(range(count))
    while left:
        own = data.draw(st.sampled_from(left))
        unit = _take_one(address, units, count, own)
        if unit < 0:
            left.remove(own)
        else:
            taken.append(unit)
    assert sorted(taken) == list(range(units))


ADDRESS, ALL, PARTS, OWN, RESULT = range(5)


def _take(arguments: int) -> None:
    p = i64_at(arguments)
    p[RESULT] = shares.take(p[ADDRESS], p[ALL], p[PARTS], p[OWN])


_take_kernel: list[Kernel] = []


def _take_one(address: int, units: int, count: int, own: int) -> int:
    if not _take_kernel:
        _take_kernel.append(Kernel(_take, 5))
    arguments = np.array([address, units, count, own, 0], dtype=np.int64)
    _take_kernel[0](arguments.ctypes.data, 1)
    return int(arguments[RESULT])


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9), st.booleans()), max_size=40))
def test_memory_in_use_is_given_to_nobody_else(requests: list[tuple[int, int, bool]]) -> None:
    """Fill each tensor with its own number, let some of them go, and look whether the others still have theirs."""
    workspace = Workspace()
    held: dict[int, torch.Tensor] = {}
    for number, (rows, columns, keep) in enumerate(requests):
        tensor = workspace.empty(rows, columns, dtype=torch.float32)
        assert tensor.shape == (rows, columns)
        assert tensor.data_ptr() % 64 == 0 or not tensor.numel()
        held[number] = tensor.fill_(number)[:, :]  # a view alone keeps it
        del tensor
        if not keep:
            del held[min(held)]
    for number, tensor in held.items():
        assert torch.equal(tensor, torch.full_like(tensor, number))


def test_memory_that_was_let_go_is_used_again_and_an_alias_does_not_hold_it() -> None:
    workspace = Workspace()
    first = workspace.empty(4, 4, dtype=torch.float32).fill_(1)
    seen = alias(first)
    address, size = first.data_ptr(), workspace.nbytes
    del first
    again = workspace.empty(2, 2, dtype=torch.float32).fill_(2)
    assert again.data_ptr() == address
    assert workspace.nbytes == size
    assert seen.flatten().tolist() == [2] * 4 + [1] * 12


def test_steps_that_grow_row_by_row_take_little_more_than_the_largest() -> None:
    workspace, columns = Workspace(), 1000
    for rows in range(1, 65):
        workspace.empty(rows, columns, dtype=torch.float32)
    assert workspace.nbytes < 4 * 64 * columns * 4


def test_results_lie_in_the_workspace_only_while_it_is_asked_for() -> None:
    workspace = Workspace()
    assert team_size(False) == 1
    with memory_from(workspace):
        assert team_size(False) == torch.get_num_threads()
        empty(8, dtype=torch.int64)
    empty(800, dtype=torch.int64)
    assert workspace.nbytes < 800
