"""A real Postgres for tests: one embedded server for each module, a fresh migrated database for each test.

Modules import the fixtures by name and are marked `postgres`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest
import trio

from router.clock import utc_now
from router.database import migrate_database
from router.postgres.bridge import Bridge, open_bridge
from router.postgres.connections import connect
from router.postgres.embedded import EmbeddedPostgres
from router.postgres.journal import PostgresJournal

HANGS: Final = 30.0
"""Seconds after which a test that waits for something is given up. Nothing is measured with it."""


_numbers = count(1)


class PostgresServer:
    """A running server whose own database is migrated and serves as the template of others."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn

    def create_database(self, *, migrated: bool = True) -> str:
        """A database that nobody else uses; its connection string. Blocks."""
        name = f"test_{os.getpid()}_{next(_numbers)}"
        template = "postroom" if migrated else "template1"
        asyncio.run(_execute(self.dsn_of("postgres"), f"CREATE DATABASE {name} TEMPLATE {template}"))
        return self.dsn_of(name)

    def dsn_of(self, database: str) -> str:
        return self.dsn.replace("/postroom?", f"/{database}?")


async def _execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def _migrate(dsn: str) -> None:
    async with open_bridge() as bridge:
        await migrate_database(bridge, dsn, apply=True)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """One server for all tests of the module; that of POSTROOM_TEST_DSN, if it is set, is not stopped."""
    if dsn := os.environ.get("POSTROOM_TEST_DSN"):
        trio.run(_migrate, dsn)
        yield PostgresServer(dsn)
        return
    # Not pytest's own directory: Postgres runs as another user when we are root, and could not enter it.
    home = Path(tempfile.mkdtemp(prefix="postroom-test-", dir="/tmp"))
    home.chmod(0o755)
    postgres = EmbeddedPostgres(home / "data")
    try:
        info = trio.run(postgres.start)
        trio.run(_migrate, info.dsn)
        yield PostgresServer(info.dsn)
        # Nobody wants its data: an immediate shutdown writes none of it out.
        os.kill(info.pid, signal.SIGQUIT)
    finally:
        trio.run(postgres.stop)
        shutil.rmtree(home, ignore_errors=True)


class Database:
    """One test's database: journals on it, and statements as an operator gives them."""

    def __init__(self, bridge: Bridge, dsn: str) -> None:
        self.bridge = bridge
        self.dsn = dsn

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        """Rows of one statement, over a connection of its own."""

        async def work() -> list[Any]:
            connection = await connect(self.dsn, name="test", role=None)
            try:
                rows: list[Any] = await connection.fetch(statement, *arguments)
                return rows
            finally:
                await connection.close()

        return await self.bridge.run(work)

    async def value(self, statement: str, *arguments: Any) -> Any:
        """The first column of the first row."""
        return (await self.fetch(statement, *arguments))[0][0]

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """An open connection; use it inside `bridge.run`."""
        opened = await self.bridge.run(lambda: connect(self.dsn, name="test", role=None))
        try:
            yield opened
        finally:
            with trio.CancelScope(shield=True):
                await self.bridge.run(opened.close)

    @asynccontextmanager
    async def journal(
        self,
        *,
        clock: Callable[[], datetime] = utc_now,
        notify: bool = False,
        sends: bool = False,
        on_homeless: Callable[[datetime], None] = lambda moment: None,
    ) -> AsyncIterator[PostgresJournal]:
        """A journal as one process has it, with its partitions made."""
        journal = PostgresJournal(
            self.bridge,
            lambda: self.dsn,
            clock=clock,
            notify=lambda: notify,
            sends=sends,
            on_homeless=on_homeless,
        )
        try:
            await journal.keep_house()
            yield journal
        finally:
            with trio.CancelScope(shield=True):
                await journal.close()

    async def take_epoch(self) -> int:
        """The next epoch comes into force; nobody renews it."""
        epoch: int = await self.value("SELECT postroom_take_lease(gen_random_uuid(), '1 hour', true)")
        return epoch


@asynccontextmanager
async def open_test_database(dsn: str) -> AsyncIterator[Database]:
    with trio.fail_after(HANGS):
        async with open_bridge() as bridge:
            yield Database(bridge, dsn)


@pytest.fixture
def database_dsn(server: PostgresServer) -> str:
    """The connection string of a fresh migrated database."""
    return server.create_database()


@pytest.fixture
async def database(database_dsn: str) -> AsyncIterator[Database]:
    """A fresh migrated database with a storage thread."""
    async with open_test_database(database_dsn) as database:
        yield database


class ManualClock:
    """A clock that tests move."""

    def __init__(self, year: int, month: int, day: int) -> None:
        self.now = datetime(year, month, day, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now
