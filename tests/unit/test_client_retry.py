"""When a failed call is tried again, on a clock that only the test moves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.client import (
    DeadlineError,
    ErrorDetails,
    InternalError,
    LoraplexClientError,
    ResourceExhaustedError,
    RetryPolicy,
    UnavailableError,
)
from loraplex.client.retry import Attempts, ReadinessWait

UNAVAILABLE = UnavailableError("draining")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def full(retry_after_s: float | None) -> ResourceExhaustedError:
    return ResourceExhaustedError("full", details=ErrorDetails(retry_after_s=retry_after_s))


def longest(low: float, high: float) -> float:
    return high


def test_waits_grow_up_to_their_limit() -> None:
    policy = RetryPolicy(max_attempts=6, initial_backoff_s=1, max_backoff_s=5, multiplier=2, jitter=0)
    attempts = Attempts(policy, math.inf, Clock())
    assert [attempts.wait_s(UNAVAILABLE) for _ in range(6)] == [1, 2, 4, 5, 5, None]


@given(st.floats(0, 1), st.integers(1, 8), st.integers(0, 10))
def test_jitter_spreads_a_wait_by_its_fraction(jitter: float, max_attempts: int, failures: int) -> None:
    policy = RetryPolicy(max_attempts=max_attempts, initial_backoff_s=1, max_backoff_s=1, jitter=jitter)
    attempts = Attempts(policy, math.inf)
    waits = [attempts.wait_s(UNAVAILABLE) for _ in range(failures)]
    taken = [wait for wait in waits if wait is not None]
    assert len(taken) == min(failures, max_attempts - 1)
    assert all(1 - jitter <= wait <= 1 + jitter for wait in taken)


def test_the_servers_wait_is_never_cut_short() -> None:
    policy = RetryPolicy(max_attempts=10, max_backoff_s=1, jitter=0.5)
    assert Attempts(policy, math.inf, Clock(), longest).wait_s(full(30)) == 45
    assert all((Attempts(policy, math.inf).wait_s(full(30)) or 0) >= 30 for _ in range(20))


@pytest.mark.parametrize("error", [full(None), InternalError("x"), LoraplexClientError("x"), DeadlineError("x")])
def test_all_else_is_not_tried_again(error: LoraplexClientError) -> None:
    assert Attempts(RetryPolicy(), math.inf).wait_s(error) is None


def test_a_wait_ends_before_the_deadline_or_is_not_begun() -> None:
    clock = Clock()
    attempts = Attempts(RetryPolicy(jitter=0), 10, clock)
    assert attempts.remaining_s() == 10
    assert attempts.wait_s(full(9)) == 9
    clock.now += 9
    assert attempts.remaining_s() == 1
    assert attempts.wait_s(full(1)) is None
    clock.now += 2
    assert attempts.remaining_s() == 0


def test_no_deadline_is_none_to_grpc() -> None:
    assert Attempts(RetryPolicy(), math.inf).remaining_s() is None


@pytest.mark.parametrize(
    "values",
    [{"max_attempts": 0}, {"jitter": 1.5}, {"jitter": math.nan}, {"multiplier": 0.5}, {"initial_backoff_s": -1}],
)
def test_a_policy_out_of_range_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        RetryPolicy(**values)  # type: ignore[arg-type]


def test_waiting_for_a_server_ends_at_the_timeout() -> None:
    clock = Clock()
    wait = ReadinessWait("host:1", 5, clock)
    assert wait.check_timeout_s() == 2
    assert wait.pause_s("x") == 0.1
    clock.now += 4.5
    assert wait.check_timeout_s() == 0.5
    clock.now += 1
    assert wait.check_timeout_s() > 0
    with pytest.raises(DeadlineError, match="host:1 was not ready within 5 s: not_serving"):
        wait.pause_s("not_serving")
