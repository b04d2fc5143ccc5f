"""The contract of statuses on Postgres, where webhooks and the sender put them."""

# ruff: noqa: ASYNC110 - tables send no events

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from itertools import count

import pytest
import trio
from journal_contract import NUMBER, body
from postgres_kit import Database, ManualClock, database, database_dsn, server
from statuses_contract import CONTRACT, World, told

from actors.messages import OutboundMessage, Refused, SendRecord, Sent
from router.postgres.outbox import PostgresOutbox
from router.postgres.statuses import PostgresStatuses
from router.simulator import payloads

__all__ = ["database", "database_dsn", "server"]

pytestmark = pytest.mark.postgres


class Place:
    """A queue, with what sends and what is told of it."""

    def __init__(self, database: Database, clock: ManualClock, epoch: int) -> None:
        self.clock = clock
        self.epoch = epoch
        self.statuses = PostgresStatuses(database.bridge, lambda: database.dsn, clock=clock)
        self.outbox = PostgresOutbox(database.bridge, lambda: database.dsn, clock=clock)
        self._database = database
        self._keys = map(str, count(1))

    async def queued(self, service: str) -> int:
        """The row of a message that is not sent yet."""
        row = await self.outbox.send(
            service,
            key=next(self._keys),
            request_sha256=b"1",
            number=NUMBER,
            recipient="25078800001",
            payload='{"type": "text"}',
            correlation_id="c",
        )
        return int(row["id"])

    async def put_on_record(self, identity: int, outcome: Sent | Refused) -> None:
        message = OutboundMessage(
            id=identity,
            session_key=f"{NUMBER}:25078800001",
            phone_number_id=NUMBER,
            recipient="25078800001",
            message={},
            reference=f"rpl_{identity}",
            correlation_id="c",
            created_at=self.clock.now,
        )
        await self.outbox.record([SendRecord(message=message, outcome=outcome)], epoch=self.epoch)

    async def sent(self, service: str) -> str:
        identity = await self.queued(service)
        await self.put_on_record(identity, Sent(f"wamid.{identity}"))
        return f"rpl_{identity}"

    async def happened(self, message: str, status: str) -> None:
        name = f"wamid.{message.removeprefix('rpl_')}"
        async with self._database.journal(clock=self.clock) as journal:
            said = payloads.status(name, status, 1893456000, "25078800001")
            delivery = body(statuses=(said,))
            await journal.append([delivery], duplicates=0)

    async def close(self) -> None:
        await self.statuses.close()
        await self.outbox.close()


@pytest.fixture
async def place(database: Database) -> AsyncIterator[Place]:
    place = Place(database, ManualClock(2030, 1, 1), await database.take_epoch())
    try:
        yield place
    finally:
        with trio.CancelScope(shield=True):
            await place.close()


@pytest.mark.parametrize("law", CONTRACT, ids=lambda law: law.__name__)
async def test_contract(law: Callable[[World], Awaitable[None]], place: Place, database: Database) -> None:
    def wait(seconds: float) -> None:
        place.clock.now += timedelta(seconds=seconds)

    async def end_epoch() -> None:
        await database.take_epoch()

    await law(World(place.statuses, place.epoch, place.sent, place.happened, wait, end_epoch))


async def test_a_status_that_comes_before_its_message_is_on_record_is_told(place: Place) -> None:
    await place.statuses.subscribe(["rides"], epoch=place.epoch)
    identity = await place.queued("rides")
    await place.happened(f"rpl_{identity}", "delivered")
    assert (await place.statuses.due("rides", 10)).news == []
    await place.put_on_record(identity, Sent(f"wamid.{identity}"))
    assert told(await place.statuses.due("rides", 10)) == [(f"rpl_{identity}", "delivered")]


async def test_what_the_channel_refused_is_told_with_its_reason(place: Place) -> None:
    await place.statuses.subscribe(["rides"], epoch=place.epoch)
    identity = await place.queued("rides")
    await place.put_on_record(identity, Refused("answered 400, error 131026"))
    [news] = (await place.statuses.due("rides", 10)).news
    assert news.envelope.message["status"] == {
        "id": f"rpl_{identity}",
        "message_id": None,
        "status": "failed",
        "timestamp": None,
        "recipient": "25078800001",
        "error": "answered 400, error 131026",
    }


async def test_with_its_message_goes_what_is_still_to_be_told(place: Place, database: Database) -> None:
    await place.statuses.subscribe(["rides"], epoch=place.epoch)
    message = await place.sent("rides")
    await place.happened(message, "delivered")
    await database.fetch("DELETE FROM whatsapp_outbox")
    assert await database.fetch("SELECT 1 FROM status_deliveries") == []


async def test_a_session_that_was_put_there_by_hand_stops_nobody(place: Place, database: Database) -> None:
    await place.statuses.subscribe(["rides"], epoch=place.epoch)
    message = await place.sent("rides")
    await place.happened(message, "delivered")
    await database.fetch(
        "INSERT INTO user_sessions (session_key, phone_number_id, state, version, last_interaction, "
        "created_at) VALUES ($1, '100', '[7]', 3, $2, $2)",
        f"{NUMBER}:25078800001",
        place.clock.now,
    )
    [news] = (await place.statuses.due("rides", 10)).news
    assert (news.envelope.session.state, news.envelope.session.version) == ({}, 3)


_STATUS = """
INSERT INTO whatsapp_statuses (phone_number_id, message_id, status, rank, recorded_at)
VALUES ($1, $2, 'delivered', 3, $3)
"""
_WAITS = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"


async def test_a_status_and_its_message_at_the_same_moment(place: Place, database: Database) -> None:
    """The status is in a transaction that goes on when the sending is put on record."""
    await place.statuses.subscribe(["rides"], epoch=place.epoch)
    identity = await place.queued("rides")

    async with database.connection() as other:
        await database.bridge.run(lambda: other.execute("BEGIN"))
        await database.bridge.run(
            lambda: other.execute(_STATUS, NUMBER, f"wamid.{identity}", place.clock.now)
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(place.put_on_record, identity, Sent(f"wamid.{identity}"))
            with trio.fail_after(20):
                while not await database.value(_WAITS):
                    await trio.sleep(0.01)
            await database.bridge.run(lambda: other.execute("COMMIT"))
    assert told(await place.statuses.due("rides", 10)) == [(f"rpl_{identity}", "delivered")]
