"""What tests of the real journal share: bodies that are journaled, and the recount after it."""

from __future__ import annotations

from postgres_kit import Database

from actors.messages import Appended, Delivery
from router.channels.whatsapp import Splitter
from router.conservation import recount
from router.postgres.journal import PostgresJournal

_SPLITTER = Splitter("test", dedup_key=b"test", is_ours=lambda number: True)


def raw(text: bytes) -> Delivery:
    return _SPLITTER.delivery(text, correlation_id="c-1", traceparent=None, settle=lambda stored: None)


async def appended(journal: PostgresJournal, *deliveries: Delivery) -> Appended:
    result = await journal.append(deliveries, duplicates=0)
    assert isinstance(result, Appended)
    return result


async def assert_conserved(database: Database) -> None:
    async with database.connection() as connection:
        found = await database.bridge.run(lambda: recount(connection))
    assert found.problems == ()
