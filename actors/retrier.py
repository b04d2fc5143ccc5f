"""Gives dead letters that are due back to their sessions, and puts every run on record."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import trio

from .errors import JournalUnavailable
from .messages import Completion, Item, Place
from .ports import Journal

PAGE = 50  # letters claimed at once, at most
AT_LEAST_EVERY = 300.0  # seconds between runs: a call that was lost, or a letter nobody was told of
_AT_MOST_EVERY = 1.0  # seconds between runs that nobody asked for
_RUN = 10.0  # seconds; what is out then counts in the next run, which looks at all services again
_AFTER_TROUBLE = 10.0  # seconds until the run after one that failed
_NO_ROOM = 0.2  # seconds until a session that had no room is offered its dead letter again


@dataclass(eq=False, slots=True)
class _Line:
    """The letters for one service: `out` are claimed, at most `room` of them with their sessions,
    the others `waiting` here.
    """

    services: tuple[str, ...]
    others: bool
    room: int
    calm: bool = False  # a session gave one back: it is not offered again at once
    out: int = 0
    waiting: deque[Item] = field(default_factory=deque)
    changed: trio.Event = field(default_factory=trio.Event)


class Retrier:
    """One run after the other: when a letter is due, when asked, and at least every five minutes. A run
    claims one letter of each (conversation, service) at a time, until no more is due or ten seconds have
    passed: the next run goes on with the rest.

    `lanes` are those of each service: no more of its letters are with sessions at once, and a service that
    takes long holds up the letters of no other. What is out when this ends is claimed again by the next one.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        epoch: int,
        lanes: Mapping[str, int],
        max_age: timedelta,
        offer: Callable[[Item], bool],
    ) -> None:
        self._journal = journal
        self._epoch = epoch
        self._max_age = max_age
        self._offer = offer
        self._services = tuple(lanes)
        self._lines = [_Line((name,), False, min(lanes[name], PAGE // 2)) for name in lanes]
        self._lines.append(_Line(self._services, True, PAGE // 2))
        self._line_of: dict[str, _Line] = {}  # by dead letter
        self._processed = 0
        self._failed = 0
        self._running = False
        self._stranded = True  # letters may be claimed that nobody has
        self._error: str | None = None  # of the run that is under way
        self._wake = trio.Event()
        self._due = float("inf")  # trio's clock
        self._pause = trio.CancelScope()

    def wake(self) -> None:
        """Somebody asked for a run."""
        self._wake.set()

    def due_in(self, seconds: float) -> None:
        """A letter became due then."""
        self._due = min(self._due, trio.current_time() + seconds)
        self._pause.deadline = min(self._pause.deadline, self._due)

    def lost(self, item: Item) -> None:
        """A session could not go through with this one; it is offered again."""
        line = self._line_of.get(item.dead_letter or "")
        if line is not None:
            line.waiting.append(item)
            line.calm = True
            self._look_again(line)

    def settled(self, completion: Completion) -> None:
        """How a replay ended is durable."""
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
            next_in = await self._run_once()
            wait = AT_LEAST_EVERY if next_in is None else min(max(next_in, _AT_MOST_EVERY), AT_LEAST_EVERY)
            if self._error is not None:
                wait = min(wait, _AFTER_TROUBLE)
            self._pause = trio.CancelScope(deadline=min(trio.current_time() + wait, self._due))
            with self._pause:
                await self._wake.wait()

    async def _run_once(self) -> float | None:
        """Returns the seconds until the next letter is due."""
        self._error = None
        self._running = True
        try:
            await self._begin()
        except JournalUnavailable as trouble:
            self._error = str(trouble)
        else:
            async with trio.open_nursery() as nursery:
                until = trio.current_time() + _RUN
                for line in self._lines:
                    nursery.start_soon(self._work_off, line, until)
        self._running = False
        return await self._put_on_record()

    async def _begin(self) -> None:
        await self._release()
        expired = await self._journal.expire_dead_letters(self._epoch, self._max_age)
        self._processed += expired
        self._failed += expired

    async def _release(self) -> None:
        """What is claimed and not out was left by another retrier, by an answer that was lost, or by a run
        that had no time for it.
        """
        if self._stranded:
            await self._journal.release_dead_letters(self._epoch, keep=list(self._line_of))
            self._stranded = False

    async def _work_off(self, line: _Line, until: float) -> None:
        claims = True
        while trio.current_time() < until:
            line.changed = trio.Event()
            if claims and len(line.waiting) < line.room:
                try:
                    items = await self._journal.claim_dead_letters(
                        self._epoch, 2 * line.room - line.out, line.services, others=line.others
                    )
                except JournalUnavailable as trouble:
                    self._error = str(trouble)
                    self._stranded = True  # it may have claimed them all the same
                    claims = False
                    continue
                line.out += len(items)
                line.waiting.extend(items)
                self._line_of.update((item.dead_letter or "", line) for item in items)
            refused = 0
            for _ in range(min(len(line.waiting), line.room - (line.out - len(line.waiting)))):
                item = line.waiting.popleft()
                if not self._offer(item):
                    line.waiting.append(item)
                    refused += 1
            if not line.out:
                return
            with trio.move_on_at(min(until, trio.current_time() + _NO_ROOM) if refused else until):
                await line.changed.wait()
            if line.calm:
                line.calm = False
                await trio.sleep(_NO_ROOM)
        self._leave(line)

    def _leave(self, line: _Line) -> None:
        """What found no room in all that time is for the next run."""
        for item in line.waiting:
            self._stranded = True
            del self._line_of[item.dead_letter or ""]
        line.out -= len(line.waiting)
        line.waiting.clear()

    async def _put_on_record(self) -> float | None:
        """Also a run that failed, once the database is there again."""
        wait = _NO_ROOM
        while True:
            processed, failed = self._processed, self._failed
            try:
                await self._release()
                next_in = await self._journal.log_retry_run(
                    self._epoch,
                    processed=processed,
                    failed=failed,
                    error=self._error,
                    services=self._services,
                )
            except JournalUnavailable:
                await trio.sleep(wait)
                wait = min(wait * 2, 5.0)
                continue
            self._processed -= processed
            self._failed -= failed
            return next_in
