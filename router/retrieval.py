"""What operators read of archives: found again, shown, and restored beside the live tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import asyncpg
import trio

from router.archive.columns import Row
from router.archive.files import ArchiveError, ArchiveFiles, WrittenTable, next_page
from router.channels import bodies
from router.channels.redaction import Redaction
from router.cleaning import Cleaning
from router.json_text import parse
from router.operations import Operations
from router.postgres.archives import already_restored, make_restored, other_names

_RESTORED_AS = {
    "items": "whatsapp_messages",
    "outcomes": "message_outcomes",
    "replies": "whatsapp_outbox",
    "bodies": "wa_events",
    "events": "wa_events",
}


class RestoreError(Exception):
    """The tables cannot be restored where they were asked for; the message says why."""


async def restore(operations: Operations, files: ArchiveFiles, name: str, schema: str) -> dict[str, int]:
    """Put the tables of an archive into a schema of their own, all of them or none; returns their rows. Who
    was erased is not in them, also where the files are a copy from before.

    Raises:
        ArchiveError: there is no such archive, or it is damaged.
        RestoreError: tables of these names are there already.
    """
    tables = {
        table: told
        for table, told in (await trio.to_thread.run_sync(files.tables, name)).items()
        if table in _RESTORED_AS
    }
    suffix = name.rpartition("_")[2]
    targets = {table: f"{_RESTORED_AS[table]}_{suffix}" for table in tables}
    taken = await operations.run(lambda c: already_restored(c, schema, list(targets.values())))
    if taken:
        raise RestoreError(f"there already: {', '.join(f'{schema}.{one}' for one in taken)}; drop them first")

    cleaning = await _erased_since(operations, files, name)
    transaction = await operations.run(_begin)
    rows = {}
    try:
        for table, told in tables.items():
            pages = files.rows(name, table, told) if cleaning is None else cleaning.rows(table)
            rows[table] = await _restore_table(operations, pages, told, schema, targets[table])
    except BaseException:
        with trio.CancelScope(shield=True):
            await operations.run(lambda c: transaction.rollback())
        raise
    await operations.run(lambda c: transaction.commit())
    return {f"{schema}.{targets[table]}": count for table, count in rows.items()}


async def _erased_since(operations: Operations, files: ArchiveFiles, name: str) -> Cleaning | None:
    """The archive without those who were erased after it was written; None: it has nobody of them."""
    tombstones = await operations.tombstones()

    def look() -> Cleaning | None:
        if not tombstones.newest:
            return None
        tables = files.tables(name)
        erased: dict[str, datetime] = {}
        for page in files.rows(name, "subjects", tables["subjects"]):
            for subject, *_ in page:
                if (at := tombstones.erased_at(subject)) is not None:
                    erased[subject] = at
        if not erased:
            return None
        return Cleaning(files, name, tables, [(Redaction([one]), at) for one, at in erased.items()])

    return await trio.to_thread.run_sync(look)


async def _begin(connection: asyncpg.Connection) -> Any:
    transaction = connection.transaction()
    await transaction.start()
    return transaction


async def _restore_table(
    operations: Operations,
    pages: Iterator[list[Row]],
    told: WrittenTable,
    schema: str,
    target: str,
) -> int:
    """Returns how many rows there were."""
    rows = 0
    columns = [(one.name, one.type) for one in told.columns]
    await operations.run(lambda c: make_restored(c, schema, target, columns))
    while (page := await trio.to_thread.run_sync(next_page, pages)) is not None:

        async def copy(connection: asyncpg.Connection, page: list[Row] = page) -> None:
            await connection.copy_records_to_table(
                target, schema_name=schema, columns=[column for column, _ in columns], records=page
            )

        await operations.run(copy)
        rows += len(page)
    return rows


async def search(
    operations: Operations, files: ArchiveFiles, *, person: str | None, message_id: str | None
) -> list[dict[str, Any]]:
    """The archived items of or about a person, by any name that the person is known by, or those with an id;
    oldest first.

    Raises:
        ArchiveError: an archive cannot be read.
    """
    names = None if person is None else await operations.run(lambda c: other_names(c, person))
    return await trio.to_thread.run_sync(_search_all, files, names, message_id)


def _search_all(files: ArchiveFiles, names: set[str] | None, message_id: str | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in files.names():
        if "items" in files.tables(name):
            found.extend(_search(files, name, names, message_id))
    return sorted(found, key=lambda item: int(item["seq"]))


def _search(
    files: ArchiveFiles, name: str, names: set[str] | None, message_id: str | None
) -> Iterator[dict[str, Any]]:
    if names is not None:
        subjects = files.find(name, "subjects", "subject", sorted(names))
        events = sorted({row["event_id"] for row in subjects})
        items = files.find(name, "items", "event_id", events) if events else []
    else:
        items = files.find(name, "items", "message_id", [message_id])
    if not items:
        return
    found = _by(
        files.find(name, "bodies", "event_id", sorted({one["event_id"] for one in items})), "event_id"
    )
    outcomes = _by(files.find(name, "outcomes", "seq", [one["seq"] for one in items]), "seq")
    for item in items:
        part = _part(found.get(item["event_id"]), item["path"])
        if names is not None and not bodies.people(part) & names and not _is_about(item, names):
            continue
        outcome = outcomes.get(item["seq"], {})
        yield {
            "archive": name,
            "seq": item["seq"],
            "received_at": item["received_at"],
            "kind": item["kind"],
            "message_id": item["message_id"],
            "session_key": item["session_key"],
            "place": outcome.get("outcome") or item["bucket"],
            "service": outcome.get("service"),
            "content": part,
        }


def _by(rows: Sequence[dict[str, Any]], key: str) -> dict[Any, dict[str, Any]]:
    return {row[key]: row for row in rows}


def _part(body: dict[str, Any] | None, path: str) -> Any:
    try:
        return None if body is None else bodies.part_at(parse(body["body"]), path)
    except (LookupError, ValueError):
        return None


def _is_about(item: dict[str, Any], names: set[str]) -> bool:
    key = item["session_key"]
    return key is not None and key.partition(":")[2] in names


__all__ = ["ArchiveError", "RestoreError", "restore", "search"]
