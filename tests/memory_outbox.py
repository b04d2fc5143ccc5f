"""The in-memory double of the outbox, which passes the same contract suite as the real one, and a network of
phones that a sender sends into.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import trio

from actors.errors import JournalUnavailable, LeaseLost
from actors.messages import OutboundMessage, Refused, SendOutcome, SendRecord, Sent, Unsent
from actors.ports import Sender


@dataclass
class _Row:
    message: OutboundMessage
    status: str = "pending"
    due: datetime | None = None
    message_id: str | None = None
    error: str | None = None


class MemoryOutbox:
    """`fail(n)`: the next n calls find it away. `before` may delay a call."""

    def __init__(self, *, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self.epoch = 1
        self.rows: list[_Row] = []
        self.before: Callable[[str], Awaitable[None]] | None = None
        self._failures = 0

    def fail(self, calls: int) -> None:
        self._failures = calls

    def put(self, key: str, *texts: str) -> None:
        """Replies of a conversation, as a completion commits them."""
        for text in texts:
            identity = len(self.rows) + 1
            self.rows.append(
                _Row(
                    OutboundMessage(
                        id=identity,
                        session_key=key,
                        phone_number_id="100",
                        recipient=key.rpartition(":")[2],
                        message={"type": "text", "text": {"body": text}},
                        reference=f"rpl_{identity}",
                        correlation_id="c",
                        created_at=self._clock(),
                    )
                )
            )

    def in_status(self, status: str) -> list[str]:
        return [row.message.message["text"]["body"] for row in self.rows if row.status == status]

    async def _enter(self, method: str) -> None:
        if self.before is not None:
            await self.before(method)
        await trio.lowlevel.checkpoint()
        if self._failures:
            self._failures -= 1
            raise JournalUnavailable(method)

    async def unsent(self, *, conversations: int, of_each: int, busy: Sequence[str]) -> Unsent:
        await self._enter("unsent")
        now = self._clock()
        of: dict[str, list[_Row]] = {}
        for row in self.rows:
            if row.status == "pending":
                of.setdefault(row.message.session_key, []).append(row)
        chosen = [
            rows
            for key, rows in of.items()
            if key not in busy and (rows[0].due is None or rows[0].due <= now)
        ][:conversations]
        found = sorted((row.message for rows in chosen for row in rows[:of_each]), key=lambda one: one.id)
        later = [row.due for rows in of.values() for row in rows if row.due is not None and row.due > now]
        return Unsent(found, (min(later) - now).total_seconds() if later else None)

    async def record(self, records: Sequence[SendRecord], *, epoch: int) -> None:
        await self._enter("record")
        if epoch != self.epoch:
            raise LeaseLost(f"epoch {epoch} is over")
        for record in records:
            row = self.rows[record.message.id - 1]
            if row.status != "pending":
                continue
            row.message = replace(row.message, attempts=row.message.attempts + 1)
            if isinstance(record.outcome, Sent):
                row.status, row.message_id = "sent", record.outcome.message_id
            elif isinstance(record.outcome, Refused):
                row.status, row.error = "failed", record.outcome.reason
            else:
                row.error = record.outcome.reason
                row.due = self._clock() + timedelta(seconds=record.retry_in or 0.0)


@dataclass
class PhoneNetwork:
    """Takes what is sent, each after `takes` seconds; `answers` are given first, one for each attempt.
    `taken` has (recipient, text) in the order of arrival, `at_once` how many were on their way together.
    """

    takes: float = 0.0
    answers: deque[SendOutcome | BaseException] = field(default_factory=deque)
    hangs_on: set[str] = field(default_factory=set)
    attempts: list[str] = field(default_factory=list)
    taken: list[tuple[str, str]] = field(default_factory=list)
    at_once: int = 0
    _under_way: int = 0

    @asynccontextmanager
    async def lane(self) -> AsyncIterator[Sender]:
        yield self

    async def send(self, message: OutboundMessage) -> SendOutcome:
        text = message.message["text"]["body"]
        self.attempts.append(text)
        self._under_way += 1
        self.at_once = max(self.at_once, self._under_way)
        try:
            if text in self.hangs_on:
                await trio.sleep_forever()
            await trio.sleep(self.takes)
        finally:
            self._under_way -= 1
        answer = self.answers.popleft() if self.answers else Sent(f"wamid.{message.id}")
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, Sent):
            self.taken.append((message.recipient, text))
        return answer

    def to(self, recipient: str) -> list[str]:
        return [text for whom, text in self.taken if whom == recipient]
