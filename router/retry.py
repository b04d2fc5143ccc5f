"""When a failed attempt is followed by another, and when the dead letter it becomes is due. Pure: the
random source is a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

ATTEMPTS = 3  # that are counted, in one delivery
STANDARD_FIRST_RETRY = 300.0  # seconds: the first step of the dead letter policy `standard` (M17)
_SHORTEST_WAIT = 0.1  # seconds; a service that asks for less would be hammered
_LONGEST_ASKED = 86_400.0  # seconds; what a Retry-After beyond a day is taken for


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential, with full jitter: the nth wait is between half of and `base` * 2**(n-1) seconds."""

    random: Callable[[], float]
    base: float = 0.25

    def next_attempt(
        self, attempts: int, elapsed: float, deadline: float, asked: float | None
    ) -> float | None:
        """Seconds to wait, or None when the attempts or the deadline leave no room for another one.

        `attempts` are those that failed by themselves; `asked` is what the service asked to wait for.
        """
        if asked is not None:
            wait = max(asked, _SHORTEST_WAIT)
        elif attempts >= ATTEMPTS:
            return None
        else:
            longest = self.base * 2 ** (attempts - 1)
            wait = longest * (0.5 + 0.5 * self.random())
        return wait if elapsed + wait < deadline else None

    def first_retry(self, asked: float | None) -> float:
        """Seconds until the dead letter is due: when the service asked for it, else by the policy."""
        return STANDARD_FIRST_RETRY if asked is None else min(max(asked, 0.0), _LONGEST_ASKED)
