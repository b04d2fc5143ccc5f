"""Statuses that services are to be told, on Postgres. What puts them there is in
migrations/0016_statuses.sql.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from actors.messages import Envelope, Session
from actors.ports import Clock, StatusNews, StatusPage
from router.json_text import parse

from .bridge import Bridge
from .connections import BY_KEY, Line
from .errors import translated
from .rows import reference_of
from .statements import statements

_SQL = statements("statuses")


class PostgresStatuses:
    """On a connection of its own, that is made when a service wants to be told."""

    def __init__(self, bridge: Bridge, dsn: Callable[[], str], *, clock: Clock) -> None:
        self._bridge = bridge
        self._clock = clock
        self._line = Line(dsn, "statuses", settings=BY_KEY)

    async def close(self) -> None:
        await self._bridge.run(self._line.close)

    async def subscribe(self, services: Sequence[str], *, epoch: int) -> None:
        await self._fetch("subscribe", epoch, list(services))

    async def due(self, service: str, limit: int) -> StatusPage:
        now = self._clock()
        rows = await self._fetch("due", now, service, limit)
        if rows:
            return StatusPage([_news(service, row) for row in rows])
        due = (await self._fetch("next_due", service, now))[0][0]
        return StatusPage([], None if due is None else (due - now).total_seconds())

    async def record(self, done: Sequence[int], later: Sequence[tuple[int, float]], *, epoch: int) -> None:
        now = self._clock()
        again = [now + timedelta(seconds=wait) for _, wait in later]
        await self._fetch("told", epoch, list(done), [identity for identity, _ in later], again)

    async def _fetch(self, name: str, *arguments: Any) -> list[Any]:
        async def fetch() -> list[Any]:
            with translated(f"statuses: {name}"):
                return await self._line.fetch(_SQL[name], *arguments)

        return await self._bridge.run(fetch)


def _news(service: str, row: Any) -> StatusNews:
    reference = reference_of(row["outbox_id"])
    about = f"{reference} {row['message_id']} {row['status']}".encode()
    status: dict[str, Any] = {
        "id": reference,
        "message_id": row["message_id"],
        "status": row["status"],
        "timestamp": None if row["status_at"] is None else row["status_at"].isoformat(),
        "recipient": row["recipient"],
    }
    if row["error_message"] is not None:
        status["error"] = row["error_message"]
    envelope = Envelope(
        id=f"sts_{hashlib.blake2b(about, digest_size=16).hexdigest()}",
        message_id=None,
        domain=service,
        session=_session(row),
        message={"type": "status", "status": status},
        received_at=row["created_at"],
        correlation_id=row["correlation_id"],
        redelivered=row["attempts"] > 0,
    )
    return StatusNews(row["id"], envelope, row["created_at"], row["attempts"])


def _session(row: Any) -> Session:
    """As it is now; a phone that never wrote has none."""
    state = None
    with suppress(ValueError):
        state = None if row["state"] is None else parse(row["state"].encode())
    return Session(
        key=row["session_key"],
        phone_number_id=row["phone_number_id"],
        wa_id=row["wa_id"],
        user_id=row["user_id"],
        active_service=row["active_service"],
        state=state if isinstance(state, dict) else {},
        version=row["version"] or 0,
    )
