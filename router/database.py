"""The database of a configuration: started if it is ours, its schema brought up to date or looked at."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import asyncpg
import trio

from actors.errors import JournalUnavailable
from router.config import Config
from router.postgres.bridge import Bridge
from router.postgres.connections import connect
from router.postgres.embedded import EmbeddedPostgres
from router.postgres.errors import TRANSIENT, describe
from router.postgres.migrate import Migration, MigrationError, migrate, pending, shipped_migrations

T = TypeVar("T")


@asynccontextmanager
async def open_database(
    config: Config, *, report: Callable[[str], None] = lambda line: None
) -> AsyncIterator[Callable[[], str]]:
    """The database of a configuration, as a function that gives its connection string: DATABASE_URL, or
    the embedded Postgres in `data_dir`, started when it does not run and stopped when nobody else
    uses it.

    Raises:
        EmbeddedPostgresError: it cannot run here.
    """
    if config.database_url is not None:
        url = in_schema(config.database_url, config.schema)
        yield lambda: url
        return
    postgres = EmbeddedPostgres(config.data_dir, report=report)
    await postgres.start()
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(postgres.watch)
            try:
                yield lambda: in_schema(postgres.dsn(), config.schema)
            except Exception as error:
                failure = error  # raised below as it is: a nursery would wrap it
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
    finally:
        with trio.move_on_after(40) as stopping:
            stopping.shield = True
            await postgres.stop()


def in_schema(dsn: str, schema: str | None) -> str:
    """A connection string whose sessions find unqualified names in this schema."""
    if schema is None:
        return dsn
    parts = urlsplit(dsn)
    query = parse_qsl(parts.query, keep_blank_values=True)
    asked = " ".join([*(value for name, value in query if name == "options"), f"-c search_path={schema}"])
    rest = [(name, value) for name, value in query if name != "options"]
    # Spelled out: urlunsplit() leaves "//" out where there is no host, and libpq does not.
    path = parts.path if parts.path.startswith("/") or not parts.path else f"/{parts.path}"
    return f"{parts.scheme}://{parts.netloc}{path}?{urlencode([*rest, ('options', asked)], quote_via=quote)}"


async def pending_migrations(bridge: Bridge, dsn: str) -> list[Migration]:
    """What `migrate_database` would apply. Raises as it does."""
    return await bridge.run(lambda: _with_connection(dsn, lambda c: pending(c, shipped_migrations())))


async def migrate_database(bridge: Bridge, dsn: str, *, apply: bool, schema: str | None = None) -> list[str]:
    """Bring the schema up to date, or with `apply` false only see that it is. `schema`: made if missing.

    Returns the names of what was applied.

    Raises:
        MigrationError: it is not up to date, or cannot be brought there.
        JournalUnavailable: the database cannot be reached.
    """
    migrations = shipped_migrations()

    async def work(connection: asyncpg.Connection) -> list[str]:
        if apply:
            done = await migrate(connection, migrations, schema)
            return [f"{one.version:04}_{one.name}" for one in done]
        missing = await pending(connection, migrations)
        if missing:
            raise MigrationError(
                f"the database lacks {len(missing)} migration(s), from "
                f"{missing[0].version:04}_{missing[0].name}; "
                "run `postroom migrate`, or serve with --migrate"
            )
        return []

    return await bridge.run(lambda: _with_connection(dsn, work))


async def _with_connection(dsn: str, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
    try:
        connection = await connect(dsn, name="migrate", role=None, statement_timeout=None)
    except TRANSIENT as error:
        raise JournalUnavailable(f"cannot connect to the database: {describe(error)}") from error
    try:
        return await work(connection)
    except TRANSIENT as error:
        raise JournalUnavailable(f"the schema could not be looked at: {describe(error)}") from error
    finally:
        connection.terminate()
