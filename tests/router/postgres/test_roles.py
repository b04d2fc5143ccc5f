"""Roles on a real Postgres: every cell of docs/roles.md is tried; the audit finds what is open by mistake."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from contracts.journal_contract import body, done, message
from journal_kit import appended, assert_conserved
from postgres_kit import (
    Database,
    PostgresServer,
    database,
    database_dsn,
    open_test_database,
    server,
)
from tables import each

from router.database import migrate_database
from router.postgres.migrate import MigrationError

__all__ = ["database", "database_dsn", "server"]

pytestmark = pytest.mark.postgres

ROOT = Path(__file__).parents[3]
ROLES = ("router_service", "router_admin", "router_reader")
# EXPLAIN asks for privileges and does nothing.
VERBS = {
    "SELECT": "EXPLAIN SELECT 1 FROM {}",
    "INSERT": "EXPLAIN INSERT INTO {} DEFAULT VALUES",
    "UPDATE": 'EXPLAIN UPDATE {} SET "{}" = NULL',
    "DELETE": "EXPLAIN DELETE FROM {}",
    "TRUNCATE": "TRUNCATE {}",
}


def documented() -> dict[str, dict[str, set[str]]]:
    """By table and role: the verbs of docs/roles.md."""
    page = (ROOT / "docs/roles.md").read_text(encoding="utf-8")
    head = "| table | router_service | router_admin | router_reader |"
    rows = page.split(head)[1].split("\n\n")[0].strip().splitlines()[1:]
    found = {}
    for row in rows:
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        found[name.strip("`")] = {
            role: set(re.findall(r"[A-Z]+", cell)) for role, cell in zip(ROLES, cells, strict=True)
        }
    return found


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[asyncpg.Connection]:
    async with database.journal():  # it makes partitions
        pass
    async with database.connection() as connection:
        yield connection


async def may(database: Database, connection: asyncpg.Connection, role: str, statement: str) -> bool:
    """Whether a role gets through with a statement, which is then undone."""

    async def work() -> bool:
        transaction = connection.transaction()
        await transaction.start()
        try:
            await connection.execute(f"SET LOCAL ROLE {role}")
            await connection.execute(statement)
        except asyncpg.InsufficientPrivilegeError:
            return False
        finally:
            await transaction.rollback()
        return True

    return await database.bridge.run(work)


async def test_every_table_is_in_the_page(database: Database, connection: asyncpg.Connection) -> None:
    names = await database.fetch(
        "SELECT relname::text AS name FROM pg_class WHERE relkind IN ('r', 'p') AND NOT relispartition "
        "AND relnamespace = 'public'::regnamespace"
    )
    assert {row["name"] for row in names} == set(documented())


async def test_every_cell_of_the_page(database: Database, connection: asyncpg.Connection) -> None:
    wrong = []
    for table, roles in documented().items():
        column = await database.value(
            "SELECT attname::text FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0 "
            "AND attidentity = '' ORDER BY attnum LIMIT 1",
            table,
        )
        for role, allowed in roles.items():
            for verb, statement in VERBS.items():
                if await may(database, connection, role, statement.format(table, column)) != (
                    verb in allowed
                ):
                    wrong.append(f"{role} {verb} {table}")
    assert wrong == []


@each("role", ROLES)
async def test_nobody_reaches_a_partition_by_its_name(
    database: Database, connection: asyncpg.Connection, role: str
) -> None:
    for row in await database.fetch("SELECT name FROM postroom_partitions('wa_events')"):
        for verb in ("SELECT", "INSERT", "DELETE", "TRUNCATE"):
            assert not await may(database, connection, role, VERBS[verb].format(row["name"]))


@each(
    "view, roles",
    [
        ("whatsapp_messages", ROLES),
        ("processed_webhook_messages", ROLES),
        ("postroom_runs", ROLES),
        ("cron.job", ROLES),
        ("cron.job_run_details", ROLES),
        ("wa_dead_letter_queue", ROLES[:2]),
    ],
)
async def test_who_may_read_a_view(
    database: Database, connection: asyncpg.Connection, view: str, roles: tuple[str, ...]
) -> None:
    statement = VERBS["SELECT"].format(view)
    able = tuple([role for role in ROLES if await may(database, connection, role, statement)])
    assert able == roles


async def test_an_operator_switches_jobs_and_makes_partitions(
    database: Database, connection: asyncpg.Connection
) -> None:
    for statement, roles in (
        ("UPDATE cron.job SET active = false WHERE jobname = 'session-cleanup'", {"router_admin"}),
        ("SELECT create_wa_events_partition()", {"router_service", "router_admin"}),
        ("SELECT postroom_drop_cron_views()", {"router_admin"}),
        ("CREATE TABLE mine (n int)", set()),
        ("ALTER TABLE webhook_dlq DISABLE ROW LEVEL SECURITY", set()),
    ):
        able = {role for role in ROLES if await may(database, connection, role, statement)}
        assert able == roles, statement


async def test_everything_belongs_to_the_owner(database: Database, connection: asyncpg.Connection) -> None:
    others = await database.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace IN ('public'::regnamespace, 'cron'::regnamespace) "
        "AND pg_get_userbyid(relowner) <> 'router_owner'"
        "UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace "
        "AND pg_get_userbyid(proowner) <> 'router_owner'"
    )
    assert others == []


# The audit


async def findings(database: Database) -> list[tuple[str, ...]]:
    return [
        tuple(row) for row in await database.fetch("SELECT table_name, finding FROM postroom_rls_audit()")
    ]


async def test_nothing_is_open_by_mistake(database: Database, connection: asyncpg.Connection) -> None:
    assert await findings(database) == []


@each(
    "statement, finding",
    [
        ("SELECT 1", "no row-level security"),
        ("ALTER TABLE t ENABLE ROW LEVEL SECURITY", "no policy"),
        (
            "ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON t USING (n > 1)",
            "a policy for PUBLIC",
        ),
        (
            "ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON t TO router_reader USING (true)",
            "a policy that is true for every row",
        ),
        (
            "ALTER TABLE t ENABLE ROW LEVEL SECURITY;"
            "CREATE POLICY p ON t FOR INSERT TO router_reader WITH CHECK (true)",
            "a policy that is true for every row",
        ),
        (
            "ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON t TO router_reader USING (n > 1)",
            None,
        ),
        (
            "DROP TABLE t; CREATE TABLE t PARTITION OF wa_events FOR VALUES FROM ('2001-01-01') "
            "TO ('2001-02-01'); ALTER TABLE t ENABLE ROW LEVEL SECURITY; GRANT SELECT ON t TO router_reader",
            "a partition that can be reached by its own name",
        ),
    ],
)
async def test_what_is_open_is_found(
    database: Database, connection: asyncpg.Connection, statement: str, finding: str | None
) -> None:
    async def work() -> None:
        await connection.execute("DROP TABLE IF EXISTS t; CREATE TABLE t (n int)")
        await connection.execute(statement)

    await database.bridge.run(work)
    found = [said for table, said in await findings(database) if table == "t"]
    assert set(found) <= {finding, "no row-level security"} if finding is None else finding in found
    await database.fetch("DROP TABLE t")


async def test_roles_that_are_there_are_used(database: Database) -> None:
    """Another database of the server: the roles are the server's, the privileges are the database's."""
    names = await database.fetch("SELECT rolname::text AS name FROM pg_roles WHERE rolname LIKE 'router\\_%'")
    assert {row["name"] for row in names} == {"router_owner", *ROLES}
    assert not await database.value(
        "SELECT bool_or(rolcanlogin OR rolsuper OR rolbypassrls) FROM pg_roles "
        "WHERE rolname LIKE 'router\\_%'"
    )


# A login that is no superuser


@pytest.fixture
def empty_dsn(server: PostgresServer) -> str:
    return server.create_database(migrated=False)


@pytest.fixture
async def login(empty_dsn: str) -> AsyncIterator[tuple[str, str]]:
    """Its name, and the connection string of an empty database that is its own."""
    name, dsn = f"login_{os.getpid()}", empty_dsn
    async with open_test_database(dsn) as database:
        await database.fetch(f"DROP ROLE IF EXISTS {name}")
        await database.fetch(f"CREATE ROLE {name} LOGIN")
        base = await database.value("SELECT current_database()")
        await database.fetch(f"ALTER DATABASE {base} OWNER TO {name}")
        yield name, dsn.replace("postroom@", f"{name}@", 1)
        await database.fetch(f"REASSIGN OWNED BY {name} TO postroom")
        await database.fetch(f"DROP OWNED BY {name}")
        await database.fetch(f"ALTER DATABASE {base} OWNER TO postroom")
        await database.fetch(f"DROP ROLE {name}")


async def test_a_member_of_the_roles_migrates_and_journals(
    database: Database, login: tuple[str, str]
) -> None:
    name, dsn = login
    with pytest.raises(MigrationError, match=f"{name} is no member of router_owner; as a superuser: GRANT"):
        await migrate_database(database.bridge, dsn, apply=True)
    roles = "router_owner, router_service, router_admin, router_reader"
    await database.fetch(f"GRANT {roles} TO {name}")
    await migrate_database(database.bridge, dsn, apply=True)
    async with open_test_database(dsn) as mine, mine.journal() as journal:
        assert (await appended(journal, body(message("a")))).first_seq == 1
        epoch = await mine.take_epoch()
        [item] = await journal.read([1])
        await journal.complete([done(item)], epoch=epoch, low_water=2, stragglers=[])
        await assert_conserved(mine)
        assert await mine.value("SELECT count(*) FROM postroom_rls_audit()") == 0
