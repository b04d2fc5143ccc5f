"""Connections by use: one that appends, one that completes, a few that read. Each is reopened when it
was lost; nothing here knows what is asked over them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

import asyncpg

from .errors import TRANSIENT

# For connections that fetch rows by their keys. A partition that has just grown has no statistics, and a plan
# made of guesses would read all of it.
BY_KEY: Mapping[str, str] = {
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "max_parallel_workers_per_gather": "0",
}
# Whoever logs in is a member of all of them (migrations/0009_roles.sql) and works as one.
OWNER = "router_owner"
SERVICE = "router_service"
ADMIN = "router_admin"
CONNECT_TIMEOUT = 5.0  # seconds; the database probe is bounded by the same (M26)
STATEMENT_TIMEOUT = 30.0


async def connect(
    dsn: str,
    *,
    name: str,
    role: str | None,
    statement_timeout: float | None = STATEMENT_TIMEOUT,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> asyncpg.Connection:
    """One connection, durable on its own account whatever the server's default is. `role` None: as whoever
    logs in, which is for migrations, before which there are no roles. `settings` are added.
    """
    return await asyncpg.connect(
        dsn,
        timeout=CONNECT_TIMEOUT,
        command_timeout=statement_timeout,
        server_settings={
            "application_name": f"postroom/{name}",
            "synchronous_commit": "on",
            "timezone": "UTC",
            "jit": "off",
            "tcp_keepalives_idle": "5",
            "tcp_keepalives_interval": "2",
            "tcp_keepalives_count": "3",
            **({} if role is None else {"role": role}),
            **settings,
        },
    )


class Line:
    """One connection that is used by one caller at a time and reopened when it is gone."""

    def __init__(
        self,
        dsn: Callable[[], str],
        name: str,
        *,
        role: str = SERVICE,
        on_open: Callable[[asyncpg.Connection], Awaitable[None]] | None = None,
        settings: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._dsn = dsn
        self._name = name
        self._role = role
        self._settings = settings
        self._on_open = on_open
        self._connection: asyncpg.Connection | None = None
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def use(self) -> AsyncIterator[asyncpg.Connection]:
        """The open connection. What the block raises leaves it as it is, unless it was lost."""
        async with self._lock:
            if self._connection is None or self._connection.is_closed():
                connection = await connect(
                    self._dsn(), name=self._name, role=self._role, settings=self._settings
                )
                try:
                    if self._on_open is not None:
                        await self._on_open(connection)
                except BaseException:
                    connection.terminate()
                    raise
                self._connection = connection
            yield self._connection

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        """Rows of one statement; after trouble with the connection another one is used."""
        try:
            async with self.use() as connection:
                rows: list[Any] = await connection.fetch(statement, *arguments)
                return rows
        except TRANSIENT:
            self.drop()
            raise

    def drop(self) -> None:
        """Use a new connection next time: what this one did last is unknown."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def close(self) -> None:
        async with self._lock:
            if self._connection is not None and not self._connection.is_closed():
                try:
                    await self._connection.close(timeout=2)
                except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                    self._connection.terminate()
            self._connection = None


class Lines:
    """A few lines for reads by key; the next free one is used."""

    def __init__(self, dsn: Callable[[], str], name: str, count: int) -> None:
        self._lines = [Line(dsn, f"{name}-{number}", settings=BY_KEY) for number in range(count)]
        self._free: asyncio.Queue[Line] = asyncio.Queue()
        for line in self._lines:
            self._free.put_nowait(line)

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        line = await self._free.get()
        try:
            async with line.use() as connection:
                rows: list[Any] = await connection.fetch(statement, *arguments)
                return rows
        finally:
            self._free.put_nowait(line)

    async def close(self) -> None:
        for line in self._lines:
            await line.close()
