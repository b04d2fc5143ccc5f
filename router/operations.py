"""What operators ask of the database, beside a running router or without one."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import asyncpg
import orjson
import trio

from actors.errors import JournalUnavailable
from actors.ingress import Ingress
from actors.messages import Delivery
from router.app import adopt_spool, operators_ingress
from router.channels.tombstones import Tombstones
from router.channels.whatsapp import Splitter
from router.clock import utc_now
from router.config import Config
from router.conservation import Conservation, recount
from router.database import migrate_database, open_database
from router.json_text import parse, storable
from router.postgres.archives import archives_of
from router.postgres.bridge import Bridge, open_bridge
from router.postgres.connections import ADMIN, connect
from router.postgres.errors import TRANSIENT, describe
from router.postgres.statements import statements
from router.reparse import StoredEvent, readable_again

T = TypeVar("T")

_LETTERS = statements("dead_letters")
_CHECK = statements("check")
_JOURNAL = statements("journal")
_EVENTS = statements("events")
_JOBS = statements("jobs")
_AUDIT = statements("audit")
_PAGE = 100  # events


class UnknownApp(Exception):
    """A stored body is of an app that the configuration does not have: nobody can say which numbers are its
    own."""

    def __init__(self, event_id: int, app: str) -> None:
        super().__init__(
            f"event {event_id} is of app {app!r}, which the configuration does not have with its secret; "
            "add it, or set the variable that has the secret"
        )


class CannotWatch(Exception):
    """A table cannot be watched; the message says why."""


class UnknownJob(Exception):
    """There is no job of this name."""


@dataclass(frozen=True, slots=True)
class Reparsed:
    """How many events and malformed items were split again, and how many of these items are readable now."""

    events: int = 0
    items: int = 0
    readable: int = 0

    def __add__(self, other: Reparsed) -> Reparsed:
        return Reparsed(self.events + other.events, self.items + other.items, self.readable + other.readable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Letters:
    """Which dead letters: those for which all that is given holds. `limit` None: all of them."""

    ids: tuple[uuid.UUID, ...] | None = None
    service: str | None = None
    status: str | None = None
    resolution: str | None = None
    session: str | None = None
    created_before: datetime | None = None
    limit: int | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As postroom_select_dead_letters takes them."""
        ids = None if self.ids is None else list(self.ids)
        return (
            ids, self.service, self.status, self.resolution, self.session, self.created_before, self.limit
        )  # fmt: skip


