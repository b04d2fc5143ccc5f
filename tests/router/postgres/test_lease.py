"""The owner's lease on Postgres: taken, renewed, run out, given up, lost with its session, fenced."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from contracts.journal_contract import body, done, message
from postgres_kit import Database, database, database_dsn, server

from actors.errors import LeaseLost
from actors.messages import Appended
from router.postgres.lease import PostgresLease

__all__ = ["database", "database_dsn", "server"]

pytestmark = pytest.mark.postgres

# The database session that holds the hint.
END_HOLDERS_SESSION = """
SELECT pg_terminate_backend(pid) FROM pg_locks
 WHERE locktype = 'advisory' AND classid = 7305 AND objid = 4 AND granted
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
RUN_OUT = "UPDATE leases SET expires_at = clock_timestamp() - interval '1 second'"


@asynccontextmanager
async def open_lease(database: Database) -> AsyncIterator[PostgresLease]:
    lease = PostgresLease(
        database.bridge,
        lambda: database.dsn,
        on_journal=lambda: None,
        on_dead_letters=lambda: None,
        on_jobs=lambda: None,
        on_erasures=lambda: None,
        on_services=lambda: None,
        on_outbox=lambda: None,
        on_statuses=lambda: None,
    )
    try:
        yield lease
    finally:
        with trio.CancelScope(shield=True):
            await lease.close()


async def take(database: Database, *, vacant: bool = False) -> int | None:
    """As another process asks for it."""
    epoch: int | None = await database.value(
        "SELECT postroom_take_lease($1, interval '5 s', $2)", uuid.uuid4(), vacant
    )
    return epoch


async def test_one_holds_it(database: Database) -> None:
    async with open_lease(database) as lease:
        assert not lease.held()
        assert await lease.acquire() == 1
        assert lease.held()
        assert await take(database) is None
        assert await database.value("SELECT postroom_renew_lease(1, '5 s')") is True


async def test_given_up_it_is_taken_at_once(database: Database) -> None:
    async with open_lease(database) as one, open_lease(database) as two:
        epoch = await one.acquire()
        await one.end(epoch)
        assert not one.held()
        assert await two.acquire() == epoch + 1


async def test_run_out_it_is_taken_and_the_old_epoch_renews_nothing(database: Database) -> None:
    async with open_lease(database) as lease:
        epoch = await lease.acquire()
        await database.fetch(RUN_OUT)
        assert await take(database) == epoch + 1
        before = await database.value("SELECT expires_at FROM leases")
        assert await database.value("SELECT postroom_renew_lease($1, '1 hour')", epoch) is False
        await database.fetch("SELECT postroom_end_lease($1)", epoch)
        assert await database.value("SELECT expires_at FROM leases") == before
        await lease.hold(epoch)
        assert not lease.held()


async def test_run_out_but_wanted_by_nobody_it_goes_on(database: Database) -> None:
    async with open_lease(database) as lease:
        epoch = await lease.acquire()
        await database.fetch(RUN_OUT)
        assert await database.value("SELECT postroom_renew_lease($1, '5 s')", epoch) is True
        assert await take(database) is None


async def test_a_holder_whose_session_ended_is_succeeded_at_once(database: Database) -> None:
    async with open_lease(database) as one, open_lease(database) as two:
        epoch = await one.acquire()
        assert [row[0] for row in await database.fetch(END_HOLDERS_SESSION)] == [True]
        while one.held():
            await trio.lowlevel.checkpoint()
        assert await two.acquire() == epoch + 1


async def test_of_a_holder_that_never_had_the_session_lock_it_says_nothing(database: Database) -> None:
    """As after one that stood still: it comes back and gives its lock up, while its successor delivers."""
    epoch = await take(database)
    assert await take(database, vacant=True) is None
    assert await database.value("SELECT postroom_renew_lease($1, '5 s', true)", epoch) is True
    assert await take(database, vacant=True) == 2


async def test_an_old_epoch_completes_and_claims_nothing(database: Database) -> None:
    async with database.journal() as journal:
        result = await journal.append([body(message("a"))], duplicates=0)
        assert isinstance(result, Appended)
        [item] = await journal.read([result.first_seq])
        old = await take(database, vacant=True)
        assert old is not None
        new = await take(database, vacant=True)
        assert new == old + 1
        with pytest.raises(LeaseLost):
            await journal.complete([done(item)], epoch=old, low_water=2, stragglers=[])
        with pytest.raises(LeaseLost):
            await journal.claim_dead_letters(old, 1, ["rides"])
        await journal.complete([done(item)], epoch=new, low_water=2, stragglers=[])
        assert (await journal.undelivered()).items == []
        assert await database.value("SELECT epoch FROM message_outcomes") == new


async def test_a_new_epoch_begins_after_the_completions_of_the_old_one(database: Database) -> None:
    """A completion under way holds the taker up; it is not cut in two."""
    await take(database, vacant=True)
    taken: list[int | None] = []
    async with database.connection() as completing:
        transaction = completing.transaction()
        await database.bridge.run(transaction.start)
        await database.bridge.run(lambda: completing.execute("SELECT postroom_require_epoch(1)"))

        async def take_over() -> None:
            taken.append(await take(database, vacant=True))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_over)
            waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            while await database.value(waiting) == 0:
                pass
            assert taken == []
            await database.bridge.run(transaction.commit)
    assert taken == [2]


async def test_who_stands_by_waits_for_no_completion(database: Database) -> None:
    """One takes long. Whoever asks for the lease would queue, and all other completions behind it."""
    await database.take_epoch()
    async with database.connection() as completing:
        transaction = completing.transaction()
        await database.bridge.run(transaction.start)
        await database.bridge.run(lambda: completing.execute("SELECT pg_advisory_xact_lock_shared(7305, 2)"))
        with trio.fail_after(5):
            taken = await database.value("SELECT postroom_take_lease(gen_random_uuid(), '1 hour', false)")
        assert taken is None
        await database.bridge.run(transaction.rollback)
