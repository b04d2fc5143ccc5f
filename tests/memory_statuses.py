"""Statuses that services are to be told, in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import trio

from actors.errors import JournalUnavailable, LeaseLost
from actors.ports import StatusNews, StatusPage


class MemoryStatuses:
    """A StatusLog: `waiting` by service, what is due at its time by `clock`; `fail(n)`: the next n calls find
    it away. `subscribed` has what was last asked for.
    """

    def __init__(self, *, clock: Callable[[], float] = lambda: 0.0) -> None:
        self._clock = clock
        self.epoch = 1
        self.subscribed: list[str] = []
        self.waiting: dict[str, list[StatusNews]] = {}
        self.due_at: dict[int, float] = {}
        self._failures = 0

    def fail(self, calls: int) -> None:
        self._failures = calls

    async def subscribe(self, services: Sequence[str], *, epoch: int) -> None:
        await self._call(epoch)
        self.subscribed = list(services)
        self.waiting = {name: news for name, news in self.waiting.items() if name in services}

    async def due(self, service: str, limit: int) -> StatusPage:
        await self._call(self.epoch)
        now = self._clock()
        heads: dict[str, StatusNews] = {}
        for one in self.waiting.get(service, []):
            heads.setdefault(one.envelope.message["status"]["id"], one)
        due = [one for one in heads.values() if self.due_at.get(one.id, now) <= now]
        later = [at - now for one in heads.values() if (at := self.due_at.get(one.id, now)) > now]
        return StatusPage(due[:limit], None if due or not later else min(later))

    async def record(self, done: Sequence[int], later: Sequence[tuple[int, float]], *, epoch: int) -> None:
        await self._call(epoch)
        again = dict(later)
        self.due_at.update({identity: self._clock() + wait for identity, wait in later})
        for name, news in self.waiting.items():
            self.waiting[name] = [
                replace(one, attempts=one.attempts + (one.id in again)) for one in news if one.id not in done
            ]

    async def _call(self, epoch: int) -> None:
        await trio.lowlevel.checkpoint()
        if self._failures:
            self._failures -= 1
            raise JournalUnavailable("the database is away")
        if epoch != self.epoch:
            raise LeaseLost(epoch)
