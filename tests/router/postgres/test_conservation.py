"""The recount on a real Postgres: whatever row is removed, moved or made up, it says so and names it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from contracts.journal_contract import body, done, message
from journal_kit import appended, assert_conserved, raw
from postgres_kit import Database, database, database_dsn, server

from actors.messages import DeadLetter, Place
from router.conservation import Conservation, recount

__all__ = ["database", "database_dsn", "server"]

pytestmark = pytest.mark.postgres


@pytest.fixture
async def world(database: Database) -> AsyncIterator[Database]:
    """Seqs 1 to 8: two delivered, one rejected, a dead letter, one malformed, two undelivered, of which the
    first is a straggler below the low-water mark, and a status."""
    async with database.journal() as journal:
        epoch = await database.take_epoch()
        status = {"id": "wamid.out", "status": "sent", "timestamp": "1893456000", "recipient_id": "1"}
        await appended(journal, *[body(message(name)) for name in "abcd"], raw(b"no JSON"))
        await appended(journal, body(message("e"), message("f"), statuses=(status,)))
        items = await journal.read([1, 2, 3, 4])
        rejected = DeadLetter(status="failed", resolution="rejected", error="no", retry_in=None)
        waits = DeadLetter(status="pending", resolution=None, error="down", retry_in=0.0)
        await journal.complete(
            [
                done(items[0], replies=1),
                done(items[1]),
                replace(done(items[2]), place=Place.REJECTED, dead_letter=rejected),
                replace(done(items[3]), place=Place.DEAD_LETTER, dead_letter=waits),
            ],
            epoch=epoch,
            low_water=7,
            stragglers=[6],
        )
        yield database


async def counted(database: Database) -> Conservation:
    async with database.connection() as connection:
        return await database.bridge.run(lambda: recount(connection))


async def test_everything_is_somewhere(world: Database) -> None:
    await assert_conserved(world)
    found = await counted(world)
    assert found.places == {
        "malformed": 1,
        "handled": 1,
        "delivered": 2,
        "rejected": 1,
        "dead_letter": 1,
        "deferred": 0,
        "discarded": 0,
        "erased": 0,
        "undelivered": 2,
    }
    assert found.dead_letters == {"pending": 1, "processing": 0, "failed": 1, "reprocessed": 0}
    assert found.replies["unsent"] == 1


LOST = "unfinished item that the recovery would not find"
UNLETTERED = "dead letter outcome without its dead letter"
ASTRAY = "dead letter without its outcome"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("DELETE FROM whatsapp_messages_items WHERE seq = 2", "item 2 is missing"),
        ("DELETE FROM whatsapp_messages_items WHERE seq >= 7", "items 7 to 8 are missing"),
        (
            "UPDATE whatsapp_messages_items SET seq = 1, received_at = received_at + interval '1 week' "
            "WHERE seq = 2",
            "item 2 is missing",
        ),
        ("DELETE FROM wa_events WHERE event_id = 1", "item without its event: item 1"),
        (
            "DELETE FROM message_outcomes WHERE seq = 1",
            f"{LOST}: item 1",
        ),
        ("DELETE FROM journal_stragglers", f"{LOST}: item 6"),
        (
            "UPDATE delivery_tallies SET low_water = 8",
            f"{LOST}: item 7",
        ),
        (
            "INSERT INTO message_outcomes SELECT 99, received_at, received_at, 1, 1, 'delivered' "
            "FROM message_outcomes WHERE seq = 1",
            "outcome without its item: item 99",
        ),
        (
            "INSERT INTO message_outcomes SELECT seq, received_at, received_at, 1, 1, 'delivered' "
            "FROM whatsapp_messages_items WHERE seq = 5",
            "outcome of an item that no session takes: item 5",
        ),
        (
            "UPDATE whatsapp_messages_items SET session_key = NULL WHERE seq = 7",
            "unfinished item without a session: item 7",
        ),
        ("DELETE FROM webhook_dlq WHERE seq = 4", f"{UNLETTERED}: item 4"),
        (
            "UPDATE webhook_dlq SET status = 'reprocessed' WHERE seq = 4",
            f"{ASTRAY}: item 4",
        ),
        (
            "UPDATE webhook_dlq SET resolution = 'discarded' WHERE seq = 3",
            f"{ASTRAY}: item 3",
        ),
        (
            "UPDATE webhook_dlq SET seq = 1 WHERE seq = 4",
            f"{UNLETTERED}: item 4",
        ),
        (
            "UPDATE message_outcomes SET outcome = 'handled' WHERE seq = 1",
            "delivered: the tally says 2, the tables say 1",
        ),
        ("UPDATE journal_head SET malformed = 2", "malformed: the tally says 2, the tables say 1"),
        ("UPDATE journal_head SET erased = 1", "erased: the tally says 1, the tables say 0"),
        ("UPDATE journal_head SET received = 9", "received: the tally says 9, the tables say 8"),
    ],
)
async def test_damage_is_found(world: Database, damage: str, problem: str) -> None:
    await world.fetch(damage)
    assert problem in (await counted(world)).problems
