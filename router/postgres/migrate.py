"""Migrations: plain SQL, forward only, contiguous, checksummed, applied one transaction each under a
lock, so that two processes that start together do not meet.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import asyncpg

from .statements import statements

_SQL = statements("migrate")
_FILE = re.compile(r"(\d{4})_(\w+)\.sql")


class MigrationError(Exception):
    """The schema cannot be brought up to date; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file: 0001_journal.sql is version 1."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode("utf-8")).hexdigest()


def shipped_migrations() -> list[Migration]:
    """Those of this version: inside the wheel, or beside the packages in a checkout.

    Raises:
        MigrationError: there are none, or a number is missing or taken twice.
    """
    inside: Traversable = files("router.postgres") / "migrations"
    beside = Path(__file__).resolve().parents[2] / "migrations"
    folder = inside if inside.is_dir() else beside
    found = []
    for file in folder.iterdir() if folder.is_dir() else ():
        match = _FILE.fullmatch(file.name)
        if match:
            found.append(Migration(int(match[1]), match[2], file.read_text(encoding="utf-8")))
    found.sort(key=lambda migration: migration.version)
    versions = [migration.version for migration in found]
    if not found or versions != list(range(1, len(found) + 1)):
        raise MigrationError(f"migrations are not contiguous from 0001: {versions}")
    return found


async def pending(connection: asyncpg.Connection, migrations: Sequence[Migration]) -> list[Migration]:
    """Those that are not applied yet.

    Raises:
        MigrationError: an applied one has changed, is unknown here, or our tables' names are taken.
    """
    if not await connection.fetchval(_SQL["has_history"]):
        taken = [row["name"] for row in await connection.fetch(_SQL["foreign_tables"])]
        if taken:
            raise MigrationError(
                f"tables of the same name are there that are not Postroom's: {', '.join(taken)}; "
                "use another database, or another schema of it with --schema"
            )
        return list(migrations)
    applied = {row["version"]: row["checksum"] for row in await connection.fetch(_SQL["history"])}
    for migration in migrations:
        if migration.version in applied and applied[migration.version] != migration.checksum:
            raise MigrationError(
                f"migration {migration.version:04}_{migration.name} was changed after it was applied; "
                "install the version of Postroom that this database was migrated with, or a newer one"
            )
    newest = max(applied, default=0)
    if newest > len(migrations):
        raise MigrationError(
            f"the database is at schema {newest}, this Postroom knows {len(migrations)}; install a newer one"
        )
    return [migration for migration in migrations if migration.version not in applied]


async def migrate(
    connection: asyncpg.Connection, migrations: Sequence[Migration], schema: str | None = None
) -> list[Migration]:
    """Apply what is pending; returns it. `schema` is made if it is missing.

    Raises:
        MigrationError: as `pending`, or one failed: it was rolled back, those before it stay.
    """
    await connection.execute(_SQL["lock"])
    try:
        if schema is not None:
            await connection.execute(await connection.fetchval(_SQL["create_schema"], schema))
        applied = []
        for migration in await pending(connection, migrations):
            try:
                async with connection.transaction():
                    if await connection.fetchval(_SQL["has_owner"]):
                        await connection.execute(_SQL["become_owner"])
                    await connection.execute(_SQL["make_history"])
                    await connection.execute(migration.sql)
                    await connection.execute(
                        _SQL["record"], migration.version, migration.name, migration.checksum
                    )
            except asyncpg.PostgresError as error:
                raise MigrationError(
                    f"migration {migration.version:04}_{migration.name} failed and was rolled back: {error}"
                ) from error
            applied.append(migration)
        return applied
    finally:
        if not connection.is_closed():
            await connection.execute(_SQL["unlock"])
