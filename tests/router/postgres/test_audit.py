"""The audit log on a real Postgres: nobody changes it; what is watched is in it, without anybody's name."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
from postgres_kit import Database, database, database_dsn, server
from tables import each

__all__ = ["database", "database_dsn", "server"]

pytestmark = pytest.mark.postgres

ROLES = ("postroom", "router_owner", "router_service", "router_admin", "router_reader")
NUMBER = "250788000001"


async def run(database: Database, *statements: str, role: str = "postroom", **settings: str) -> None:
    """Statements of one transaction, as a role, with settings of the session."""

    async def work() -> None:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL ROLE {role}")
            for name, value in settings.items():
                await connection.execute("SELECT set_config($1, $2, true)", f"postroom.{name}", value)
            for statement in statements:
                await connection.execute(statement)

    async with database.connection() as connection:
        await database.bridge.run(work)


async def log(database: Database, table: str = "t") -> list[Any]:
    return await database.fetch("SELECT * FROM audit_log WHERE object_type = $1 ORDER BY id", table)


@each("role", ROLES)
@each(
    "change",
    [
        "UPDATE audit_log SET actor = 'nobody'",
        "DELETE FROM audit_log",
        "TRUNCATE audit_log",
        "DELETE FROM audit_log WHERE false",
        "INSERT INTO audit_log (id, actor, action, object_type, object_id) OVERRIDING SYSTEM VALUE "
        "VALUES (1, 'a', 'a', 'a', 'a') ON CONFLICT (id) DO UPDATE SET actor = 'nobody'",
        "SET session_replication_role = replica; DELETE FROM audit_log",
    ],
)
async def test_nobody_changes_it(database: Database, role: str, change: str) -> None:
    await database.fetch("SELECT postroom_switch_job($1, 'me', 'session-cleanup', false)", datetime.now(UTC))
    before = await database.fetch("SELECT * FROM audit_log ORDER BY id")
    assert before
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await run(database, change, role=role)
    assert await database.fetch("SELECT * FROM audit_log ORDER BY id") == before


async def test_what_happens_to_a_watched_table(database: Database) -> None:
    await run(
        database,
        "CREATE TABLE t (id bigint PRIMARY KEY, amount numeric, note text)",
        "SELECT postroom_audit('t', '{note}')",
        role="router_owner",
    )
    await run(
        database,
        "INSERT INTO t SELECT n, 0, 'a' FROM generate_series(1, 3) n",
        "UPDATE t SET amount = id, note = 'b' WHERE id > 1",
        "UPDATE t SET note = 'c'",
        "UPDATE t SET amount = amount",
        "DELETE FROM t WHERE id = 3",
        "DELETE FROM t WHERE id = 99",
        actor="ann",
        session="s-1",
        correlation_id="c-1",
        ip="10.1.2.3",
        user_agent="curl",
    )
    rows = await log(database)
    assert [(row["action"], row["object_id"], row["changed"]) for row in rows] == [
        *(("insert", f"{n}", ["amount", "id", "note"]) for n in (1, 2, 3)),
        *(("update", f"{n}", ["amount", "note"]) for n in (2, 3)),
        ("delete", "3", ["amount", "id", "note"]),
    ]
    assert {
        (row["actor"], row["session"], row["correlation_id"], str(row["ip"]), row["user_agent"])
        for row in rows
    } == {("ann", "s-1", "c-1", "10.1.2.3", "curl")}


async def test_columns_may_have_any_name(database: Database) -> None:
    await run(
        database,
        "CREATE TABLE t (n bigint PRIMARY KEY, o text, e text, was jsonb, is_now jsonb, keys text, "
        "new_rows text)",
        "SELECT postroom_audit('t')",
        role="router_owner",
    )
    await run(database, "INSERT INTO t VALUES (1)", "UPDATE t SET o = 'b', was = '1'", "DELETE FROM t")
    assert [(row["action"], row["object_id"], row["changed"]) for row in await log(database)] == [
        ("insert", "1", ["e", "is_now", "keys", "n", "new_rows", "o", "was"]),
        ("update", "1", ["o", "was"]),
        ("delete", "1", ["e", "is_now", "keys", "n", "new_rows", "o", "was"]),
    ]


async def test_a_row_that_takes_another_key(database: Database) -> None:
    await run(
        database,
        "CREATE TABLE t (a int, b uuid, PRIMARY KEY (a, b))",
        "SELECT postroom_audit('t')",
        "INSERT INTO t VALUES (1, '00000000-0000-0000-0000-000000000001')",
        "UPDATE t SET a = 2",
    )
    rows = await log(database)
    assert sorted((row["action"], row["object_id"].split()[0]) for row in rows) == [
        ("insert", "1"),
        ("update", "1"),
        ("update", "2"),
    ]


async def test_without_settings_it_says_who_logged_in_and_as_what(database: Database) -> None:
    await run(
        database, "UPDATE system_settings SET value = '9' WHERE name = 'run_log_days'", role="router_admin"
    )
    [row] = await log(database, "system_settings")
    assert (row["actor"], row["changed"], row["ip"]) == ("postroom/router_admin", ["value"], None)


@each("ip", ["", "nonsense", "1.2.3.4.5", "::1, 10.0.0.1"])
async def test_an_address_that_is_none_costs_no_statement(database: Database, ip: str) -> None:
    await run(database, "UPDATE cron.job SET active = NOT active WHERE jobname = 'dlq-report'", ip=ip)
    assert (await log(database, "postroom_jobs"))[-1]["ip"] is None


async def test_who_may_write_the_table_may_not_write_the_log(database: Database) -> None:
    await run(
        database,
        "CREATE TABLE t (id int PRIMARY KEY)",
        "SELECT postroom_audit('t')",
        "GRANT INSERT ON t TO router_reader",
    )
    await run(database, "INSERT INTO t VALUES (1)", role="router_reader")
    assert len(await log(database)) == 1
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await run(
            database,
            "INSERT INTO audit_log (actor, action, object_type, object_id) VALUES ('a', 'b', 'c', 'd')",
            role="router_reader",
        )


async def test_nobodys_name_is_in_it(database: Database) -> None:
    """A key that may be a person's stands there as a hash, by which whoever has the name finds it."""
    await run(
        database,
        "CREATE TABLE t (phone text PRIMARY KEY, name text)",
        "SELECT postroom_audit('t')",
        f"INSERT INTO t VALUES ('{NUMBER}', 'Ann')",
        f"UPDATE t SET name = 'Bea' WHERE phone = '{NUMBER}'",
    )
    dumped = "".join(str(dict(row)) for row in await log(database))
    assert NUMBER not in dumped
    assert "Ann" not in dumped
    known = await database.value("SELECT postroom_subject_hash($1)", NUMBER)
    assert {row["object_id"] for row in await log(database)} == {known}
    assert len(known) == 64


