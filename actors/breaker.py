"""Keeps deliveries from a service that is known to be unable: a state machine without tasks and I/O."""

from __future__ import annotations

import enum
from collections.abc import Callable


class BreakerState(enum.StrEnum):
    """Closed: deliveries go. Open: none goes. Half-open: one went, and its outcome decides."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """Opens after `failures` attempts in a row that failed, whoever made them. After `pause(n)` seconds,
    n being how often it opened in a row, one attempt may go: when it succeeds the breaker is closed, else
    it is open again, for longer.

    `on_change` is called after each change of the state.
    """

    def __init__(
        self,
        failures: int,
        *,
        pause: Callable[[int], float],
        clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self.state = BreakerState.CLOSED
        self.reason = ""  # of the last failure
        self._limit = failures
        self._pause = pause
        self._clock = clock
        self._on_change = on_change
        self._failures = 0
        self._openings = 0
        self._probe_at = 0.0
        self._period = 0  # attempts that began in an earlier one say nothing about this one

    def admit(self) -> int | None:
        """A ticket for one attempt, to be given to `record` once; None: not now."""
        if self.state is BreakerState.OPEN and self._clock() >= self._probe_at:
            self._change(BreakerState.HALF_OPEN)
            return self._period
        return self._period if self.state is BreakerState.CLOSED else None

    def record(self, ticket: int, succeeded: bool | None, reason: str = "") -> None:
        """How that attempt ended. None: it says nothing, because it was broken off, or because the service
        asked for it later.
        """
        if ticket != self._period:
            return
        if succeeded:
            self._failures = self._openings = 0
            if self.state is BreakerState.HALF_OPEN:
                self._change(BreakerState.CLOSED)
        elif self.state is BreakerState.HALF_OPEN:
            self._open(reason)
        elif succeeded is False:
            self._failures += 1
            if self._failures >= self._limit:
                self._open(reason)

    def probe_in(self) -> float | None:
        """Seconds until an attempt may go, 0 when one may now; None while one is out that decides."""
        if self.state is BreakerState.CLOSED:
            return 0.0
        return max(0.0, self._probe_at - self._clock()) if self.state is BreakerState.OPEN else None

    def _open(self, reason: str) -> None:
        self.reason = reason or self.reason
        self._failures = 0
        self._openings += 1
        self._probe_at = self._clock() + self._pause(self._openings)
        self._change(BreakerState.OPEN)

    def _change(self, state: BreakerState) -> None:
        self.state = state
        self._period += 1
        self._on_change()
