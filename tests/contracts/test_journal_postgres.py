"""The journal contract on Postgres."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from journal_contract import CONTRACT, World
from postgres_kit import Database, database, database_dsn, server

__all__ = ["database", "database_dsn", "server"]

pytestmark = pytest.mark.postgres


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async def end_epoch() -> None:
        await database.take_epoch()

    async def duplicates() -> int:
        tally: int = await database.value("SELECT duplicates FROM journal_head")
        return tally

    async def outcomes() -> int:
        stored: int = await database.value("SELECT count(*) FROM message_outcomes")
        return stored

    async def outbox() -> int:
        stored: int = await database.value("SELECT count(*) FROM whatsapp_outbox")
        return stored

    async with database.journal() as journal:
        yield World(journal, await database.take_epoch(), end_epoch, duplicates, outcomes, outbox)


@pytest.mark.parametrize("law", CONTRACT, ids=lambda law: law.__name__)
async def test_contract(law: Callable[[World], Awaitable[None]], world: World) -> None:
    await law(world)