async def test_a_table_without_a_key_is_refused(database: Database) -> None:
    with pytest.raises(asyncpg.RaiseError, match="t has no primary key"):
        await run(database, "CREATE TABLE t (n int)", "SELECT postroom_audit('t')")


async def test_it_can_be_watched_no_more(database: Database) -> None:
    await run(
        database,
        "CREATE TABLE t (id int PRIMARY KEY)",
        "SELECT postroom_audit('t')",
        "SELECT postroom_audit('t')",
        "INSERT INTO t VALUES (1)",
        "SELECT postroom_stop_audit('t')",
        "INSERT INTO t VALUES (2)",
    )
    assert len(await log(database)) == 1


async def test_tables_that_come_later_are_watched(database: Database) -> None:
    await run(
        database,
        "CREATE TABLE payments (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), amount numeric)",
        "CREATE TABLE wallet_accounts (id bigint PRIMARY KEY)",
        "CREATE TABLE walletXaccounts (id bigint PRIMARY KEY)",
        "CREATE TABLE refunds (note text)",
        "ALTER TABLE payments OWNER TO router_owner",
        "ALTER TABLE refunds OWNER TO router_owner",
    )
    async with database.connection() as connection:

        async def attach() -> Any:
            await connection.execute("SET ROLE router_owner")
            return await connection.fetchrow("SELECT * FROM postroom_attach_audit()")

        row = await database.bridge.run(attach)
        assert row["attached"] == ["payments"]
        assert [problem.split(":")[0] for problem in row["problems"]] == ["refunds", "wallet_accounts"]
        again = await database.bridge.run(attach)
        assert again["attached"] == []
    await run(database, "INSERT INTO payments (amount) VALUES (5)")
    assert [entry["action"] for entry in await log(database, "payments")] == ["insert"]


async def test_jobs_are_done_without_a_word(database: Database) -> None:
    """What the janitor notes for itself is not worth a row."""
    await run(database, "UPDATE postroom_jobs SET followed_to = '2026-01-01', requested_at = '2026-01-01'")
    assert await log(database, "postroom_jobs") == []
