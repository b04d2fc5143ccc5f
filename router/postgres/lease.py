"""The owner's lease: a row with an epoch. The advisory lock beside it is only a hint that lets a
successor start at once when the holder's database session has ended.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from datetime import timedelta

import asyncpg
import trio

from actors.errors import JournalUnavailable

from .bridge import Bridge
from .connections import Line
from .errors import TRANSIENT, translated
from .statements import statements

_SQL = statements("lease")

TTL = timedelta(seconds=5)
RENEW_EVERY = 1.0  # seconds
_MARGIN = 0.5  # seconds before the end in which nothing new is started
_LOOK_EVERY = 0.5  # seconds between looks of one that stands by
_DEAD_LETTERS = "postroom_dead_letters"
_JOURNAL = "postroom_journal"
_JOBS = "postroom_jobs"
_ERASURES = "postroom_erasures"
_SERVICES = "postroom_services"
_OUTBOX = "postroom_outbox"
_STATUSES = "postroom_statuses"


class PostgresLease:
    """The callbacks are called in the trio thread when another process has journaled something, asked for
    dead letters to be retried, asked for a job or switched one, erased a person, changed a service, or put a
    message into the outbox, or wrote down a status that a service is to be told; and when that may have been
    missed.
    """

    def __init__(
        self,
        bridge: Bridge,
        dsn: Callable[[], str],
        *,
        on_journal: Callable[[], None],
        on_dead_letters: Callable[[], None],
        on_jobs: Callable[[], None],
        on_erasures: Callable[[], None],
        on_services: Callable[[], None],
        on_outbox: Callable[[], None],
        on_statuses: Callable[[], None],
    ) -> None:
        self._bridge = bridge
        self._listeners = {
            _JOURNAL: on_journal,
            _DEAD_LETTERS: on_dead_letters,
            _JOBS: on_jobs,
            _ERASURES: on_erasures,
            _SERVICES: on_services,
            _OUTBOX: on_outbox,
            _STATUSES: on_statuses,
        }
        self._holder = uuid.uuid4()
        self._line = Line(dsn, "lease", on_open=self._opened)
        self._valid_until = float("-inf")  # trio's clock
        self._connected = False
        self._locked = False

    def held(self) -> bool:
        return self._connected and trio.current_time() < self._valid_until - _MARGIN

    async def acquire(self) -> int:
        while True:
            asked = trio.current_time()
            try:
                epoch = await self._bridge.run(self._take)
            except JournalUnavailable:
                epoch = None
            if epoch is not None:
                self._valid_until = asked + TTL.total_seconds()
                return epoch
            await trio.sleep(_LOOK_EVERY)

    async def hold(self, epoch: int) -> None:
        while True:
            await trio.sleep(RENEW_EVERY)
            asked = trio.current_time()
            try:
                if not await self._bridge.run(lambda: self._renew(epoch)):
                    self._valid_until = float("-inf")
                    await self._bridge.run(self._let_go)
                    return
            except JournalUnavailable:
                continue
            self._valid_until = asked + TTL.total_seconds()

    async def end(self, epoch: int) -> None:
        self._valid_until = float("-inf")
        await self._bridge.run(lambda: self._end(epoch))

    async def close(self) -> None:
        await self._bridge.run(self._line.close)

    async def _opened(self, connection: asyncpg.Connection) -> None:
        for channel in self._listeners:
            await connection.add_listener(channel, self._heard)
        connection.add_termination_listener(lambda _: self._bridge.call_soon(self._lost))
        self._locked = False
        self._bridge.call_soon(self._found)

    def _heard(self, _connection: object, _pid: int, channel: str, _payload: object) -> None:
        self._bridge.call_soon(self._listeners[channel])

    def _found(self) -> None:
        self._connected = True
        for look in self._listeners.values():
            look()  # for what was said while nobody listened

    def _lost(self) -> None:
        self._connected = False

    async def _take(self) -> int | None:
        with translated("lease"):
            try:
                async with self._line.use() as connection:
                    if not self._locked:
                        self._locked = await connection.fetchval(_SQL["hold_session_lock"])
                    epoch: int | None = await connection.fetchval(
                        _SQL["take"], self._holder, TTL, self._locked
                    )
                    if epoch is None and self._locked:
                        await connection.execute(_SQL["release_session_lock"])
                        self._locked = False
                    return epoch
            except TRANSIENT:
                self._line.drop()
                raise

    async def _renew(self, epoch: int) -> bool:
        with translated("lease"):
            try:
                async with asyncio.timeout(TTL.total_seconds()), self._line.use() as connection:
                    if not self._locked:
                        self._locked = await connection.fetchval(_SQL["hold_session_lock"])
                    renewed: bool = await connection.fetchval(_SQL["renew"], epoch, TTL, self._locked)
                    return renewed
            except TRANSIENT:
                self._line.drop()
                raise

    async def _end(self, epoch: int) -> None:
        with translated("lease"):
            async with self._line.use() as connection:
                await connection.execute(_SQL["end"], epoch)
        await self._let_go()

    async def _let_go(self) -> None:
        """Close the session: with it goes the lock, which is for the next holder."""
        self._locked = False
        await self._line.close()
