"""The outbox contract on Postgres, where completions put the replies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from itertools import count

import pytest
import trio
from journal_contract import body, done, message
from outbox_contract import CONTRACT, Row, World
from postgres_kit import Database, ManualClock, database, database_dsn, server

from actors.messages import Appended
from router.postgres.outbox import PostgresOutbox

__all__ = ["database", "database_dsn", "server"]

pytestmark = pytest.mark.postgres

_ROWS = """
SELECT payload #>> '{text,body}' AS text, status, attempts, message_id, error_message FROM whatsapp_outbox
"""


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    clock = ManualClock(2030, 1, 1)
    outbox = PostgresOutbox(database.bridge, lambda: database.dsn, clock=clock)
    epoch = await database.take_epoch()
    names = map(str, count(1))

    async with database.journal(clock=clock, sends=True) as journal:

        async def put(recipient: str, *texts: str) -> None:
            """A message of theirs is answered with these."""
            appended = await journal.append([body(message(next(names), recipient))], duplicates=0)
            assert isinstance(appended, Appended)
            [item] = await journal.read([appended.first_seq])
            replies = tuple({"type": "text", "text": {"body": text}} for text in texts)
            completion = replace(done(item), replies=replies)
            await journal.complete([completion], epoch=epoch, low_water=1, stragglers=())

        def wait(seconds: float) -> None:
            clock.now += timedelta(seconds=seconds)

        async def end_epoch() -> None:
            await database.take_epoch()

        async def rows() -> dict[str, Row]:
            return {text: Row(*rest) for text, *rest in await database.fetch(_ROWS)}

        try:
            yield World(outbox, epoch, put, wait, end_epoch, rows)
        finally:
            with trio.CancelScope(shield=True):
                await outbox.close()


@pytest.mark.parametrize("law", CONTRACT, ids=lambda law: law.__name__)
async def test_contract(law: Callable[[World], Awaitable[None]], world: World) -> None:
    await law(world)


@pytest.mark.parametrize("payload", ["[]", "7", "null", "[" * 500 + "]" * 500])
async def test_what_was_put_there_by_hand_and_is_no_message_stops_nobody(
    world: World, database: Database, payload: str
) -> None:
    await world.put("a", "a1")
    await database.fetch("UPDATE whatsapp_outbox SET payload = $1::text::jsonb", payload)
    await world.put("b", "b1")
    first, second = (await world.unsent()).messages
    assert (first.message, second.message["text"]) == ({}, {"body": "b1"})
