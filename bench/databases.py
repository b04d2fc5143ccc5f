"""The harness's look into a target's Postgres, its process, rows and settings; and a Postgres of its own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import trio

from router.database import migrate_database
from router.postgres.bridge import Bridge, open_bridge
from router.postgres.connections import BY_KEY
from router.postgres.embedded import EmbeddedPostgres

DURABILITY = ("fsync", "synchronous_commit", "full_page_writes")
_SHOWN = (
    *DURABILITY,
    "server_version",
    "wal_level",
    "wal_sync_method",
    "shared_buffers",
    "max_wal_size",
    "max_connections",
    "io_method",
)


class UnfairDatabase(Exception):
    """A durability setting of a target's Postgres is off, so its numbers would compare with nothing."""


def find_postmaster(data_dir: Path) -> int | None:
    """The process id of the Postgres whose cluster lies under `data_dir`, from its postmaster.pid."""
    for pid_file in sorted(data_dir.glob("**/postmaster.pid")):
        return int(pid_file.read_text(encoding="utf-8").split("\n", 1)[0])
    return None


async def _fetch_value(dsn: str, query: str) -> Any:
    # By key, also where nothing is known of the tables yet: a look that reads millions of rows, many times a
    # second, would be what is measured.
    connection = await asyncpg.connect(dsn, server_settings=dict(BY_KEY))
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


def fetch_count(dsn: str, query: str) -> int:
    """The one number that `query` gives. Blocks; called where no load is running."""
    return int(asyncio.run(_fetch_value(dsn, query)))


async def _settings(dsn: str) -> dict[str, str]:
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(
            "SELECT name, current_setting(name) AS value FROM pg_settings WHERE name = ANY($1)", list(_SHOWN)
        )
    finally:
        await connection.close()
    return {row["name"]: row["value"] for row in rows}


def durable_settings(dsn: str) -> dict[str, str]:
    """The settings that a comparison rests on.

    Raises:
        UnfairDatabase: fsync, synchronous_commit or full_page_writes is not on.
    """
    settings = asyncio.run(_settings(dsn))
    off = [name for name in DURABILITY if settings.get(name) != "on"]
    if off:
        raise UnfairDatabase(f"{', '.join(off)} must be on in {dsn}")
    return settings


@asynccontextmanager
async def migrated(home: Path) -> AsyncIterator[tuple[Bridge, str]]:
    """An embedded Postgres in `home`, with our schema, while the block runs; and its connection string."""
    postgres = EmbeddedPostgres(home / "data")
    await postgres.start()
    try:
        async with open_bridge() as bridge:
            dsn = postgres.dsn()
            await migrate_database(bridge, dsn, apply=True)
            yield bridge, dsn
    finally:
        with trio.CancelScope(shield=True):
            await postgres.stop()


async def ask(bridge: Bridge, dsn: str, statement: str, *arguments: object) -> Any:
    """The first row of a statement, over a connection of its own."""

    async def work() -> Any:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetchrow(statement, *arguments)
        finally:
            await connection.close()

    return await bridge.run(work)