class Operations:
    """One connection to the database of a configuration."""

    def __init__(
        self, config: Config, bridge: Bridge, dsn: Callable[[], str], connection: asyncpg.Connection
    ) -> None:
        self.config = config
        self._bridge = bridge
        self._dsn = dsn
        self._connection = connection

    async def run(self, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        """Have something done with the connection, in the storage thread. Raises JournalUnavailable."""

        async def run() -> T:
            try:
                return await work(self._connection)
            except TRANSIENT as error:
                raise JournalUnavailable(describe(error)) from error

        return await self._bridge.run(run)

    async def adopt_spool(self, report: Callable[[str], None]) -> None:
        """Journal what ended processes left in the spool of the data directory. Raises SpoolUnavailable."""
        await adopt_spool(self.config, self._bridge, self._dsn, report)

    async def check(self) -> Conservation:
        return await self.run(recount)

    # Dead letters

    async def dead_letters(self, which: Letters) -> list[dict[str, Any]]:
        """The whole letters, oldest message first; `payload` is the message."""
        rows = await self.run(lambda c: c.fetch(_LETTERS["select"], *which.arguments))
        return [{**row, "payload": _payload(row["payload"])} for row in rows]

    async def choose(self, which: Letters) -> list[uuid.UUID]:
        """Those of them that can be retried, edited or discarded: not what is being processed, was delivered
        or was discarded."""
        rows = await self.run(lambda c: c.fetch(_LETTERS["choose"], *which.arguments))
        return [row["id"] for row in rows]

    async def retry(self, ids: Sequence[uuid.UUID], *, actor: str) -> int:
        """Ask whoever delivers to retry these now; returns how many could be: none that is being
        processed, was delivered or was discarded."""
        asked: int = await self.run(lambda c: c.fetchval(_LETTERS["retry"], utc_now(), actor, list(ids)))
        return asked

    async def discard(self, ids: Sequence[uuid.UUID], *, reason: str, actor: str) -> int:
        """Give these up for good; returns how many could be."""
        gone: int = await self.run(
            lambda c: c.fetchval(_LETTERS["discard"], utc_now(), actor, list(ids), reason)
        )
        return gone

    async def edit(self, identity: uuid.UUID, message: Mapping[str, Any], *, actor: str) -> int | None:
        """Replace the message and have it retried now. Returns the number of this edit, which becomes part
        of the idempotency key; None when the letter is not there, or not in a state to be edited.
        """
        edit: int | None = await self.run(
            lambda c: c.fetchval(_LETTERS["edit"], utc_now(), actor, identity, storable(message))
        )
        return edit

    # Events

    async def events(self, *, every: bool, reason: str | None, limit: int) -> list[dict[str, Any]]:
        """Stored bodies, newest first: those with malformed items, or all of them."""
        found = await self.run(lambda c: c.fetch(_EVENTS["select"], every, reason, limit))
        return [dict(row) for row in found]

    async def event(self, event_id: int) -> dict[str, Any] | None:
        """One of them with its bytes, and where its malformed items stand."""

        async def work(connection: asyncpg.Connection) -> dict[str, Any] | None:
            row = await connection.fetchrow(_EVENTS["show"], event_id)
            if row is None:
                return None
            malformed = await connection.fetch(_EVENTS["malformed"], event_id)
            return {**row, "malformed": [dict(one) for one in malformed]}

        return await self.run(work)

    async def reparse(
        self, ids: Sequence[int] | None, reason: str | None, *, dry_run: bool, actor: str
    ) -> Reparsed:
        """Split malformed items again, with the configuration as it is now, and journal what is readable.
        Repeating it is harmless.

        Raises:
            UnknownApp: an event is of an app that the configuration does not have.
        """
        done = Reparsed()
        after = 0
        async with operators_ingress(self.config, self._bridge, self._dsn) as (ingress, webhooks):
            while page := await self._malformed_after(after, ids, reason):
                for event in page:
                    splitter = webhooks.splitter_of(event.app)
                    if splitter is None:
                        raise UnknownApp(event.event_id, event.app)
                    delivery, paths = readable_again(splitter, event)
                    done += Reparsed(1, len(event.paths), len(paths))
                    if delivery is not None and not dry_run:
                        await self._journal_again(event.event_id, paths, ingress, delivery, actor)
                after = page[-1].event_id
        return done

    async def _malformed_after(
        self, after: int, ids: Sequence[int] | None, reason: str | None
    ) -> list[StoredEvent]:
        async def work(connection: asyncpg.Connection) -> list[StoredEvent]:
            wanted = None if ids is None else list(ids)
            found = []
            for row in await connection.fetch(_EVENTS["malformed_events"], after, wanted, reason, _PAGE):
                event = await connection.fetchrow(_EVENTS["show"], row["event_id"])
                if event is not None:
                    found.append(
                        StoredEvent(
                            row["event_id"],
                            event["app"],
                            event["body"],
                            event["correlation_id"],
                            event["traceparent"],
                            row["paths"],
                        )
                    )
            return found

        return await self.run(work)

    async def _journal_again(
        self, event_id: int, paths: list[str], ingress: Ingress, delivery: Delivery, actor: str
    ) -> None:
        """Three transactions, each of which may be the last: the whole can be done again."""
        await self.run(lambda c: c.execute(_EVENTS["forget_malformed"], event_id, paths))
        await ingress.append([delivery])
        await self.run(lambda c: c.execute(_EVENTS["mark_reparsed"], utc_now(), actor, event_id, paths))

    # Jobs

    async def jobs(self) -> list[dict[str, Any]]:
        """Every name of every job, with its switch, its schedule and its last run."""
        return [dict(row) for row in await self.run(lambda c: c.fetch(_JOBS["list"]))]

    async def job_runs(self, name: str | None, limit: int) -> list[dict[str, Any]]:
        """The newest runs first: of one job, or of all. Raises UnknownJob."""
        if name is not None and all(job["name"] != name for job in await self.jobs()):
            raise UnknownJob(name)
        return [dict(row) for row in await self.run(lambda c: c.fetch(_JOBS["runs"], name, limit))]

    async def run_job(self, name: str, *, actor: str, within: float) -> dict[str, Any] | None:
        """Have a job done now by whoever delivers; returns its run, None if nobody did it in that time.
        Raises UnknownJob."""
        asked = utc_now()
        job = await self._of_job(name, _JOBS["request"], asked, actor, name)
        with trio.move_on_after(within):
            while True:
                row = await self.run(lambda c: c.fetchrow(_JOBS["run_since"], job, asked))
                if row is not None:
                    return dict(row)
                await trio.sleep(0.1)
        return None

    async def switch_job(self, name: str, active: bool, *, actor: str) -> str:
        """Returns the job's own name. Raises UnknownJob."""
        return await self._of_job(name, _JOBS["switch"], utc_now(), actor, name, active)

    async def schedule_job(self, name: str, schedule: str, *, actor: str) -> str:
        """Returns the job's own name. Raises UnknownJob."""
        return await self._of_job(name, _JOBS["schedule"], utc_now(), actor, name, schedule)

    async def _of_job(self, name: str, statement: str, *arguments: Any) -> str:
        job: str | None = await self.run(lambda c: c.fetchval(statement, *arguments))
        if job is None:
            raise UnknownJob(name)
        return job

    async def drop_cron_views(self) -> bool:
        """Whether they were there."""
        dropped: bool = await self.run(lambda c: c.fetchval(_JOBS["drop_cron_views"]))
        return dropped

    async def settings(self) -> list[dict[str, Any]]:
        return [dict(row) for row in await self.run(lambda c: c.fetch(_JOBS["settings"]))]

    async def change_setting(self, name: str, value: int, *, actor: str) -> bool:
        """Whether there is such a setting."""
        return bool(
            await self.run(lambda c: c.fetchval(_JOBS["change_setting"], utc_now(), actor, name, value))
        )

    async def rls_audit(self) -> list[dict[str, Any]]:
        """Tables whose rows are open to somebody by mistake."""
        return [dict(row) for row in await self.run(lambda c: c.fetch(_JOBS["rls_audit"]))]

    # The audit log

    async def audit_log(
        self, table: str | None, identity: str | None, since: datetime | None, limit: int
    ) -> list[dict[str, Any]]:
        """Newest first: of one table, of one row (by its key, or by the hash of it), since then."""
        rows = await self.run(lambda c: c.fetch(_AUDIT["list"], table, identity, since, limit))
        return [{**row, "detail": orjson.loads(row["detail"])} for row in rows]

    async def watch(self, table: str, ignored: Sequence[str]) -> None:
        """Have the audit log know of every change. Raises CannotWatch."""
        await self._of_table(_AUDIT["watch"], table, list(ignored))

    async def unwatch(self, table: str) -> None:
        """Raises CannotWatch."""
        await self._of_table(_AUDIT["unwatch"], table)

    async def _of_table(self, statement: str, *arguments: Any) -> None:
        async def work(connection: asyncpg.Connection) -> None:
            try:
                await connection.execute(statement, *arguments)
            except (
                asyncpg.UndefinedTableError,
                asyncpg.RaiseError,
                asyncpg.InsufficientPrivilegeError,
                asyncpg.WrongObjectTypeError,
            ) as error:
                raise CannotWatch(str(error)) from None

        await self.run(work)

    async def tombstones(self) -> Tombstones:
        """Who was erased."""

        async def work(connection: asyncpg.Connection) -> Tombstones:
            tombstones = Tombstones()
            tombstones.load(
                await connection.fetchval(_JOURNAL["subjects_key"]),
                [(row["subject"], row["erased_at"]) for row in await connection.fetch(_JOURNAL["erasures"])],
            )
            return tombstones

        return await self.run(work)

    # Archives

    async def archives(self) -> list[dict[str, Any]]:
        """Those that were begun, oldest first; `tables` once they were read back."""
        found = await self.run(archives_of)
        return [
            {**row, "tables": None if row["tables"] is None else orjson.loads(row["tables"])} for row in found
        ]

    # Messages

    async def became_of(self, number: str, message_id: str) -> dict[str, Any] | None:
        """Where a message is, or None when it is not known."""

        async def work(connection: asyncpg.Connection) -> Any:
            key = await connection.fetchval(_JOURNAL["dedup_key"])
            splitter = Splitter("default", dedup_key=key, is_ours=lambda _: True)
            return await connection.fetchrow(_CHECK["became_of"], splitter.message_key(number, message_id))

        row = await self.run(work)
        return None if row is None else dict(row)

    async def ended(self, number: str, message_id: str, *, within: float) -> dict[str, Any] | None:
        """Where the message ended, or where it is after `within` seconds."""
        found: dict[str, Any] | None = None
        with trio.move_on_after(within):
            while found is None or found["place"] == "journaled":
                found = await self.became_of(number, message_id)
                await trio.sleep(0.05)
        return found


def as_stored(text: str) -> Any:
    """A JSON value as the database would give it back. Raises ValueError: it cannot be stored."""
    try:
        return parse(storable(parse(text.encode("utf-8", "surrogatepass"))).encode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _payload(text: str) -> Any:
    """The message; None for one that was put there by hand and that no router could read."""
    try:
        return parse(text.encode())
    except ValueError:
        return None


@asynccontextmanager
async def open_operations(
    config: Config, *, role: str = ADMIN, report: Callable[[str], None] = lambda line: None
) -> AsyncIterator[Operations]:
    """Connect as `role`; the schema must be up to date.

    Raises:
        EmbeddedPostgresError, MigrationError, JournalUnavailable: the database cannot be used.
    """
    async with open_database(config, report=report) as dsn, open_bridge() as bridge:
        await migrate_database(bridge, dsn(), apply=config.database_url is None, schema=config.schema)

        async def open_connection() -> asyncpg.Connection:
            try:
                return await connect(dsn(), name="operator", role=role)
            except TRANSIENT as error:
                raise JournalUnavailable(f"cannot connect to the database: {describe(error)}") from error

        connection = await bridge.run(open_connection)
        try:
            yield Operations(config, bridge, dsn, connection)
        finally:
            with trio.move_on_after(3) as closing:
                closing.shield = True
                await bridge.run(connection.close)
