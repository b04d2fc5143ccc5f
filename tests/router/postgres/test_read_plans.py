"""What a read costs does not grow with what lies beside it: by key, in partitions of which nothing is known
yet; and by conversation, however many letters wait behind the oldest one of each.
"""

from __future__ import annotations

from datetime import UTC, datetime

import asyncpg
import pytest
from postgres_kit import Database, database, database_dsn, server

from router.postgres.connections import BY_KEY, SERVICE, connect
from router.postgres.statements import statements

__all__ = ["database", "database_dsn", "server"]

pytestmark = pytest.mark.postgres

_ROWS = 50_000
_GROW = """
WITH items AS (
    INSERT INTO whatsapp_messages_items (seq, received_at, event_id, key, kind, path, session_key)
    SELECT n, $1, n, decode(lpad(to_hex(n), 32, '0'), 'hex'), 'm', '0.0.m0', 'k' || n % 100
      FROM generate_series(1, $2::bigint) n
), events AS (
    INSERT INTO wa_events (event_id, received_at, app, correlation_id, partial, body)
    SELECT n, $1, 'default', 'c', false, '{}' FROM generate_series(1, $2::bigint) n
), outcomes AS (
    INSERT INTO message_outcomes (seq, received_at, completed_at, epoch, attempts, outcome)
    SELECT n, $1, $1, 1, 1, 'delivered' FROM generate_series(100, $2::bigint) n
), stragglers AS (
    INSERT INTO journal_stragglers SELECT generate_series(1, 99)
), head AS (
    UPDATE journal_head SET next_seq = $2::bigint + 1
)
UPDATE delivery_tallies SET low_water = $2::bigint + 1
"""


@pytest.mark.parametrize("settings", [BY_KEY, {}], ids=["by_key", "left_to_the_planner"])
async def test_no_partition_is_read_whole(database: Database, settings: dict[str, str]) -> None:
    """With the planner's own choice it would be: what is asserted here can fail."""
    async with database.journal():
        pass  # it makes the partitions

    async def plans() -> list[str]:
        connection: asyncpg.Connection = await connect(
            database.dsn, name="test", role=None, settings=settings
        )
        try:
            await connection.execute("ALTER SYSTEM SET autovacuum = off")
            await connection.execute("SELECT pg_reload_conf()")
            await connection.execute(_GROW, datetime.now(UTC), _ROWS)
            await connection.execute(f"SET ROLE {SERVICE}")
            journal = statements("journal")
            assert len(await connection.fetch(journal["undelivered"])) == 99
            lines = []
            for name, arguments in (("undelivered", ()), ("read", (list(range(1, 65)),))):
                lines += [row[0] for row in await connection.fetch(f"EXPLAIN {journal[name]}", *arguments)]
            return lines
        finally:
            await connection.execute("RESET ROLE")
            await connection.execute("ALTER SYSTEM RESET autovacuum")
            await connection.execute("SELECT pg_reload_conf()")
            await connection.close()

    lines = await database.bridge.run(plans)
    whole = [line for line in lines if "Seq Scan" in line and ("messages_y" in line or "outcomes_y" in line)]
    assert bool(whole) is not bool(settings)


_BACKLOG = """
INSERT INTO webhook_dlq (service, payload, error_message, status, resolution, next_retry_at, created_at,
                         updated_at, seq, received_at, session_key, attempts, correlation_id, keeps_order)
SELECT 'rides', '{}', 'x', 'pending', 'deferred', $1, $1, $1, n, $1, 's' || n % 20, 0, 'c', true
  FROM generate_series(1, $2::integer) n
"""
_ROWS_READ = """
SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'webhook_dlq'
"""


async def test_a_claim_costs_as_much_as_there_are_conversations(database: Database) -> None:
    epoch = await database.take_epoch()

    async def claim() -> list[tuple[str, int, int]]:
        connection: asyncpg.Connection = await connect(database.dsn, name="test", role=None)
        retrier, read = statements("retrier"), []
        now = datetime.now(UTC)
        try:
            await connection.execute(_BACKLOG, now, 20_000)
            await connection.execute(f"SET ROLE {SERVICE}")
            for name, arguments in (
                ("claim_dead_letters", (epoch, now, 16, ["rides"], False)),
                ("log_retry_run", (epoch, now, now, 0, 0, None, ["rides"])),
                ("held_pairs", ()),
            ):
                async with connection.transaction():
                    found = await connection.fetch(retrier[name], *arguments)
                    read.append((name, len(found), await connection.fetchval(_ROWS_READ)))
            return read
        finally:
            await connection.close()

    read = await database.bridge.run(claim)
    assert [found for _, found, _ in read] == [16, 1, 20]
    assert all(rows < 1_000 for _, _, rows in read), read


_READ_OF_OUTCOMES = """
SELECT coalesce(sum(seq_tup_read + idx_tup_fetch), 0)::bigint FROM pg_stat_xact_user_tables
 WHERE relname LIKE 'message_outcomes%' OR relname = 'user_sessions'
"""


async def test_a_completion_reads_nothing_but_what_it_completes(database: Database) -> None:
    """Beside a partition of which nothing is known yet, and a few thousand sessions."""
    async with database.journal():
        pass
    epoch = await database.take_epoch()
    now = datetime.now(UTC)

    async def complete() -> int:
        connection: asyncpg.Connection = await connect(database.dsn, name="test", role=None)
        try:
            await connection.execute("ALTER SYSTEM SET autovacuum = off")
            await connection.execute("SELECT pg_reload_conf()")
            await connection.execute(_GROW, now, _ROWS)
            await connection.execute(_SESSIONS, now)
            await connection.execute(f"SET ROLE {SERVICE}")
            async with connection.transaction():
                await connection.execute(
                    _COMPLETE, epoch, now, list(range(1, 65)), [f"k{n}" for n in range(64)]
                )
                read: int = await connection.fetchval(_READ_OF_OUTCOMES)
                return read
        finally:
            await connection.execute("RESET ROLE")
            await connection.execute("ALTER SYSTEM RESET autovacuum")
            await connection.execute("SELECT pg_reload_conf()")
            await connection.close()

    assert await database.bridge.run(complete) < 1_000
    assert await database.value("SELECT count(*) FROM user_sessions WHERE version = 2") == 64


_SESSIONS = """
INSERT INTO user_sessions (session_key, phone_number_id, version, last_interaction, created_at)
SELECT 'k' || n, '1', 1, $1, $1 FROM generate_series(0, 4999) n
"""
_COMPLETE = """
SELECT postroom_complete(
    $1, $2, 1, '{}',
    ARRAY(SELECT (seq, $2, 'delivered', 'rides', 'keyword', 1, false)::postroom_done
            FROM unnest($3::bigint[]) seq),
    ARRAY(SELECT (key, '1', NULL, NULL, NULL, '{}', 2)::postroom_session FROM unnest($4::text[]) key),
    '{}'::postroom_reply[], 'unsent', '{}'::postroom_letter[])
"""
