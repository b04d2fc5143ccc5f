"""Migrations on real databases: applied once, by one, and refused where they do not fit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import trio
from contracts.journal_contract import body, done, message
from journal_kit import appended, assert_conserved
from postgres_kit import Database, PostgresServer, open_test_database, server
from tables import each

from actors.errors import JournalUnavailable
from router.database import in_schema, migrate_database, pending_migrations
from router.postgres.migrate import Migration, MigrationError, migrate, shipped_migrations

__all__ = ["server"]

pytestmark = pytest.mark.postgres

NAMES = [f"{one.version:04}_{one.name}" for one in shipped_migrations()]


@pytest.fixture
def empty_dsn(server: PostgresServer) -> str:
    return server.create_database(migrated=False)


@pytest.fixture
async def empty(empty_dsn: str) -> AsyncIterator[Database]:
    async with open_test_database(empty_dsn) as database:
        yield database


async def migrated(database: Database, migrations: list[Migration]) -> list[str]:
    async with database.connection() as connection:
        done = await database.bridge.run(lambda: migrate(connection, migrations))
        return [one.name for one in done]


async def test_all_are_applied_once(empty: Database) -> None:
    assert await migrate_database(empty.bridge, empty.dsn, apply=True) == NAMES
    assert await migrate_database(empty.bridge, empty.dsn, apply=True) == []
    assert await migrate_database(empty.bridge, empty.dsn, apply=False) == []
    assert await empty.value("SELECT count(*) FROM postroom_migrations") == len(NAMES)


async def test_only_looked_at_an_empty_database_is_refused_and_left_empty(empty: Database) -> None:
    with pytest.raises(MigrationError, match=r"lacks \d+ migration.*postroom migrate"):
        await migrate_database(empty.bridge, empty.dsn, apply=False)
    assert await empty.value("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0


async def test_two_migrators_at_once(empty: Database) -> None:
    applied: list[list[str]] = []

    async def one() -> None:
        applied.append(await migrate_database(empty.bridge, empty.dsn, apply=True))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(one)
    assert sorted(applied) == [[], [], NAMES]


@pytest.mark.parametrize("apply", [True, False])
async def test_a_changed_migration_is_refused(empty: Database, apply: bool) -> None:
    await migrate_database(empty.bridge, empty.dsn, apply=True)
    await empty.fetch("UPDATE postroom_migrations SET checksum = 'another' WHERE version = 1")
    with pytest.raises(MigrationError, match=r"0001_journal was changed after it was applied"):
        await migrate_database(empty.bridge, empty.dsn, apply=apply)


@pytest.mark.parametrize("apply", [True, False])
async def test_a_newer_schema_is_refused(empty: Database, apply: bool) -> None:
    await migrate_database(empty.bridge, empty.dsn, apply=True)
    await empty.fetch("INSERT INTO postroom_migrations VALUES (99, 'later', 'x')")
    with pytest.raises(MigrationError, match="at schema 99"):
        await migrate_database(empty.bridge, empty.dsn, apply=apply)


@pytest.mark.parametrize("apply", [True, False])
async def test_tables_that_are_not_ours_are_refused_and_left_alone(empty: Database, apply: bool) -> None:
    await empty.fetch("CREATE TABLE user_sessions (mine text)")
    with pytest.raises(MigrationError, match=r"not Postroom's: user_sessions"):
        await migrate_database(empty.bridge, empty.dsn, apply=apply)
    assert await empty.value("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 1


async def test_one_that_fails_is_rolled_back_and_those_before_it_stay(empty: Database) -> None:
    good = Migration(1, "good", "CREATE TABLE good (a int)")
    bad = Migration(2, "bad", "CREATE TABLE half (a int); SELECT 1 / 0")
    with pytest.raises(MigrationError, match="0002_bad failed and was rolled back"):
        await migrated(empty, [good, bad])
    assert await empty.value("SELECT to_regclass('good') IS NOT NULL AND to_regclass('half') IS NULL")
    assert await migrated(empty, [good, replace(bad, sql="CREATE TABLE half (a int)")]) == ["bad"]


async def test_a_database_out_of_reach(empty: Database) -> None:
    with pytest.raises(JournalUnavailable, match="cannot connect"):
        await migrate_database(empty.bridge, empty.dsn.replace("/test_", "/absent_"), apply=True)


async def test_what_would_be_applied_is_told_and_not_applied(empty: Database) -> None:
    told = await pending_migrations(empty.bridge, empty.dsn)
    assert [f"{one.version:04}_{one.name}" for one in told] == NAMES
    assert "CREATE TABLE wa_events" in told[0].sql
    assert await empty.value("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
    await migrate_database(empty.bridge, empty.dsn, apply=True)
    assert await pending_migrations(empty.bridge, empty.dsn) == []


async def test_a_schema_of_its_own_beside_tables_of_the_same_names(empty: Database) -> None:
    await empty.fetch("CREATE TABLE user_sessions (mine text)")
    dsn = in_schema(empty.dsn, "postroom")
    assert await migrate_database(empty.bridge, dsn, apply=True, schema="postroom") == NAMES
    assert await migrate_database(empty.bridge, dsn, apply=False, schema="postroom") == []
    async with open_test_database(dsn) as mine, mine.journal() as journal:
        assert (await appended(journal, body(message("a")))).first_seq == 1
        [item] = await journal.read([1])
        epoch = await mine.take_epoch()
        await journal.complete([done(item)], epoch=epoch, low_water=2, stragglers=[])
        await assert_conserved(mine)
        assert await mine.value("SELECT count(*) FROM postroom_rls_audit()") == 0
        assert await mine.value("SELECT count(*) FROM postroom.wa_events") == 1
        # With a search path that knows nothing of it.
        await empty.fetch("UPDATE cron.job SET active = false WHERE jobname = 'dlq-processor'")
        assert not await mine.value("SELECT active FROM postroom_jobs WHERE name = 'process-dlq-entries'")
    assert [
        row[0] for row in await empty.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    ] == ["user_sessions"]


@each(
    "dsn, expected",
    [
        ("postgresql://a@h/d", "postgresql://a@h/d?options=-c%20search_path%3Ds"),
        ("postgresql:///d?host=%2Fr", "postgresql:///d?host=%2Fr&options=-c%20search_path%3Ds"),
        (
            "postgresql://a@h/d?options=-c%20jit%3Doff&x=1",
            "postgresql://a@h/d?x=1&options=-c%20jit%3Doff%20-c%20search_path%3Ds",
        ),
        (
            "postgresql://a@/d?host=%2Ftmp%2Fx&port=5432",
            "postgresql://a@/d?host=%2Ftmp%2Fx&port=5432&options=-c%20search_path%3Ds",
        ),
    ],
)
def test_a_connection_string_with_a_schema(dsn: str, expected: str) -> None:
    assert in_schema(dsn, "s") == expected
    assert in_schema(dsn, None) == dsn
