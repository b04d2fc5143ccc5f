"""The journal on Postgres: one statement, one round trip, one transaction for each flush and each batch
of completions. What the statements do stands in migrations/0001_journal.sql.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from datetime import datetime, timedelta
from typing import Any

import asyncpg

from actors.errors import JournalUnavailable
from actors.messages import Appended, Backlog, Completion, Delivery, Duplicates, Item, Session
from actors.ports import Clock

from . import rows
from .bridge import Bridge
from .connections import OWNER, Line, Lines
from .errors import FLUSH_GIVEN_UP, TRANSIENT, is_homeless, translated
from .statements import statements

LEDGER_GENERATION = timedelta(days=8)  # dedup is guaranteed for 8 to 16 days (Meta redelivers for 7)
PARTITIONS_AHEAD = 4  # weeks and months
_APPEND_ARGUMENTS = 9  # of rows.flush_arguments
_RELEASED_AT_ONCE = 1_000  # dead letters
_LOCK_ATTEMPTS = 5
_LOCK_PAUSE = 0.5  # seconds
PATIENCE = 2.0  # seconds that a flush waits for a database that is just being restarted
WITH_A_SPOOL = 0.25  # the same, where it need not wait
FLUSH_SECONDS = 5.0  # a server that does not answer for so long counts as away: a flush takes milliseconds


class PostgresJournal:
    """One per process. `notify` is asked at each flush: true when another process may deliver. `patience`:
    seconds for which a flush is tried before it fails. `sends`: whether replies are to be sent; those that
    were committed without that never are. `on_homeless` is told, in the storage thread, of a flush whose time
    had no partition; it gets one.
    """

    def __init__(
        self,
        bridge: Bridge,
        dsn: Callable[[], str],
        *,
        clock: Clock,
        notify: Callable[[], bool],
        patience: float = PATIENCE,
        sends: bool = False,
        on_homeless: Callable[[datetime], None] = lambda moment: None,
    ) -> None:
        self._bridge = bridge
        self._clock = clock
        self._notify = notify
        self._patience = patience
        self._on_homeless = on_homeless
        self._reply_status = "pending" if sends else "unsent"
        self._writer = uuid.uuid4()
        self._flush = 0
        self._append_line = Line(dsn, "append", on_open=self._register)
        self._complete_line = Line(dsn, "complete")
        self._ddl_line = Line(dsn, "ddl", role=OWNER)
        self._read_lines = Lines(dsn, "read", 2)

    async def close(self) -> None:
        async def close() -> None:
            for line in (self._append_line, self._complete_line, self._ddl_line, self._read_lines):
                await line.close()

        await self._bridge.run(close)

    # Writing

    async def append(
        self, deliveries: Sequence[Delivery], *, duplicates: int
    ) -> Appended | Duplicates | None:
        arguments = rows.flush_arguments(deliveries)
        notify = self._notify()
        return await self._bridge.run(lambda: self._append(self._clock(), notify, duplicates, arguments))

    async def _append(
        self, now: datetime, notify: bool, duplicates: int, arguments: list[Any]
    ) -> Appended | Duplicates | None:
        loop = asyncio.get_running_loop()
        statement = _SQL["append"] if len(arguments) == _APPEND_ARGUMENTS else _SQL["append_erased"]
        give_up = loop.time() + self._patience
        in_doubt = given_a_home = False
        while True:
            try:
                async with asyncio.timeout(FLUSH_SECONDS), self._append_line.use() as connection:
                    if in_doubt:
                        if await connection.fetchval(_SQL["resolve_flush"], self._writer, self._flush):
                            return None
                        in_doubt = False
                    self._flush += 1
                    in_doubt = True
                    row = await connection.fetchrow(
                        statement, self._writer, self._flush, now, notify, duplicates, *arguments
                    )
                    return _appended(row, now)
            except (asyncpg.PostgresError, *TRANSIENT) as error:
                if _was_rolled_back(error):
                    in_doubt = False
                    if is_homeless(error) and not given_a_home:
                        # The time of this flush has no partition: nobody made it ahead, or the clock leapt.
                        self._on_homeless(now)
                        with translated("append"):
                            await self._change("make_partitions", now, PARTITIONS_AHEAD)
                        given_a_home = True
                        continue
                    if getattr(error, "sqlstate", None) != FLUSH_GIVEN_UP:
                        with translated("append"):
                            raise
                self._append_line.drop()
                if loop.time() >= give_up:
                    with translated("append"):
                        raise
                await asyncio.sleep(0.05)

    async def _register(self, connection: asyncpg.Connection) -> None:
        await connection.execute(
            _SQL["register_writer"], self._writer, max(self._flush - 1, 0), self._clock()
        )

    async def complete(
        self, completions: Sequence[Completion], *, epoch: int, low_water: int, stragglers: Sequence[int]
    ) -> None:
        now = self._clock()
        first = [completion for completion in completions if completion.item.dead_letter is None]
        replays = [completion for completion in completions if completion.item.dead_letter is not None]
        arguments = rows.completion_arguments(first, now, self._reply_status)
        replay_arguments = [rows.replay_arguments(replay, now, self._reply_status) for replay in replays]

        async def complete() -> None:
            with translated("complete"):
                try:
                    async with self._complete_line.use() as connection, AsyncExitStack() as stack:
                        if replay_arguments:  # one statement is a transaction by itself
                            await stack.enter_async_context(connection.transaction())
                        await connection.execute(
                            _SQL["complete"], epoch, now, low_water, stragglers, *arguments
                        )
                        for replay in replay_arguments:
                            await connection.execute(_SQL["complete_replay"], epoch, now, *replay)
                except TRANSIENT:
                    self._complete_line.drop()
                    raise

        await self._bridge.run(complete)

    # Reading

    async def undelivered(self) -> Backlog:
        found = await self._fetch("newest")
        newest: int = found[0][0]
        open_items = await self._fetch("undelivered")
        if open_items:
            newest = open_items[0]["newest"]
        return Backlog([(row["seq"], row["session_key"]) for row in open_items], newest)

    async def tail(self, after: int, limit: int) -> tuple[list[Item], int]:
        newest: int = (await self._fetch("newest"))[0][0]
        last = min(newest, after + limit)
        if last <= after:
            return [], after
        return rows.items_of(await self._fetch("tail", after, last)), last

    async def read(self, seqs: Sequence[int]) -> list[Item]:
        return rows.items_of(await self._fetch("read", list(seqs)))

    async def load_sessions(self, keys: Sequence[str]) -> Mapping[str, tuple[Session, datetime]]:
        found = await self._fetch("load_sessions", list(keys))
        return {row["session_key"]: (rows.session_of(row), row["last_interaction"]) for row in found}

    async def home_menu(self) -> list[Any]:
        """The active rows of the home menu: country, language, domain, title, description."""
        return await self._fetch("home_menu")

    async def services(self) -> tuple[list[Any], list[Any]]:
        """The versions of the registry's services, newest first for each (service, version, state,
        definition); and their secrets (service, secret, token_sha256).
        """
        return await self._fetch("versions"), await self._fetch("secrets")

    async def probe(self) -> None:
        """Raises JournalUnavailable: the database is away, or takes no writes, as after a failover."""
        if (await self._fetch("takes_no_writes"))[0][0]:
            raise JournalUnavailable("the database is read-only")

    async def dedup_key(self) -> bytes:
        """The key of the ledger's hashes."""
        value: bytes = (await self._fetch("dedup_key"))[0][0]
        return value

    async def erasures(self) -> tuple[bytes, list[tuple[str, datetime]]]:
        """The key of the hashes of erased persons' names, and these with the time of each erasure."""
        key: bytes = (await self._fetch("subjects_key"))[0][0]
        return key, [(row["subject"], row["erased_at"]) for row in await self._fetch("erasures")]

    # Dead letters

    async def release_dead_letters(self, epoch: int, *, keep: Sequence[str] = ()) -> None:
        last = None
        kept = [uuid.UUID(identity) for identity in keep]
        while True:
            found = await self._fetch(
                "release_dead_letters", epoch, self._clock(), kept, last, _RELEASED_AT_ONCE
            )
            last = found[0][0]
            if last is None:
                return

    async def claim_dead_letters(
        self, epoch: int, limit: int, services: Sequence[str], *, others: bool = False
    ) -> list[Item]:
        claimed = await self._fetch("claim_dead_letters", epoch, self._clock(), limit, list(services), others)
        return [rows.replay_of(row) for row in claimed]

    async def expire_dead_letters(self, epoch: int, max_age: timedelta) -> int:
        now = self._clock()
        expired: int = (await self._fetch("expire_dead_letters", epoch, now, now - max_age))[0][0]
        return expired

    async def log_retry_run(
        self,
        epoch: int,
        *,
        took: float,
        processed: int,
        failed: int,
        error: str | None,
        services: Sequence[str],
    ) -> Mapping[str, float]:
        now = self._clock()
        began = now - timedelta(seconds=took)
        said = None if error is None else rows.text(error)
        found = await self._fetch("log_retry_run", epoch, began, now, processed, failed, said, list(services))
        return {row["service"]: (row["due"] - now).total_seconds() for row in found}

    async def held_pairs(self) -> list[tuple[str, str]]:
        return [(row["session_key"], row["service"]) for row in await self._fetch("held_pairs")]

    async def ask_for_retries(self) -> None:
        """Whoever delivers begins a run of the retrier now."""
        await self._fetch("ask_for_run")

    async def dead_letter_counts(self) -> tuple[int, int, datetime | None]:
        """How many are pending or processing, how many failed, and when the last run ended."""
        row = (await self._fetch("dead_letter_counts"))[0]
        return row["open"], row["failed"], row["last_run"]

    async def _fetch(self, name: str, *arguments: Any) -> list[Any]:
        async def fetch() -> list[Any]:
            with translated(name):
                return await self._read_lines.fetch(_SQL[name], *arguments)

        return await self._bridge.run(fetch)

    # Housekeeping

    async def keep_house(self) -> None:
        """What has to be there before the first flush: its partition, and a ledger whose time is not over."""
        await self.make_partitions()
        await self.rotate_ledger()

    async def make_partitions(self) -> int:
        """Those of now and ahead that are missing; returns how many were made."""
        made: int = await self._change_schema("make_partitions", PARTITIONS_AHEAD)
        return made

    async def rotate_ledger(self) -> bool:
        """Begin a new generation of the ledger when it is time; returns whether it was."""
        return bool(await self._change_schema("rotate_dedup_ledger", LEDGER_GENERATION))

    async def _change_schema(self, name: str, argument: object) -> Any:
        async def change() -> Any:
            with translated(name):
                return await self._change(name, self._clock(), argument)

        return await self._bridge.run(change)

    async def _change(self, name: str, *arguments: object) -> Any:
        """Over a connection of its own. It waits for no lock so long that others wait behind it: it tries
        again instead."""
        async with self._ddl_line.use() as connection:
            await connection.execute(_SQL["bound_lock_waits"])
            for _ in range(_LOCK_ATTEMPTS - 1):
                with suppress(asyncpg.LockNotAvailableError):
                    return await connection.fetchval(_SQL[name], *arguments)
                await asyncio.sleep(_LOCK_PAUSE)
            return await connection.fetchval(_SQL[name], *arguments)


def _was_rolled_back(error: BaseException) -> bool:
    """The server itself said that the statement failed. Class 57 is a server going away: it may have
    committed first."""
    return (
        isinstance(error, asyncpg.PostgresError)
        and not isinstance(error, asyncpg.PostgresConnectionError | asyncpg.OperatorInterventionError)
        and error.sqlstate is not None
    )


def _appended(row: Any, now: datetime) -> Appended | Duplicates:
    if row["dup_positions"] is not None:
        return Duplicates([position - 1 for position in row["dup_positions"]], list(row["dup_seqs"]))
    joins = zip(row["join_positions"] or (), row["join_keys"] or (), strict=True)
    return Appended(
        first_seq=row["first_seq"],
        session_keys=row["session_keys"] or [],
        joins={position - 1: key for position, key in joins},
        received_at=now,
    )


_SQL = {**statements("journal"), **statements("retrier"), **statements("services")}
