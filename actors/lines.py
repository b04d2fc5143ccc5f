"""Who stands in line for which service: first come, first called, and nobody for ever."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf

import trio

from .messages import Turn

_AT_ONCE = 4  # of a line, who waited in vain: they are many, and what just came waits for no more
_PAUSE = 0.02  # seconds between the next few


class Lines:
    """Sessions by their keys. `patience` gives the seconds that one stands in line for a service which
    meanwhile takes nothing; `leave(key, in_vain)` is called when it stands there no more, because it is
    its turn or, in vain, because it has waited that long.
    """

    def __init__(self, *, patience: Callable[[str], float], leave: Callable[[str, bool], None]) -> None:
        self._patience = patience
        self._leave = leave
        self._lines: dict[str, deque[tuple[str, float]]] = {}  # service -> sessions, and since when
        self._called: dict[str, str] = {}  # session -> the service that called it out of the line
        self._turned_away: dict[str, str] = {}  # session -> the service that it stood in line for in vain
        self._taken: dict[str, float] = {}  # service -> when it last took a delivery
        self._wake = trio.Event()

    def turn(self, key: str, service: str) -> Turn:
        """What that session may do; it can be called, or turned away, for one delivery only."""
        if self._turned_away.pop(key, None) == service:
            return Turn.TOO_LATE
        if self._called.get(key) == service:
            del self._called[key]  # used: the lane that takes the delivery calls the next one
            return Turn.CALLED
        in_line = service in self._lines or service in self._called.values()
        return Turn.IN_LINE if in_line else Turn.FREE

    def join(self, key: str, service: str) -> None:
        """The session stands at the end of the line; it must not stand in any yet."""
        if service not in self._lines:
            self._lines[service] = deque()
            self._wake.set()
        self._lines[service].append((key, trio.current_time()))

    def taken(self, service: str, room: int) -> None:
        """A lane of that service took a delivery, and there is room for so many: as many may try, with those
        that are on their way.
        """
        self._taken[service] = trio.current_time()
        coming = list(self._called.values()).count(service)
        for _ in range(room - coming):
            self._call(service)

    def break_up(self, service: str) -> None:
        """Nobody is called any more: all try, and find that out."""
        while service in self._lines:
            self._let_go(service, self._turned_away)

    def give_up(self, key: str) -> None:
        """The session came out of a line and has no use for it: the next one may try."""
        self._turned_away.pop(key, None)
        service = self._called.pop(key, None)
        if service is not None:
            self._call(service)

    def lengths(self) -> dict[str, int]:
        return {service: len(line) for service, line in self._lines.items()}

    async def run(self) -> None:
        """A service that takes nothing for too long is no longer waited for: its line breaks up, the oldest
        first.
        """
        while True:
            with trio.move_on_at(min(map(self._waits_until, self._lines), default=inf)):
                await self._wake.wait()
            self._wake = trio.Event()
            now = trio.current_time()
            for service in list(self._lines):
                if service in self._called.values():
                    self._taken[service] = now  # it is not the service that is waited for
                for _ in range(_AT_ONCE):
                    if service in self._lines and self._waits_until(service) <= now:
                        self._let_go(service, self._turned_away)
            await trio.sleep(_PAUSE)

    def _waits_until(self, service: str) -> float:
        _, since = self._lines[service][0]
        return max(since, self._taken.get(service, 0.0)) + self._patience(service)

    def _call(self, service: str) -> None:
        if service in self._lines:
            self._let_go(service, self._called)

    def _let_go(self, service: str, into: dict[str, str]) -> None:
        """The first of that line leaves it."""
        line = self._lines[service]
        key, _ = line.popleft()
        if not line:
            del self._lines[service]
        into[key] = service
        self._leave(key, into is self._turned_away)
