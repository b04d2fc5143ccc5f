"""Erasure of one person, everywhere: what waits in the spool, what is in tables, what is in archives. Each
step can be done again, and what was interrupted is: nothing is said to be erased before all of it is.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import orjson
import trio

from router.channels.redaction import ESCAPES, Redacted, Redaction
from router.cleaning import Cleaning, StoredArchive
from router.clock import utc_now
from router.json_text import parse, storable
from router.operations import Operations
from router.postgres.statements import statements
from router.spool import remains

T = TypeVar("T")

_SQL = statements("erasures")
_LONG = 3_600.0  # seconds: whole tables are read
_PAGE = 50  # bodies that are changed in one transaction, during which nobody journals or delivers
_READ_AT_ONCE = 10_000  # rows
_LOOK_AGAIN = 0.2  # seconds
_NO_UUID = uuid.UUID(int=0)


class CannotErase(Exception):
    """Not everything could be erased; the message says what is left, and what to do. What was erased is."""


@dataclass(slots=True)
class Erasure:
    """What was erased, or would be. `items` of the person, in tables and in archives; `bodies` that were
    changed for it, or because they mention the person; `letters`, `replies`, `statuses` and `sessions` that
    are gone; `mentions` elsewhere that were redacted; `archives` that were written again; `set_aside` files
    of the spool that were removed; `spooled` files that held something of the person and were emptied into
    the journal.
    """

    names: int = 0
    items: int = 0
    bodies: int = 0
    letters: int = 0
    replies: int = 0
    statuses: int = 0
    sessions: int = 0
    mentions: int = 0
    spooled: int = 0
    set_aside: int = 0
    archives: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class _Rest:
    """What is neither items nor bodies."""

    replies: list[int] = field(default_factory=list)
    letters: list[Any] = field(default_factory=list)
    statuses: list[tuple[str, str]] = field(default_factory=list)
    sessions: int = 0
    named: list[str] = field(default_factory=list)
    being_delivered: int = 0
    redactions: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)


class Eraser:
    """`within`: seconds to wait for what is under way with the person. `on_step` is told before each step
    that changes something: a fault port."""

    def __init__(
        self,
        operations: Operations,
        *,
        actor: str,
        within: float,
        clock: Callable[[], datetime] = utc_now,
        report: Callable[[str], None] = lambda line: None,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        self._operations = operations
        self._config = operations.config
        self._spool = operations.config.data_dir / "spool"
        self._actor = actor
        self._within = within
        self._clock = clock
        self._report = report
        self._on_step = on_step
        self._waits_since: float | None = None

    async def look(self, name: str) -> Erasure:
        """What there is of the person. Changes nothing. Raises ArchiveError, JournalUnavailable."""
        redaction, keys = await self._person(name)
        told = Erasure(names=len(redaction.names))
        told.spooled = len(await self._waiting(redaction))
        told.set_aside = len(await self._set_aside(redaction))
        archives = await self._archives()
        await self._erase_live(redaction, told, since=0, dry_run=True)
        for archive in archives:
            _count_archive(await _in_thread(partial(archive.look, redaction)), archive.name, told)
        rest = await self._rest(redaction, keys)
        _count(rest, told)
        return told

    async def erase(self, name: str) -> Erasure:
        """Take the person out of everything.

        Raises:
            CannotErase: something is in the way; doing it again goes on.
            ArchiveError, JournalUnavailable, SpoolUnavailable: likewise.
        """
        await self._run(lambda c: c.execute(_SQL["hold_archives"], timeout=_LONG))
        redaction, keys = await self._person(name)
        await self._require_whole_archives()
        await self._require_no_copies()
        # First of all: what is taken in from now on and is older is stored without its content.
        self._on_step("bury")
        await self._fetch("bury", self._clock(), sorted(redaction.names))
        told = Erasure()
        self._on_step("empty spool")
        await self._empty_spool(redaction, told)
        redaction, keys = await self._person(name)  # also what the spool knew
        told.names = len(redaction.names)

        archives = await self._archives()
        _count(await self._rest(redaction, keys), told)
        marks = await self._erase_live(redaction, told, since=0)
        for archive in archives:
            await self._erase_archived(archive, redaction, told)
        await self._forget(redaction, keys, marks, told)
        await self._clean_sessions(redaction, keys)
        return told

    async def _run(self, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        return await self._operations.run(work)

    async def _fetch(self, statement: str, *arguments: Any) -> list[Any]:
        found: list[Any] = await self._run(lambda c: c.fetch(_SQL[statement], *arguments, timeout=_LONG))
        return found

    async def _read(
        self, statement: str, first: tuple[Any, ...], key: str, *arguments: Any
    ) -> AsyncIterator[Any]:
        """Rows of concern of a whole table, from after the key `first` on."""
        after = first
        while page := await self._fetch(statement, *after, _READ_AT_ONCE, *arguments):
            for row in page:
                if row["hit"] or row.get("own") or row.get("named"):
                    yield row
            after = tuple(page[-1][column] for column in key.split())

    async def _wait(self, why: str) -> None:
        now = trio.current_time()
        self._waits_since = now if self._waits_since is None else self._waits_since
        if now - self._waits_since >= self._within:
            raise CannotErase(why)
        await trio.sleep(_LOOK_AGAIN)

    async def _person(self, name: str) -> tuple[Redaction, list[str]]:
        """By all names, and the keys of all conversations."""
        names, keys, numbers = {name}, set[str](), set[str]()
        while True:
            before = len(names), len(keys)
            for row in await self._fetch("known_by", sorted(names), sorted(keys)):
                names |= {row["name"], row["session_key"].partition(":")[2]}
                keys.add(row["session_key"])
                numbers.add(row["phone_number_id"])
            # Before two conversations were joined, each had a key of its own.
            keys |= {f"{number}:{one}" for number in numbers for one in names}
            if (len(names), len(keys)) == before:
                return Redaction(names), sorted(keys)

    async def _require_no_copies(self) -> None:
        copies = [row["name"] for row in await self._fetch("restored_copies")]
        if copies:
            raise CannotErase(
                f"{copies[0]} was restored from an archive, and may hold the person; drop it and its "
                "neighbours first, and erase again"
            )

    # The spool

    async def _empty_spool(self, redaction: Redaction, told: Erasure) -> None:
        """What nobody has is journaled here and now; a process that runs does so with its own."""
        found = await self._waiting(redaction)
        told.spooled = len(found)
        if found:
            await self._operations.adopt_spool(self._report)
        while found := await self._waiting(redaction):
            await self._wait(
                f"{len(found)} file(s) of the spool hold something of the person, as {found[0]}; they are "
                "emptied when a router with this data directory reaches its database; erase again then"
            )
        self._waits_since = None
        for path in await self._set_aside(redaction):
            path.unlink(missing_ok=True)
            self._report(f"removed {path}")
            told.set_aside += 1

    async def _waiting(self, redaction: Redaction) -> list[Path]:
        return await _in_thread(lambda: remains.waiting(self._spool, redaction.concerns))

    async def _set_aside(self, redaction: Redaction) -> list[Path]:
        return await _in_thread(lambda: remains.set_aside(self._spool, redaction.concerns))

    # Tables

    async def _erase_live(
        self,
        redaction: Redaction,
        told: Erasure,
        *,
        since: int,
        dry_run: bool = False,
    ) -> int:
        """Items and bodies from the event `since` on. Returns the next event after what was seen."""
        end: int = (await self._fetch("marks"))[0]["next_event"]
        concerned = self._read("events", (since - 1,), "event_id", end, redaction.needles, ESCAPES)
        for page in _pages([row["event_id"] async for row in concerned], _PAGE):
            bodies = await self._fetch("bodies", page)
            redacted = await _in_thread(partial(_redacted_bodies, redaction, bodies))
            paths = {row["event_id"]: changed.paths for row, changed in redacted}
            items = await self._fetch("items", list(paths))
            erased = [row for row in items if row["path"] in paths[row["event_id"]]]
            beside = [row for row in items if row["path"] not in paths[row["event_id"]]]
            told.items += len(erased)
            told.bodies += len(redacted)
            if not dry_run:
                self._on_step("erase items")
            while not dry_run and (erased or redacted):
                under_way = (
                    await self._fetch(
                        "erase_items",
                        [row["seq"] for row in erased],
                        [row["received_at"] for row in erased],
                        [row["seq"] for row in beside],
                        [row["received_at"] for row in beside],
                        [row["event_id"] for row, _ in redacted],
                        [row["received_at"] for row, _ in redacted],
                        [changed.body for _, changed in redacted],
                    )
                )[0][0]
                if under_way is None:
                    self._waits_since = None
                    break
                await self._wait(_under_way(len(under_way)))
        return end

    async def _rest(self, redaction: Redaction, keys: list[str]) -> _Rest:
        rest = _Rest()
        names, needles = sorted(redaction.names), [needle.decode() for needle in redaction.needles]
        async for row in self._read("replies", (-1,), "id", keys, names, needles):
            if row["own"]:
                rest.replies.append(row["id"])
                if row["message_id"] is not None:
                    rest.statuses.append((row["phone_number_id"], row["message_id"]))
            elif (redactions := _redacted(redaction, row)) is not None:
                rest.redactions.append(("redact_reply", (row["id"], *redactions)))
        async for row in self._read("letters", (_NO_UUID,), "id", keys, names, needles):
            redactions = None if row["own"] else _redacted(redaction, row)
            if row["own"]:
                rest.letters.append(row["id"])
            elif redactions is not None:
                rest.redactions.append(("redact_letter", (row["id"], *redactions)))
            if row["own"] or redactions is not None:
                rest.being_delivered += row["status"] == "processing"
        async for row in self._read("statuses", ("", ""), "phone_number_id message_id", needles):
            if redaction.text(row["message_id"]) != row["message_id"]:
                rest.statuses.append((row["phone_number_id"], row["message_id"]))
        await self._look_at_sessions(redaction, keys, rest)
        return rest

    async def _look_at_sessions(self, redaction: Redaction, keys: list[str], rest: _Rest) -> None:
        names, needles = sorted(redaction.names), [needle.decode() for needle in redaction.needles]
        async for row in self._read("sessions", ("",), "session_key", keys, needles, names):
            if row["own"]:
                rest.sessions += 1
                continue
            if row["named"]:
                rest.named.append(row["session_key"])
            state = parse(row["state"].encode())
            if (cleaned := redaction.part(state)) != state:
                changed = (row["session_key"], row["version"], storable(cleaned), row["state"])
                rest.redactions.append(("redact_session", changed))

    async def _redact(self, rest: _Rest) -> bool:
        """False: something was changed by somebody else meanwhile."""
        hit = [bool(await self._fetch(name, *arguments)) for name, arguments in rest.redactions]
        return all(hit)

    async def _forget(self, redaction: Redaction, keys: list[str], marks: int, told: Erasure) -> None:
        """What is no item, and the names."""
        while True:
            rest = await self._rest(redaction, keys)
            if not rest.being_delivered and await self._redact(rest):
                break
            await self._wait(_under_way(rest.being_delivered or 1))
        self._waits_since = None
        self._on_step("forget")
        while (
            await self._fetch(
                "forget",
                self._clock(),
                sorted(redaction.names),
                keys,
                redaction.needles,
                ESCAPES,
                marks,
                rest.named,
                rest.replies,
                rest.letters,
                [number for number, _ in rest.statuses],
                [message_id for _, message_id in rest.statuses],
                self._actor,
                storable(told.as_dict()),
            )
        )[0][0] is not None:
            # Bodies came that may mention the person: they are looked at, and at once it is tried again.
            await self._wait("messages come faster than they can be looked at; erase again")
            marks = await self._erase_live(redaction, told, since=marks)

    async def _clean_sessions(self, redaction: Redaction, keys: list[str]) -> None:
        """Whoever held the state of somebody else's session may have written it back before it heard."""
        self._waits_since = None
        while True:
            rest = _Rest()
            await self._look_at_sessions(redaction, keys, rest)
            if not rest.redactions:
                return
            await self._redact(rest)
            await self._fetch("bury", self._clock(), sorted(redaction.names))  # it is heard again
            await self._wait("sessions that mention the person are written all the time; erase again")

    # Archives

    async def _require_whole_archives(self) -> None:
        unfinished = [row["name"] for row in await self._fetch("unfinished_archives")]
        if unfinished:
            raise CannotErase(
                f"the archive {unfinished[0]} is being made; erase again when "
                "`postroom jobs run archive-partitions` has ended"
            )

    async def _archives(self) -> list[StoredArchive]:
        return [
            StoredArchive(row, self._config.archive_location)
            for row in await self._operations.archives()
            if row["state"] == "archived"
        ]

    async def _erase_archived(self, archive: StoredArchive, redaction: Redaction, told: Erasure) -> None:
        await _in_thread(archive.mend)
        cleaning = await _in_thread(partial(archive.look, redaction))
        _count_archive(cleaning, archive.name, told)
        self._on_step("write archive")
        tables = await _in_thread(lambda: archive.write_again(cleaning))
        if tables is None:
            return
        seqs = sorted(cleaning.items)
        self._on_step("count archive")
        while not (
            await self._fetch(
                "erase_archived",
                archive.name,
                orjson.dumps({table: one.as_json() for table, one in tables.items()}).decode(),
                seqs,
                [cleaning.items[seq] for seq in seqs],
                [cleaning.outcomes.get(seq) for seq in seqs],
            )
        )[0][0]:
            await self._wait(_under_way(1))
        self._on_step("replace archive")
        await _in_thread(lambda: archive.replace(tables))


