"""When a failed attempt is followed by another, and when the dead letter that it becomes is due, once and
again. Pure: the random source is a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

ATTEMPTS = 3  # that are counted, in one delivery
_SHORTEST_WAIT = 0.1  # seconds; a service that asks for less would be hammered
_LONGEST_PAUSE = 30.0  # seconds for which a service that is down is left alone
_LONGEST_SEND_PAUSE = 300.0  # seconds between two attempts at one reply
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

    def put_off(self, asked: float) -> float:
        """Seconds until the dead letter is due that the service asked to have again then."""
        return min(max(asked, 0.0), _LONGEST_ASKED)

    def pause(self, openings: int) -> float:
        """Seconds for which a service is left alone whose breaker opened `openings` times in a row: between
        half of and 1, 2, 4 ... at most 30."""
        longest = min(2.0 ** min(openings - 1, 10), _LONGEST_PAUSE)
        return longest * (0.5 + 0.5 * self.random())

    def send_again_in(self, attempts: int, asked: float | None) -> float:
        """Seconds until a reply is sent again after so many attempts: 1, 4, 16 ... at most 300, as Meta
        advises for its error 131056 (Cloud API, error codes); or what the channel `asked` for."""
        wait = min(4.0 ** min(attempts - 1, 10), _LONGEST_SEND_PAUSE) if asked is None else asked
        return min(max(wait, _SHORTEST_WAIT), _LONGEST_ASKED) * (1.0 + 0.1 * self.random())


@dataclass(frozen=True, slots=True)
class Steps:
    """The policy of a service's dead letters: so many seconds before each retry, then it is exhausted."""

    seconds: tuple[float, ...]

    def due_in(self, retries: int) -> float | None:
        """Seconds until the next retry after `retries` of them; None: there is no next one."""
        return self.seconds[retries] if retries < len(self.seconds) else None


REDELIVERY = {
    "standard": Steps((300.0, 900.0, 3_600.0, 14_400.0, 43_200.0)),
    "fast": Steps((120.0, 240.0, 480.0)),
}
"""The policies by name. Five retries within 17 hours, or three within 14 minutes."""
