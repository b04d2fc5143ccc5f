"""Archives on the side of the database: what is to be archived, its rows in pages, and that it goes. Every
change is fenced by the epoch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeVar

import asyncpg
import orjson

from actors.ports import Clock
from router.json_text import storable

from .bridge import Bridge
from .connections import OWNER, Line
from .errors import TRANSIENT, translated
from .statements import statements

T = TypeVar("T")
Pages = Callable[[], Awaitable[list[tuple[Any, ...]]]]
"""Reads the next page of rows, in the order of their key; an empty one at the end."""

_SQL = statements("archives")
_PAGE_ROWS = 2_000
_PAGE_BYTES = 4 * 1024 * 1024
_LOCK_ATTEMPTS = 15
_LOCK_PAUSE = 1.0  # seconds
_LONG = 3_600.0  # seconds for what counts or drops all rows of a week


class ArchiveConflict(Exception):
    """The tables are not as the archive needs them; nothing was dropped."""


@dataclass(frozen=True, slots=True)
class Archive:
    """One that has been begun. `kind` messages: the items of a week with outcomes, bodies and replies;
    events: the bodies of a month. `state`: detaching, writing or written; `tables` what was written."""

    name: str
    kind: str
    partitions: tuple[str, ...]
    from_at: datetime
    until_at: datetime
    state: str
    tables: Mapping[str, Any] | None


class PostgresArchives:
    """A connection to read and fence with, and one for what must not stand in a transaction."""

    def __init__(self, bridge: Bridge, dsn: Callable[[], str], *, clock: Clock) -> None:
        self._bridge = bridge
        self._clock = clock
        self._line = Line(dsn, "archive", role=OWNER)
        self._ddl_line = Line(dsn, "archive-ddl", role=OWNER, settings={"lock_timeout": "2s"})

    async def close(self) -> None:
        async def close() -> None:
            await self._line.close()
            await self._ddl_line.close()

        await self._bridge.run(close)

    async def _run(self, line: Line, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        async def run() -> T:
            with translated("archives"):
                try:
                    async with line.use() as connection:
                        return await work(connection)
                except asyncpg.RaiseError as error:  # in words of ours, which hold no values
                    raise ArchiveConflict(str(error)) from None
                except TRANSIENT:
                    line.drop()
                    raise

        return await self._bridge.run(run)

    async def _fetch(self, name: str, *arguments: Any, timeout: float | None = None) -> list[Any]:
        rows: list[Any] = await self._run(
            self._line, lambda c: c.fetch(_SQL[name], *arguments, timeout=timeout)
        )
        return rows

    async def next(self, epoch: int, before: datetime) -> Archive | None:
        """The one to go on with, else the next to begin of what ended earlier; None: there is none."""
        found = await self._fetch("next_archive", epoch, self._clock(), before, timeout=_LONG)
        if not found:
            return None
        row = found[0]
        return Archive(
            row["name"],
            row["kind"],
            tuple(row["partitions"]),
            row["from_at"],
            row["until_at"],
            row["state"],
            None if row["tables"] is None else orjson.loads(row["tables"]),
        )

    async def held(self, before: datetime) -> int:
        """How many weeks that ended earlier are still there: something in them is under way."""
        count: int = (await self._fetch("held_partitions", before))[0][0]
        return count

    async def detach(self, epoch: int, partition: str) -> None:
        """Take a partition out of its table, or go on with that. Nobody waits behind it for long: where it
        gets no lock, it tries again."""

        async def work(connection: asyncpg.Connection) -> None:
            for attempt in range(1, _LOCK_ATTEMPTS + 1):
                statement = await connection.fetchval(_SQL["detach_statement"], epoch, partition)
                if statement is None:
                    return
                try:
                    await connection.execute(statement)
                except asyncpg.UndefinedTableError:
                    continue  # it is out by now
                except asyncpg.LockNotAvailableError:
                    if attempt == _LOCK_ATTEMPTS:
                        raise
                    await asyncio.sleep(_LOCK_PAUSE)

        await self._run(self._ddl_line, work)

    async def begin_writing(self, epoch: int, archive: Archive) -> Archive:
        """Nothing of it changes any more; returns it with its tables under other names."""
        found = await self._fetch("begin_writing", epoch, archive.name, timeout=_LONG)
        return replace(archive, partitions=tuple(found[0][0]), state="writing")

    async def written(self, epoch: int, name: str, location: str, tables: dict[str, Any]) -> None:
        """Its files were read back."""
        await self._fetch("archive_written", epoch, name, location, storable(tables))

    async def drop(self, epoch: int, name: str) -> None:
        """Its rows go, in one transaction.

        Raises:
            ArchiveConflict: they are not as many as were written: none goes; the next run writes them again.
        """
        try:
            await self._fetch("drop_archived", epoch, self._clock(), name, timeout=_LONG)
        except ArchiveConflict:
            await self._fetch("write_again", epoch, name)
            raise

    async def analyze(self) -> None:
        """Fresh statistics on the tables that have partitions."""
        await self._run(self._line, lambda c: c.execute(_SQL["analyze"], timeout=_LONG))

    # Rows

    async def columns(self, table: str) -> list[tuple[str, str]]:
        """Names and types."""
        return [(row["name"], row["type"]) for row in await self._fetch("columns", table)]

    def items(self, archive: Archive) -> Pages:
        return self._pages("items_page", "seq", archive.partitions[0])

    def outcomes(self, archive: Archive) -> Pages:
        return self._pages("outcomes_page", "seq", archive.partitions[1])

    def replies(self, archive: Archive) -> Pages:
        return self._pages("replies_page", "id", archive.from_at, archive.until_at)

    def bodies(self, archive: Archive) -> Pages:
        return self._pages("bodies_page", "event_id", archive.from_at, archive.until_at, most=_PAGE_BYTES)

    def events(self, archive: Archive) -> Pages:
        return self._pages("events_page", "event_id", archive.partitions[0], most=_PAGE_BYTES)

    def _pages(self, name: str, key: str, *arguments: Any, most: int | None = None) -> Pages:
        after = 0
        bound = () if most is None else (most,)

        async def read() -> list[tuple[Any, ...]]:
            nonlocal after
            page = await self._fetch(name, *arguments, after, _PAGE_ROWS, *bound)
            after = page[-1][key] if page else after
            return [tuple(row) for row in page]

        return read


async def archives_of(connection: asyncpg.Connection) -> Sequence[Any]:
    """All that were begun, with their state."""
    rows: Sequence[Any] = await connection.fetch(_SQL["list"])
    return rows


async def other_names(connection: asyncpg.Connection, name: str) -> set[str]:
    """What the person of this name is known by, that name included."""
    return {name, *(row["name"] for row in await connection.fetch(_SQL["names_of"], name))}


async def make_restored(
    connection: asyncpg.Connection, schema: str, table: str, columns: Sequence[tuple[str, str]]
) -> None:
    """An empty table to restore into."""
    await connection.execute(
        _SQL["make_restored"], schema, table, [name for name, _ in columns], [kind for _, kind in columns]
    )


async def already_restored(connection: asyncpg.Connection, schema: str, tables: Sequence[str]) -> list[str]:
    """Those of the tables that are there."""
    return [row["name"] for row in await connection.fetch(_SQL["restored"], schema, list(tables))]