def _under_way(count: int) -> str:
    what = f"{count} message(s) of the person are under way"
    return f"{what}; let the router finish them, or start it, and erase again"


def _redacted_bodies(redaction: Redaction, bodies: Iterable[Any]) -> list[tuple[Any, Redacted]]:
    """Those that are not the same without the person."""
    found = [(row, redaction.body(row["body"])) for row in bodies]
    return [(row, redacted) for row, redacted in found if redacted is not None]


def _redacted(redaction: Redaction, row: Mapping[str, Any]) -> tuple[str, str | None, str, str | None] | None:
    """payload and error_message without the person, and as they are, of a row that is somebody else's; None:
    they do not mention the person."""
    payload, error = parse(row["payload"].encode()), row["error_message"]
    cleaned, said = redaction.part(payload), None if error is None else redaction.text(error)
    if (cleaned, said) == (payload, error):
        return None
    return storable(cleaned), said, row["payload"], error


def _count(rest: _Rest, told: Erasure) -> None:
    told.replies += len(rest.replies)
    told.letters += len(rest.letters)
    told.statuses += len(rest.statuses)
    told.sessions += rest.sessions
    told.mentions += len(rest.redactions)


def _count_archive(cleaning: Cleaning, name: str, told: Erasure) -> None:
    if cleaning.touched():
        told.archives.append(name)
    told.items += len(cleaning.items)
    told.bodies += len(cleaning.bodies)
    told.replies += cleaning.replies


def _pages(values: Sequence[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(values), size):
        yield list(values[start : start + size])


async def _in_thread(work: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(work)
