"""Gives dead letters that are due back to their sessions, and puts every run on record."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta

import trio

from .breaker import BreakerState
from .deferrals import Deferrals
from .errors import JournalUnavailable
from .messages import Completion, Item, Place
from .ports import Journal
from .service import Service

PAGE = 50  # letters claimed at once, at most
AT_LEAST_EVERY = 300.0  # seconds between runs: a call that was lost, or a letter nobody was told of
_AT_MOST_EVERY = 1.0  # seconds between runs that nobody asked for
_RUN = 10.0  # seconds; what is out then counts in the next run, which looks at all services again
_EXPIRE_EVERY = 60.0  # seconds between looks for letters that waited too long
_AFTER_TROUBLE = 10.0  # seconds until the run after one that failed
_NO_ROOM = 0.2  # seconds until a session that had no room is offered its dead letter again


@dataclass(eq=False, slots=True)
class _Line:
    """The letters for one service, or (`name` None) for all that nobody serves: `out` are claimed, as many of
    them as there is room for with their sessions, the others `waiting` here.
    """

    name: str | None
    calm: bool = False  # a session gave one back: it is not offered again at once
    out: int = 0
    waiting: deque[Item] = field(default_factory=deque)
    changed: trio.Event = field(default_factory=trio.Event)


class Retrier:
    """One run after the other: when a letter is due, when asked, and at least every five minutes. A run
    claims one letter of each (conversation, service) at a time, until no more is due or ten seconds have
    passed: the next run goes on with the rest.

    No more letters of a service are with sessions at once than twice its lanes, and none while it is paused
    or its breaker is open; a service that takes long holds up the letters of no other. What is out when this
    ends is claimed again by the next one.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        epoch: int,
        services: Mapping[str, Service],
        deferrals: Deferrals,
        max_age: timedelta,
        offer: Callable[[Item], bool],
    ) -> None:
        self._journal = journal
        self._epoch = epoch
        self._max_age = max_age
        self._offer = offer
        self._services = services
        self._deferrals = deferrals
        self._lines = {name: _Line(name) for name in (*services, None)}
        self._line_of: dict[str, _Line] = {}  # by dead letter
        self._processed = 0
        self._failed = 0
        self._running = False
        self._until = 0.0  # trio's clock: the end of the run that is under way
        self._stranded = True  # letters may be claimed that nobody has
        self._error: str | None = None  # of the run that is under way
        self._expire_at = 0.0  # trio's clock
        self._going: set[str] = set()  # services with letters that may go, as far as was heard
        self._look_everywhere = True
        self._wake = trio.Event()
        self._due = float("inf")  # trio's clock
        self._pause = trio.CancelScope()

    def wake(self) -> None:
        """Somebody asked for a run."""
        self._wake.set()

    def committed(self, completions: Iterable[Completion]) -> None:
        """These are durable: dead letters that came to be, and replays that ended."""
        for completion in completions:
            letter = completion.dead_letter
            if letter is not None or completion.item.dead_letter is not None:
                self._going.add(completion.service or "")
            if letter is not None and letter.status == "pending" and letter.retry_in is not None:
                self.due_in(max(self._waits(completion.service or "", letter.retry_in), _AT_MOST_EVERY))
            if completion.item.dead_letter is not None:
                self._settled(completion)

    def change_services(self) -> None:
        """There are others: what waited for one that there was not can go."""
        for name in self._services:
            self._lines.setdefault(name, _Line(name))
        self._until = trio.current_time()  # the run that is under way looked at those before
        for line in self._lines.values():
            line.changed.set()
        self.wake()

    def due_in(self, seconds: float) -> None:
        """A letter became due then."""
        self._due = min(self._due, trio.current_time() + seconds)
        self._pause.deadline = min(self._pause.deadline, self._due)

    def lost(self, item: Item) -> None:
        """A session could not go through with this one; it is offered again, and may have arrived."""
        line = self._line_of.get(item.dead_letter or "")
        if line is not None:
            line.waiting.append(replace(item, redelivered=True))
            line.calm = True
            self._look_again(line)

    def _settled(self, completion: Completion) -> None:
        line = self._line_of.pop(completion.item.dead_letter or "", None)
        if line is None:
            return  # it was out when the retrier before this one ended
        self._processed += 1
        self._failed += completion.place is not Place.DELIVERED
        line.out -= 1
        self._look_again(line)

    def _look_again(self, line: _Line) -> None:
        line.changed.set()
        if not self._running:
            self.due_in(_AT_MOST_EVERY)

    async def run(self) -> None:
        """For as long as the epoch lasts."""
        while True:
            self._wake = trio.Event()
            self._due = float("inf")
            due = await self._run_once()
            next_in = min(map(self._waits, due, due.values()), default=AT_LEAST_EVERY)
            wait = min(max(next_in, _AT_MOST_EVERY), AT_LEAST_EVERY)
            if self._error is not None:
                wait = min(wait, _AFTER_TROUBLE)
            self._pause = trio.CancelScope(deadline=min(trio.current_time() + wait, self._due))
            with self._pause:
                await self._wake.wait()
            self._look_everywhere = self._wake.is_set() or self._error is not None or wait == AT_LEAST_EVERY

    def _waits(self, service: str, due_in: float) -> float:
        """Seconds until a letter of that service that is due then can go."""
        known = self._services.get(service)
        opens_in = 0.0 if known is None else known.opens_in()
        return AT_LEAST_EVERY if opens_in is None else max(due_in, opens_in)

    def _room(self, line: _Line) -> int:
        """Twice as many as the service has lanes, so that one waits for each lane; one while its breaker is
        open and may be tried; none while it is paused, or when it is gone.
        """
        if line.name is None:
            return PAGE // 2
        service = self._services.get(line.name)
        if service is None or service.paused:
            return 0
        if service.breaker.state is BreakerState.CLOSED:
            return min(2 * service.concurrency.limit, PAGE // 2)
        return int(service.breaker.probe_in() == 0.0)

    async def _run_once(self) -> Mapping[str, float]:
        """Returns the seconds until the next letter of each service is due."""
        self._error = None
        self._running = True
        began = trio.current_time()
        try:
            await self._begin()
        except JournalUnavailable as trouble:
            self._error = str(trouble)
        else:
            async with trio.open_nursery() as nursery:
                self._until = trio.current_time() + _RUN
                for line in filter(self._may_have_letters, list(self._lines.values())):
                    nursery.start_soon(self._work_off, line)
        self._running = False
        return await self._put_on_record(trio.current_time() - began)

    def _may_have_letters(self, line: _Line) -> bool:
        if self._look_everywhere or line.out:
            return True
        if line.name is None:
            return not self._going <= self._services.keys()
        return line.name in self._going

    async def _begin(self) -> None:
        await self._release()
        if trio.current_time() >= self._expire_at:
            expired = await self._journal.expire_dead_letters(self._epoch, self._max_age)
            self._processed += expired
            self._failed += expired
            self._expire_at = trio.current_time() + _EXPIRE_EVERY

    async def _release(self) -> None:
        """What is claimed and not out was left by another retrier, by an answer that was lost, or by a run
        that had no time for it.
        """
        if self._stranded:
            await self._journal.release_dead_letters(self._epoch, keep=list(self._line_of))
            self._stranded = False

    async def _work_off(self, line: _Line) -> None:
        claims = True
        while trio.current_time() < self._until:
            line.changed = trio.Event()
            room = self._room(line)
            if line.waiting and not room:
                self._leave(line)
            wanted = PAGE if room > 1 else room
            if claims and line.out < wanted and len(line.waiting) < room:
                try:
                    items = await self._claim(line, wanted - line.out)
                except JournalUnavailable as trouble:
                    self._error = str(trouble)
                    self._stranded = True  # it may have claimed them all the same
                    claims = False
                    continue
                line.out += len(items)
                line.waiting.extend(items)
                self._line_of.update((item.dead_letter or "", line) for item in items)
            refused = 0
            for _ in range(min(len(line.waiting), room - (line.out - len(line.waiting)))):
                item = line.waiting.popleft()
                if not self._offer(item):
                    line.waiting.append(item)
                    refused += 1
            if not line.out:
                return
            look_at = min(self._until, trio.current_time() + _NO_ROOM) if refused else self._until
            with trio.move_on_at(look_at):
                await line.changed.wait()
            if line.calm:
                line.calm = False
                await trio.sleep(_NO_ROOM)
        self._leave(line)

    async def _claim(self, line: _Line, limit: int) -> list[Item]:
        if line.name is None:
            return await self._journal.claim_dead_letters(
                self._epoch, limit, list(self._services), others=True
            )
        return await self._journal.claim_dead_letters(self._epoch, limit, [line.name])

    def _leave(self, line: _Line) -> None:
        """What found no room in all that time, or finds none now, is for the next run."""
        for item in line.waiting:
            self._stranded = True
            self._line_of.pop(item.dead_letter or "", None)
        line.out -= len(line.waiting)
        line.waiting.clear()

    async def _put_on_record(self, took: float) -> Mapping[str, float]:
        """Also a run that failed, once the database is there again."""
        wait = _NO_ROOM
        while True:
            processed, failed = self._processed, self._failed
            try:
                await self._release()
                await self._deferrals.refresh()
                self._going.clear()
                due = await self._journal.log_retry_run(
                    self._epoch,
                    took=took,
                    processed=processed,
                    failed=failed,
                    error=self._error,
                    services=list(self._services),
                )
            except JournalUnavailable:
                await trio.sleep(wait)
                wait = min(wait * 2, 5.0)
                continue
            self._going.update(due)
            self._processed -= processed
            self._failed -= failed
            return due
