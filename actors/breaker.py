"""Keeps deliveries from a service that is known to be unable: a state machine without tasks and I/O, and the
budget that keeps retries from multiplying what a service that is failing has to bear.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW = 50  # attempts whose outcomes are looked at together
MINIMUM = 20  # of them that there have to be, before a ratio says anything
RETRY_SHARE = 0.2  # retries for each delivery, in the long run; as Finagle and Envoy have it
RETRY_RESERVE = 20  # retries that may be saved up: a short trouble costs no delivery its retries


class BreakerState(enum.StrEnum):
    """Closed: deliveries go. Open: none goes. Half-open: one went, and its outcome decides."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class Trips:
    """What opens a breaker: `in_a_row` attempts that failed; of the last WINDOW attempts a share of
    `failure_ratio` that failed; or of `slow_ratio` that took `slow_after` seconds or longer, None: no attempt
    is slow.
    """

    in_a_row: int
    failure_ratio: float = 0.5
    slow_after: float | None = None
    slow_ratio: float = 0.8


class Breaker:
    """Opens by `trips`, whoever made the attempts. After `pause(n)` seconds, n being how often it opened in a
    row, one attempt may go: when it succeeds, and is not slow, the breaker is closed, else it is open again,
    for longer.

    `on_change` is called after each change of the state.
    """

    def __init__(
        self,
        trips: Trips,
        *,
        pause: Callable[[int], float],
        clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self.state = BreakerState.CLOSED
        self.reason = ""  # why it opened last
        self._trips = trips
        self._pause = pause
        self._clock = clock
        self._on_change = on_change
        self._failures = 0  # in a row
        self._last: deque[tuple[bool, bool]] = deque(maxlen=WINDOW)  # failed, slow
        self._openings = 0
        self._probe_at = 0.0
        self._period = 0  # attempts that began in an earlier one say nothing about this one

    def admit(self) -> int | None:
        """A ticket for one attempt, to be given to `record` once; None: not now."""
        if self.state is BreakerState.OPEN and self._clock() >= self._probe_at:
            self._change(BreakerState.HALF_OPEN)
            return self._period
        return self._period if self.state is BreakerState.CLOSED else None

    def record(self, ticket: int, succeeded: bool | None, reason: str = "", *, seconds: float = 0.0) -> None:
        """How that attempt ended, and after how long. None: it says nothing, because it was broken off, or
        because the service asked for it later.
        """
        if ticket != self._period:
            return
        slow_after = self._trips.slow_after
        slow = slow_after is not None and seconds >= slow_after
        if self.state is BreakerState.HALF_OPEN:
            if succeeded and not slow:
                self._openings = 0
                self._change(BreakerState.CLOSED)
            else:
                self._open(reason or ("it answers, and slowly" if succeeded else ""))
        elif succeeded is not None:
            self._failures = 0 if succeeded else self._failures + 1
            self._openings = 0 if succeeded else self._openings
            self._last.append((not succeeded, slow))
            self._judge(reason)

    def probe_in(self) -> float | None:
        """Seconds until an attempt may go, 0 when one may now; None while one is out that decides."""
        if self.state is BreakerState.CLOSED:
            return 0.0
        return max(0.0, self._probe_at - self._clock()) if self.state is BreakerState.OPEN else None

    def _judge(self, reason: str) -> None:
        if self._failures >= self._trips.in_a_row:
            self._open(reason)
            return
        count = len(self._last)
        if count < MINIMUM:
            return
        failed = sum(one for one, _ in self._last)
        slow = sum(one for _, one in self._last)
        if failed >= self._trips.failure_ratio * count:
            self._open(f"{failed} of the last {count} attempts failed: {reason or self.reason}")
        elif self._trips.slow_after is not None and slow >= self._trips.slow_ratio * count:
            self._open(f"{slow} of the last {count} attempts took {self._trips.slow_after:g} s or longer")

    def _open(self, reason: str) -> None:
        self.reason = reason or self.reason
        self._openings += 1
        self._probe_at = self._clock() + self._pause(self._openings)
        self._change(BreakerState.OPEN)

    def _change(self, state: BreakerState) -> None:
        self.state = state
        self._failures = 0
        self._last.clear()
        self._period += 1
        self._on_change()


class RetryBudget:
    """Retries inside of deliveries are a share of these: where most attempts fail, the rest becomes dead
    letters at once, and the service is not asked three times as often as in good days.
    """

    def __init__(self, *, share: float = RETRY_SHARE, reserve: int = RETRY_RESERVE) -> None:
        self._share = share
        self._reserve = reserve
        self._saved = float(reserve)

    def delivery(self) -> None:
        """One more was begun."""
        self._saved = min(self._saved + self._share, self._reserve)

    def spend(self) -> bool:
        """Whether there is a retry left, which is spent."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True
