"""An archive without some person: which of its rows that concerns, the rows as they are then, and how it is
written again. All of it blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from router.archive.columns import Column, Row
from router.archive.files import ArchiveFiles, WrittenTable
from router.archiving import manifest_of
from router.channels.redaction import Redacted, Redaction
from router.json_text import parse, storable


class Cleaning:
    """One archive without some persons, each with the time until which what was received goes; None: all of
    it. Made by reading all of the archive, whose rows are then as `rows` gives them.

    Raises:
        ArchiveError: it cannot be read.
    """

    def __init__(
        self,
        files: ArchiveFiles,
        name: str,
        tables: Mapping[str, WrittenTable],
        persons: Sequence[tuple[Redaction, datetime | None]],
    ) -> None:
        self._files = files
        self._name = name
        self._tables = tables
        self._persons = persons
        self.bodies: dict[int, Redacted] = {}
        """By event: what its body is now."""
        self.items: dict[int, str | None] = {}
        """By seq, of the items that are gone: the bucket, None for those that a session took."""
        self.outcomes: dict[int, str] = {}
        """By seq: how they had ended."""
        self._replies: dict[int, Row | None] = {}
        self._subjects = 0
        self._look()

    @property
    def replies(self) -> int:
        """How many replies to the person are gone."""
        return sum(row is None for row in self._replies.values())

    def rows(self, table: str) -> Iterator[list[Row]]:
        """The rows of a table without the person, page by page. Raises ArchiveError."""
        told = self._tables[table]
        change = self._changes().get(table)
        for page in self._files.rows(self._name, table, told):
            if change is not None:
                apply = change[1]
                columns = _Columns(told.columns)
                page = [after for row in page if (after := apply(columns, row)) is not None]
            yield page

    def touched(self) -> list[str]:
        """The tables that are not what they were."""
        return [table for table, (is_touched, _) in self._changes().items() if is_touched]

    def _changes(self) -> dict[str, tuple[bool, Callable[[_Columns, Row], Row | None]]]:
        """By table: whether a row of it is concerned, and what becomes of each: None, it is gone."""
        changes = {
            "items": (bool(self.items), self._item),
            "outcomes": (bool(self.outcomes), self._outcome),
            "replies": (bool(self._replies), self._reply),
            "bodies": (bool(self.bodies), self._body),
            "events": (bool(self.bodies), self._body),
            "subjects": (bool(self._subjects), self._subject),
        }
        return {table: change for table, change in changes.items() if table in self._tables}

    def _look(self) -> None:
        for table in ("bodies", "events"):
            for columns, row in self._all(table):
                redacted = self._redacted(columns.of(row, "body"), columns.of(row, "received_at"))
                if redacted is not None:
                    self.bodies[columns.of(row, "event_id")] = redacted
        for columns, row in self._all("items") if self.bodies else ():
            redacted = self.bodies.get(columns.of(row, "event_id"))
            bucket = columns.of(row, "bucket")
            if redacted is not None and columns.of(row, "path") in redacted.paths and bucket != "erased":
                self.items[columns.of(row, "seq")] = bucket
        for columns, row in self._all("outcomes") if self.items else ():
            if columns.of(row, "seq") in self.items:
                self.outcomes[columns.of(row, "seq")] = columns.of(row, "outcome")
        for columns, row in self._all("replies"):
            self._look_at_reply(columns, row)
        for columns, row in self._all("subjects"):
            self._subjects += self._is_subject(columns.of(row, "subject"))

    def _redacted(self, body: bytes, received_at: datetime) -> Redacted | None:
        """The body without all of them; None: it names nobody."""
        found: Redacted | None = None
        for redaction in self._of(received_at):
            one = redaction.body(body) if redaction.may_concern(body) else None
            if one is not None:
                found = Redacted(one.body, one.paths | (frozenset() if found is None else found.paths))
                body = one.body
        return found

    def _of(self, moment: datetime) -> list[Redaction]:
        return [redaction for redaction, until in self._persons if until is None or moment <= until]

    def _is_subject(self, name: str) -> bool:
        """Of a person of whom nothing is left."""
        return any(until is None and name in redaction.names for redaction, until in self._persons)

    def _look_at_reply(self, columns: _Columns, row: Row) -> None:
        identity, seq = columns.of(row, "id"), columns.of(row, "seq")
        recipient, key = columns.of(row, "recipient"), columns.of(row, "session_key")
        payload = before = parse(columns.of(row, "payload").encode())
        error = said = columns.of(row, "error_message") or ""
        for redaction in self._of(columns.of(row, "created_at")):
            if seq in self.items or recipient in redaction.names or _is_key_of(key, redaction.names):
                self._replies[identity] = None
                return
            payload, error = redaction.part(payload), redaction.text(error)
        if (payload, error) != (before, said):
            self._replies[identity] = columns.with_(
                row, payload=storable(payload), error_message=error or None
            )

    def _all(self, table: str) -> Iterator[tuple[_Columns, Row]]:
        if table in self._tables:
            told = self._tables[table]
            columns = _Columns(told.columns)
            for page in self._files.rows(self._name, table, told):
                for row in page:
                    yield columns, row

    def _item(self, columns: _Columns, row: Row) -> Row:
        if columns.of(row, "seq") not in self.items:
            return row
        return columns.with_(row, bucket="erased", reason=None, message_id=None, session_key=None, joins=None)

    def _outcome(self, columns: _Columns, row: Row) -> Row | None:
        return None if columns.of(row, "seq") in self.items else row

    def _reply(self, columns: _Columns, row: Row) -> Row | None:
        return self._replies.get(columns.of(row, "id"), row)

    def _body(self, columns: _Columns, row: Row) -> Row:
        redacted = self.bodies.get(columns.of(row, "event_id"))
        return row if redacted is None else columns.with_(row, body=redacted.body, partial=True)

    def _subject(self, columns: _Columns, row: Row) -> Row | None:
        return None if self._is_subject(columns.of(row, "subject")) else row


class StoredArchive:
    """An archive that is whole. What the database says of it is the truth, also where the manifest says else:
    that is of before, by one that stood still, or was stopped before it came to it."""

    def __init__(self, row: Mapping[str, Any], configured: str) -> None:
        self.name: str = row["name"]
        self._row = row
        location: str = row["location"]
        # One that was relative to the directory of whoever wrote it says nothing here.
        self.files = ArchiveFiles(location if location.startswith("/") or "://" in location else configured)
        self.tables = {table: WrittenTable.of(one) for table, one in row["tables"].items()}

    def look(self, redaction: Redaction) -> Cleaning:
        """The archive without the person."""
        return Cleaning(self.files, self.name, self.tables, [(redaction, None)])

    def mend(self) -> None:
        """The manifest says what the database does, and no file is there that nobody names."""
        if self.files.tables(self.name) != self.tables:
            self.replace(self.tables)
        else:
            self.files.tidy(self.name)

    def write_again(self, cleaning: Cleaning) -> dict[str, WrittenTable] | None:
        """New files, read back, beside the old ones; None: nothing of it is the person's."""
        tables = dict(self.tables)
        for table in cleaning.touched():
            columns = self.tables[table].columns
            writer = self.files.open_table(self.name, table, columns)
            try:
                for page in cleaning.rows(table):
                    if page:
                        writer.add(page)
                told = self.files.end_table(self.name, columns, writer)
                for _ in self.files.rows(self.name, table, told):
                    pass
            except BaseException:
                self.files.abandon_table(self.name, writer)
                raise
            tables[table] = told
        return tables if cleaning.touched() else None

    def replace(self, tables: Mapping[str, WrittenTable]) -> None:
        """The manifest names these files; all others go."""
        row = self._row
        written = {table: one.as_json() for table, one in tables.items()}
        self.files.write_manifest(
            self.name, manifest_of(self.name, row["kind"], row["from_at"], row["until_at"], written)
        )
        self.files.tidy(self.name)


class _Columns:
    """Rows by the names of their columns."""

    def __init__(self, columns: tuple[Column, ...]) -> None:
        self._places = {column.name: place for place, column in enumerate(columns)}

    def of(self, row: Row, name: str) -> Any:
        place = self._places.get(name)
        return None if place is None else row[place]

    def with_(self, row: Row, **values: Any) -> Row:
        changed = list(row)
        for name, value in values.items():
            if name in self._places:
                changed[self._places[name]] = value
        return tuple(changed)


def _is_key_of(session_key: str | None, names: frozenset[str]) -> bool:
    """A conversation is known by its number and the name that its person had first."""
    return session_key is not None and session_key.partition(":")[2] in names
