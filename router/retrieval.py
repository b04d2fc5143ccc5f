"""What operators read of archives: found again, shown, and restored beside the live tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import asyncpg
import trio

from router.archive.columns import Row
from router.archive.files import ArchiveError, ArchiveFiles, WrittenTable, next_page
from router.channels import whatsapp
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
    """Put the tables of an archive into a schema of their own, all of them or none; returns their rows.

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

    transaction = await operations.run(_begin)
    try:
        for table, told in tables.items():
            await _restore_table(operations, files, name, table, told, schema, targets[table])
    except BaseException:
        with trio.CancelScope(shield=True):
            await operations.run(lambda c: transaction.rollback())
        raise
    await operations.run(lambda c: transaction.commit())
    return {f"{schema}.{targets[table]}": told.rows for table, told in tables.items()}


async def _begin(connection: asyncpg.Connection) -> Any:
    transaction = connection.transaction()
    await transaction.start()
    return transaction


async def _restore_table(
    operations: Operations,
    files: ArchiveFiles,
    name: str,
    table: str,
    told: WrittenTable,
    schema: str,
    target: str,
) -> None:
    columns = [(one.name, one.type) for one in told.columns]
    await operations.run(lambda c: make_restored(c, schema, target, columns))
    pages = files.rows(name, table, told)
    while (page := await trio.to_thread.run_sync(next_page, pages)) is not None:

        async def copy(connection: asyncpg.Connection, page: list[Row] = page) -> None:
            await connection.copy_records_to_table(
                target, schema_name=schema, columns=[column for column, _ in columns], records=page
            )

        await operations.run(copy)


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
    bodies = _by(
        files.find(name, "bodies", "event_id", sorted({one["event_id"] for one in items})), "event_id"
    )
    outcomes = _by(files.find(name, "outcomes", "seq", [one["seq"] for one in items]), "seq")
    for item in items:
        part = _part(bodies.get(item["event_id"]), item["path"])
        if names is not None and not whatsapp.people(part) & names and not _is_about(item, names):
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
        return None if body is None else whatsapp.part_at(parse(body["body"]), path)
    except (LookupError, ValueError):
        return None


def _is_about(item: dict[str, Any], names: set[str]) -> bool:
    key = item["session_key"]
    return key is not None and key.partition(":")[2] in names


__all__ = ["ArchiveError", "RestoreError", "restore", "search"]
