"""Tells services what became of the messages that they sent: each status of one message in order, over the
lanes and behind the breaker of its service. The queue is a table; what was told and not put on record is told
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import trio

from .errors import JournalUnavailable, NotOwner
from .kernel import ActorDied, MailboxClosed, MailboxFull
from .ports import Clock, StatusLog, StatusNews
from .service import Deferred, Deliver, Moved, Result, Service, Undelivered

_AT_ONCE = 4  # statuses that a service is told at the same time: messages go before them
_PAGE = 32  # statuses in one read
_LOOK_EVERY = 30.0  # seconds at most: what nobody told of
_LOOK_AGAIN = 1.0  # seconds until the next look while the service takes nothing, or the database is away
_LONGEST_WAIT = 300.0  # seconds between two attempts
MAX_AGE = timedelta(hours=24)  # a status that could not be told for so long is given up


@dataclass(eq=False, slots=True)
class _Line:
    """One service that wants to know."""

    wake: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class StatusRelay:
    """One per owner. `wanted` gives the services of now that are to be told; whoever changes them says so.
    `given_up` gets a service and how many statuses it could not be told in time.
    """

    def __init__(
        self,
        log: StatusLog,
        *,
        epoch: int,
        services: Callable[[], Mapping[str, Service]],
        wanted: Callable[[], Iterable[str]],
        clock: Clock,
        on_unavailable: Callable[[JournalUnavailable], None],
        given_up: Callable[[str, int], None],
    ) -> None:
        self._log = log
        self._epoch = epoch
        self._services = services
        self._wanted = wanted
        self._clock = clock
        self._on_unavailable = on_unavailable
        self._given_up = given_up
        self._lines: dict[str, _Line] = {}
        self._changed = trio.Event()

    def wake(self) -> None:
        """There are statuses that were not there before."""
        for line in self._lines.values():
            line.wake.set()

    def change_services(self) -> None:
        """They are others now."""
        self._changed.set()
        self.wake()

    async def run(self) -> None:
        """Until cancelled.

        Raises:
            LeaseLost: the epoch is over.
        """
        async with trio.open_nursery() as nursery:
            while True:
                self._changed = trio.Event()
                wanted = set(self._wanted())
                for name in self._lines.keys() - wanted:
                    self._lines.pop(name).scope.cancel()
                try:
                    await self._log.subscribe(sorted(wanted), epoch=self._epoch)
                except JournalUnavailable as error:
                    self._on_unavailable(error)
                    await trio.sleep(_LOOK_AGAIN)
                    continue
                for name in wanted - self._lines.keys():
                    line = self._lines[name] = _Line()
                    nursery.start_soon(self._follow, name, line)
                await self._changed.wait()

    async def _follow(self, name: str, line: _Line) -> None:
        with line.scope:
            while True:
                line.wake = trio.Event()
                wait = _LOOK_AGAIN
                service = self._services().get(name)
                opens_in = None if service is None else service.opens_in()
                if service is not None and opens_in == 0.0:
                    try:
                        wait = await self._look(name, service)
                    except JournalUnavailable as error:
                        self._on_unavailable(error)
                else:
                    wait = max(opens_in or 0.0, _LOOK_AGAIN)
                with trio.move_on_after(wait):
                    await line.wake.wait()

    async def _look(self, name: str, service: Service) -> float:
        """Tell what is due; returns the seconds until there may be more."""
        if not service.room:
            return _LOOK_AGAIN  # messages go before them
        page = await self._log.due(name, _PAGE)
        if not page.news:
            return _LOOK_EVERY if page.next_in is None else min(page.next_in, _LOOK_EVERY)
        oldest = self._clock() - MAX_AGE
        done = [news.id for news in page.news if news.created_at < oldest]
        if done:
            self._given_up(name, len(done))
        later: list[tuple[int, float]] = []
        refused = False
        room = trio.CapacityLimiter(_AT_ONCE)

        async def tell(news: StatusNews) -> None:
            nonlocal refused
            async with room:
                if refused or not service.room:
                    refused = True
                    return
                try:
                    wait = await _tell(service, news)
                except (MailboxFull, MailboxClosed, ActorDied, NotOwner):
                    refused = True  # nothing was attempted, or nobody knows: it stays as it is
                    return
            if wait is None:
                done.append(news.id)
            else:
                later.append((news.id, wait))

        async with trio.open_nursery() as nursery:
            for news in page.news:
                if news.created_at >= oldest:
                    nursery.start_soon(tell, news)
        if done or later:
            await self._log.record(done, later, epoch=self._epoch)
        return _LOOK_AGAIN if refused else 0.0


async def _tell(service: Service, news: StatusNews) -> float | None:
    """None: it was told, or the service wants none of it; else seconds until it is tried again. Raises what
    asking does."""
    result: Result | Moved = await service.address.ask_nowait(partial(Deliver, news.envelope))
    if isinstance(result, Moved):
        return 0.0
    if isinstance(result, Deferred):
        return max(service.opens_in() or 0.0, _LOOK_AGAIN)
    if isinstance(result, Undelivered):
        asked = 0.0 if result.put_off is None else result.put_off
        return max(asked, min(2.0 ** min(news.attempts, 16), _LONGEST_WAIT))
    return None
