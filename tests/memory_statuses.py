"""Statuses that services are to be told, in memory. The contract in statuses_contract.py is run on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import trio

from actors.errors import JournalUnavailable, LeaseLost
from actors.messages import Envelope, Session
from actors.ports import StatusNews, StatusPage

_START = datetime(2030, 1, 1, tzinfo=UTC)


class MemoryStatuses:
    """`happened` queues a status if its service has subscribed; `fail(n)`: the next n calls find it away."""

    def __init__(self, *, clock: Callable[[], datetime] = lambda: _START) -> None:
        self._clock = clock
        self.epoch = 1
        self.subscribed: list[str] = []
        self.waiting: list[StatusNews] = []
        self._due_at: dict[int, datetime] = {}
        self._count = 0
        self._failures = 0
        self.looked: Callable[[], object] = lambda: None

    def fail(self, calls: int) -> None:
        self._failures = calls

    def happened(self, service: str, message: str, status: str) -> None:
        if service not in self.subscribed:
            return
        self._count += 1
        key = hashlib.blake2b(f"{message} {status}".encode(), digest_size=16).hexdigest()
        envelope = Envelope(
            id=f"sts_{key}",
            message_id=None,
            domain=service,
            session=Session(key="100:a", phone_number_id="100"),
            message={"type": "status", "status": {"id": message, "status": status}},
            received_at=self._clock(),
            correlation_id="c",
        )
        self.waiting.append(StatusNews(self._count, envelope, self._clock(), 0))

    async def subscribe(self, services: Sequence[str], *, epoch: int) -> None:
        await self._call(epoch)
        self.subscribed = list(services)
        self.waiting = [news for news in self.waiting if news.envelope.domain in services]

    async def due(self, service: str, limit: int) -> StatusPage:
        await self._call(self.epoch)
        self.looked()
        now = self._clock()
        heads: dict[str, StatusNews] = {}
        for news in self.waiting:
            if news.envelope.domain == service:
                heads.setdefault(news.envelope.message["status"]["id"], news)
        due = [news for news in heads.values() if self._due_at.get(news.id, now) <= now]
        later = [self._due_at[news.id] - now for news in heads.values() if news not in due]
        return StatusPage(due[:limit], None if due or not later else min(later).total_seconds())

    async def record(self, done: Sequence[int], later: Sequence[tuple[int, float]], *, epoch: int) -> None:
        await self._call(epoch)
        again = dict(later)
        for identity, wait in later:
            self._due_at[identity] = self._clock() + timedelta(seconds=wait)
        self.waiting = [
            news
            if news.id not in again
            else replace(news, attempts=news.attempts + 1, envelope=replace(news.envelope, redelivered=True))
            for news in self.waiting
            if news.id not in done
        ]

    async def _call(self, epoch: int) -> None:
        await trio.lowlevel.checkpoint()
        if self._failures:
            self._failures -= 1
            raise JournalUnavailable("the database is away")
        if epoch != self.epoch:
            raise LeaseLost(epoch)
