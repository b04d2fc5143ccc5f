"""The outbox on Postgres: replies that wait for a sender, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from actors.messages import OutboundMessage, Refused, SendRecord, Sent, Unsent
from actors.ports import Clock
from router.json_text import parse

from .bridge import Bridge
from .connections import BY_KEY, Line
from .errors import translated
from .rows import reference_of, text
from .statements import statements

_SQL = statements("outbox")


class PostgresOutbox:
    """One per process, on a connection of its own, and one for services that send: neither waits for the
    other.
    """

    def __init__(self, bridge: Bridge, dsn: Callable[[], str], *, clock: Clock) -> None:
        self._bridge = bridge
        self._clock = clock
        self._line = Line(dsn, "outbox", settings=BY_KEY)
        self._services_line = Line(dsn, "sending", settings=BY_KEY)

    async def close(self) -> None:
        async def close() -> None:
            await self._line.close()
            await self._services_line.close()

        await self._bridge.run(close)

    async def unsent(self, *, conversations: int, of_each: int, busy: Sequence[str]) -> Unsent:
        now = self._clock()
        rows = await self._fetch("unsent", now, conversations, of_each, list(busy))
        due: datetime | None = None
        if len({row["session_key"] for row in rows}) < conversations:  # else there may be more to send now
            due = (await self._fetch("next_due", now))[0][0]
        next_in = None if due is None else (due - now).total_seconds()
        return Unsent([_message(row) for row in rows], next_in)

    async def record(self, records: Sequence[SendRecord], *, epoch: int) -> None:
        now = self._clock()
        columns = [
            list(column) for column in zip(*(_columns(record, now) for record in records), strict=True)
        ]
        await self._fetch("record", epoch, now, *columns)

    async def send(
        self,
        service: str,
        *,
        key: str,
        request_sha256: bytes,
        number: str,
        recipient: str,
        payload: str,
        correlation_id: str,
    ) -> Any:
        """Put a message there, or find the one with that key: id, created, is_same, status."""
        now = self._clock()
        arguments = (now, service, key, request_sha256, number, recipient, payload, correlation_id)
        return (await self._fetch("send", *arguments, line=self._services_line))[0]

    async def sent(self, service: str, identity: int) -> Any | None:
        """A message of that service: status, message_id, error_message, furthest (the status from the
        channel).
        """
        rows = await self._fetch("sent", service, identity, line=self._services_line)
        return rows[0] if rows else None

    async def _fetch(self, name: str, *arguments: Any, line: Line | None = None) -> list[Any]:
        used = self._line if line is None else line

        async def fetch() -> list[Any]:
            with translated(name):
                return await used.fetch(_SQL[name], *arguments)

        return await self._bridge.run(fetch)


def _message(row: Any) -> OutboundMessage:
    """What somebody put there by hand and that cannot be read is empty, and the channel refuses it."""
    payload = None
    with suppress(ValueError):
        payload = parse(row["payload"].encode())
    return OutboundMessage(
        id=row["id"],
        session_key=row["session_key"],
        phone_number_id=row["phone_number_id"],
        recipient=row["recipient"] or "",
        message=payload if isinstance(payload, dict) else {},
        reference=reference_of(row["id"]),
        correlation_id=row["correlation_id"],
        created_at=row["created_at"],
        attempts=row["attempts"],
    )


def _columns(record: SendRecord, now: datetime) -> tuple[Any, ...]:
    """postroom_record_sent's columns: id, status, message id, error, next attempt."""
    identity, outcome = record.message.id, record.outcome
    if isinstance(outcome, Sent):
        return identity, "sent", text(outcome.message_id) or None, None, None
    if isinstance(outcome, Refused):
        return identity, "failed", None, text(outcome.reason), None
    due = now + timedelta(seconds=record.retry_in or 0.0)
    return identity, "pending", None, text(outcome.reason), due
