"""When a failed call is tried again, and after how long. Sleeps nowhere: the sync and asyncio clients do."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from loraplex.client.errors import (
    DeadlineError,
    LoraplexClientError,
    ResourceExhaustedError,
    UnavailableError,
    error_from_rpc,
)


@dataclass(frozen=True)
class RetryPolicy:
    """UNAVAILABLE is tried again after a growing wait; RESOURCE_EXHAUSTED only where the server says after how long.

    Attributes:
        max_attempts: tries in all; 1 turns retries off.
        initial_backoff_s: wait after the first failure.
        max_backoff_s: longest wait between two tries.
        multiplier: each wait is this many times the one before.
        jitter: waits are spread by this fraction, so that clients do not come back all at once.
    """

    max_attempts: int = 5
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 5.0
    multiplier: float = 2.0
    jitter: float = 0.25

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: naming the field that is out of range.
        """
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}")
        if self.initial_backoff_s < 0 or self.max_backoff_s < 0 or self.multiplier < 1:
            raise ValueError("backoffs must not be negative and the multiplier must be at least 1")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter must be within 0 and 1, got {self.jitter}")


NO_RETRY = RetryPolicy(max_attempts=1)


class Attempts:
    """The tries of one call under one deadline."""

    def __init__(
        self,
        policy: RetryPolicy,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Start the deadline now: `timeout` in seconds, infinity for none."""
        self._policy = policy
        self._clock = clock
        self._uniform = uniform
        self._deadline = clock() + timeout
        self._failed = 0

    def remaining_s(self) -> float | None:
        """Return the seconds left for the next try, None without a deadline; this is what the server is told."""
        left = self._deadline - self._clock()
        return None if math.isinf(left) else max(left, 0.0)

    def wait_s(self, error: LoraplexClientError) -> float | None:
        """Count one failed try and return the seconds to wait before the next, None if there is none."""
        self._failed += 1
        if self._failed >= self._policy.max_attempts:
            return None
        policy = self._policy
        if isinstance(error, UnavailableError):
            backoff = min(policy.initial_backoff_s * policy.multiplier ** (self._failed - 1), policy.max_backoff_s)
            wait = backoff * self._uniform(1 - policy.jitter, 1 + policy.jitter)
        elif isinstance(error, ResourceExhaustedError) and error.retry_after_s is not None:
            # Never earlier than the server asked for.
            wait = error.retry_after_s * self._uniform(1, 1 + policy.jitter)
        else:
            return None
        return wait if self._clock() + wait < self._deadline else None


def wait_or_raise(error: grpc.RpcError, attempts: Attempts, request_id: str, *, repeatable: bool = True) -> float:
    """Return the seconds to wait before trying the failed call again.

    Raises:
        LoraplexClientError: the typed form of `error`, if it is not tried again.
    """
    typed = error_from_rpc(error, request_id)
    wait = attempts.wait_s(typed) if repeatable else None
    if wait is None:
        raise typed from error
    return wait


class ReadinessWait:
    """The waiting between health checks until a server is ready or a timeout passes."""

    CHECK_S = 2.0
    PAUSE_S = 0.1

    def __init__(self, target: str, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the timeout now, in seconds."""
        self._target = target
        self._timeout = timeout
        self._clock = clock
        self._deadline = clock() + timeout

    def check_timeout_s(self) -> float:
        """Return the timeout of the next health check in seconds."""
        return max(min(self.CHECK_S, self._deadline - self._clock()), 0.001)

    def pause_s(self, seen: object) -> float:
        """Return the seconds to sleep before the next check; `seen` is what the last one showed.

        Raises:
            DeadlineError: if the timeout has passed.
        """
        left = self._deadline - self._clock()
        if left <= 0:
            raise DeadlineError(f"{self._target} was not ready within {self._timeout:g} s: {seen}")
        return min(self.PAUSE_S, left)
