"""Moves partitions that are past their retention into archives. Rows are in their table until their file was
read back, and then only in the file: each step can be interrupted and done again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from datetime import datetime
from typing import Any

import trio

from router.archive.columns import Column, Row
from router.archive.files import ArchiveFiles, WrittenTable, next_page
from router.channels import bodies
from router.json_text import parse
from router.postgres.archives import Archive, Pages, PostgresArchives

Step = Callable[[str], None]

_SUBJECTS = (Column("subject", "text"), Column("event_id", "bigint"))
_BODY, _EVENT_ID = "body", "event_id"


class Archiver:
    """`on_step` is told before each step that changes something: a fault port."""

    def __init__(
        self, archives: PostgresArchives, files: ArchiveFiles, *, on_step: Step = lambda step: None
    ) -> None:
        self._archives = archives
        self._files = files
        self._on_step = on_step

    async def archive_all(self, epoch: int, before: datetime) -> list[str]:
        """Archive what ended earlier, oldest first; returns the names of the archives.

        Raises:
            ArchiveError: one could not be written, or was not what had been written; its rows are there.
            ArchiveConflict: the tables are not as they should be; likewise.
            JournalUnavailable, LeaseLost: the database is away, or the epoch over; the next run goes on.
        """
        done = []
        while (archive := await self._archives.next(epoch, before)) is not None:
            await self._archive(epoch, archive)
            done.append(archive.name)
        return done

    async def _archive(self, epoch: int, archive: Archive) -> None:
        told = archive.tables
        if archive.state != "written" or told is None:
            for partition in archive.partitions:
                self._on_step("detach")
                await self._archives.detach(epoch, partition)
            self._on_step("begin writing")
            archive = await self._archives.begin_writing(epoch, archive)
            self._on_step("write")
            told = {table: one.as_json() for table, one in (await self._write(archive)).items()}
            self._on_step("say written")
            await self._archives.written(epoch, archive.name, self._files.location, told)
        # What the database says was written: the same, whoever writes the manifest, and however late.
        manifest = manifest_of(archive.name, archive.kind, archive.from_at, archive.until_at, told)
        self._on_step("write manifest")
        await trio.to_thread.run_sync(self._files.write_manifest, archive.name, manifest)
        await trio.to_thread.run_sync(self._files.tidy, archive.name)
        self._on_step("drop")
        await self._archives.drop(epoch, archive.name)
        self._on_step("end")

    async def _write(self, archive: Archive) -> Mapping[str, WrittenTable]:
        sources: dict[str, tuple[str, Pages]]
        if archive.kind == "messages":
            sources = {
                "items": ("whatsapp_messages_items", self._archives.items(archive)),
                "outcomes": ("message_outcomes", self._archives.outcomes(archive)),
                "replies": ("whatsapp_outbox", self._archives.replies(archive)),
                "bodies": ("wa_events", self._archives.bodies(archive)),
            }
        else:
            sources = {"events": ("wa_events", self._archives.events(archive))}
        written: dict[str, WrittenTable] = {}
        async with self._table(archive.name, "subjects", _SUBJECTS) as subjects:
            for table, (source, pages) in sources.items():
                columns = [Column(*one) for one in await self._archives.columns(source)]
                written[table] = await self._write_table(archive.name, table, columns, pages, subjects)
            written["subjects"] = await subjects.end()
        return written

    @asynccontextmanager
    async def _table(self, name: str, table: str, columns: Sequence[Column]) -> AsyncIterator[_Writing]:
        writing = _Writing(self._files, name, table, columns)
        await writing.begin()
        try:
            yield writing
        finally:
            with trio.CancelScope(shield=True):
                await writing.abandon()

    async def _write_table(
        self,
        name: str,
        table: str,
        columns: Sequence[Column],
        pages: Pages,
        subjects: _Writing,
    ) -> WrittenTable:
        names = [one.name for one in columns]
        places = (names.index(_BODY), names.index(_EVENT_ID)) if _BODY in names else None
        async with self._table(name, table, columns) as writing:
            while page := await pages():
                self._on_step(f"write {table}")
                await writing.add(page)
                if places is not None:
                    await subjects.add(await trio.to_thread.run_sync(_subjects, page, *places))
            return await writing.end()


def manifest_of(
    name: str, kind: str, from_at: datetime, until_at: datetime, tables: Mapping[str, Any]
) -> dict[str, Any]:
    """What an archive says of itself; `tables` as the database has them."""
    return {
        "name": name,
        "kind": kind,
        "from": from_at.isoformat(),
        "until": until_at.isoformat(),
        "tables": tables,
    }


def archiver(archives: PostgresArchives, location: str) -> Archiver:
    """For archives at a directory or a URI."""
    return Archiver(archives, ArchiveFiles(location))


class _Writing:
    """A table that is being written: file work is done in threads, and not for long at once."""

    def __init__(self, files: ArchiveFiles, name: str, table: str, columns: Sequence[Column]) -> None:
        self._files = files
        self._name = name
        self._table = table
        self._columns = columns
        self._ended = False

    async def begin(self) -> None:
        self._writer = await trio.to_thread.run_sync(
            self._files.open_table, self._name, self._table, self._columns
        )

    async def add(self, rows: Sequence[Row]) -> None:
        if rows:
            await trio.to_thread.run_sync(self._writer.add, rows)

    async def end(self) -> WrittenTable:
        """Returns when all of it has been read back. Raises ArchiveError: it is not what was written."""
        told = await trio.to_thread.run_sync(self._files.end_table, self._name, self._columns, self._writer)
        with closing(self._files.rows(self._name, self._table, told)) as pages:
            while await trio.to_thread.run_sync(next_page, pages) is not None:
                pass
        self._ended = True
        return told

    async def abandon(self) -> None:
        """Unless it was read back."""
        if not self._ended:
            await trio.to_thread.run_sync(self._files.abandon_table, self._name, self._writer)


def _subjects(page: Sequence[Row], body: int, event_id: int) -> list[Row]:
    """(subject, event_id) of every person that these bodies are of or about."""
    return [(subject, row[event_id]) for row in page for subject in sorted(_people(row[body]))]


def _people(body: bytes) -> set[str]:
    try:
        return bodies.people(parse(body))
    except ValueError:
        return set()
