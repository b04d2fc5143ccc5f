"""What operators ask of the database, beside a running router or without one."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import asyncpg
import trio

from actors.errors import JournalUnavailable
from router.app import migrate_database, open_database, utc_now
from router.channels.whatsapp import Splitter
from router.config import Config
from router.conservation import Conservation, recount
from router.postgres.bridge import Bridge, open_bridge
from router.postgres.connections import connect
from router.postgres.errors import TRANSIENT, describe
from router.postgres.statements import statements

T = TypeVar("T")

_LETTERS = statements("dead_letters")
_CHECK = statements("check")
_JOURNAL = statements("journal")


class Operations:
    """One connection to the database of a configuration."""

    def __init__(self, bridge: Bridge, connection: asyncpg.Connection) -> None:
        self._bridge = bridge
        self._connection = connection

    async def _run(self, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        async def run() -> T:
            try:
                return await work(self._connection)
            except TRANSIENT as error:
                raise JournalUnavailable(describe(error)) from error

        return await self._bridge.run(run)

    async def check(self) -> Conservation:
        return await self._run(recount)

    async def dead_letters(
        self, *, status: str | None, service: str | None, limit: int
    ) -> list[dict[str, Any]]:
        """Dead letters in journal order."""
        rows = await self._run(lambda c: c.fetch(_LETTERS["list"], status, service, limit))
        return [dict(row) for row in rows]

    async def retry(self, ids: list[uuid.UUID] | None, *, service: str | None, status: str | None) -> int:
        """Ask for dead letters to be retried now, by whoever delivers; returns how many were asked for."""

        async def work(connection: asyncpg.Connection) -> int:
            rows = await connection.fetch(_LETTERS["ask_retry"], utc_now(), ids, service, status)
            await connection.execute(_LETTERS["wake"])
            return len(rows)

        return await self._run(work)

    async def became_of(self, number: str, message_id: str) -> dict[str, Any] | None:
        """Where a message is, or None when it is not known."""

        async def work(connection: asyncpg.Connection) -> Any:
            key = await connection.fetchval(_JOURNAL["dedup_key"])
            splitter = Splitter("default", dedup_key=key, is_ours=lambda _: True)
            return await connection.fetchrow(_CHECK["became_of"], splitter.message_key(number, message_id))

        row = await self._run(work)
        return None if row is None else dict(row)

    async def ended(self, number: str, message_id: str, *, within: float) -> dict[str, Any] | None:
        """Where the message ended, or where it is after `within` seconds."""
        found: dict[str, Any] | None = None
        with trio.move_on_after(within):
            while found is None or found["place"] == "journaled":
                found = await self.became_of(number, message_id)
                await trio.sleep(0.05)
        return found


@asynccontextmanager
async def open_operations(
    config: Config, *, report: Callable[[str], None] = lambda line: None, migrated: bool = True
) -> AsyncIterator[Operations]:
    """Connect; with `migrated` the schema must be up to date.

    Raises:
        EmbeddedPostgresError, MigrationError, JournalUnavailable: the database cannot be used.
    """
    async with open_database(config, report=report) as dsn, open_bridge() as bridge:
        if migrated:
            await migrate_database(bridge, dsn(), apply=config.database_url is None)

        async def open_connection() -> asyncpg.Connection:
            try:
                return await connect(dsn(), name="operator")
            except TRANSIENT as error:
                raise JournalUnavailable(f"cannot connect to the database: {describe(error)}") from error

        connection = await bridge.run(open_connection)
        try:
            yield Operations(bridge, connection)
        finally:
            with trio.move_on_after(3) as closing:
                closing.shield = True
                await bridge.run(connection.close)
