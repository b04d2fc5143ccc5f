"""A Postgres that is there and cannot be used: read-only after a failover, out of connections, unreachable
without a word. Each time webhooks are answered 200 from the spool, health says degraded, and afterwards
everything is delivered in order. One that is only slow is used.
"""

# ruff: noqa: ASYNC110 - tables and directories send no events

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, RouterProcess, Services

from router.postgres.embedded import EmbeddedPostgres

pytestmark = pytest.mark.postgres


class Proxy:
    """A TCP port in front of the server's socket. From `black_hole` to `heal` it takes and forwards nothing,
    and closes nothing either.
    """

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path
        self._open = trio.Event()
        self._open.set()
        self.port = 0

    def black_hole(self) -> None:
        self._open = trio.Event()

    def heal(self) -> None:
        self._open.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        await trio.serve_listeners(self._carry, listeners, task_status=task_status)

    async def _carry(self, client: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            await self._open.wait()
            server = await trio.open_unix_socket(self._socket_path)
            async with client, server, trio.open_nursery() as nursery:
                nursery.start_soon(self._copy, client, server)
                nursery.start_soon(self._copy, server, client)

    async def _copy(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            while data := await source.receive_some(65_536):
                await self._open.wait()
                await target.send_all(data)
        await source.aclose()
        await target.aclose()


@dataclass
class Place:
    """A router on a Postgres behind a proxy, with its services."""

    home: Path
    router: RouterProcess
    services: Services
    database: Database
    proxy: Proxy
    sent: int = 0

    async def say(self, count: int = 5) -> None:
        """So many messages of one conversation, each answered 200."""
        for _ in range(count):
            self.sent += 1
            message = kit.new_message(f"taxi #{self.sent}", sender="999004000001")
            with trio.fail_after(20):
                assert await kit.post(self.router.webhook, kit.body_of(message)) == 200

    async def until_health_is(self, wanted: str) -> None:
        with trio.fail_after(kit.HANGS):
            while True:
                status, body = await kit.get(f"{self.router.admin}/health")
                assert status == 200
                if json.loads(body)["status"] == wanted:
                    return
                await trio.sleep(0.1)

    async def until_all_are_delivered(self) -> None:
        await self.services.until_seen(self.sent)
        texts = [sight.text for sight in self.services.sights]
        assert list(dict.fromkeys(texts)) == [f"taxi #{number}" for number in range(1, self.sent + 1)]
        await self.database.until(lambda count: count == 0)
        conservation = await self.database.recount()
        assert conservation.ok, conservation.problems


@asynccontextmanager
async def open_place(home: Path, *, max_connections: int | None = None) -> AsyncIterator[Place]:
    postgres = EmbeddedPostgres(home / "outside")
    dsn = (await postgres.start()).dsn
    if max_connections is not None:
        await Database(dsn).fetch(f"ALTER SYSTEM SET max_connections = {max_connections}")
        await postgres.stop()
        dsn = (await postgres.start()).dsn
    parts = urlsplit(dsn)
    query = parse_qs(parts.query)
    proxy = Proxy(f"{query['host'][0]}/.s.PGSQL.{query['port'][0]}")
    try:
        async with kit.open_services() as services, trio.open_nursery() as nursery:
            await nursery.start(proxy.run)
            url = f"postgresql://{parts.netloc}127.0.0.1:{proxy.port}{parts.path}"
            config = kit.write_config(home, services)
            environment = kit.environment(DATABASE_URL=url)
            arguments = ("--data-dir", home / "data", "--config", config, "--migrate")
            async with kit.serving(home, *arguments, env=environment) as router:
                yield Place(home, router, services, Database(dsn), proxy)
                assert await router.stop() == 0
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await postgres.stop()


async def through(
    place: Place, begin: Callable[[], Awaitable[None]], end: Callable[[], Awaitable[None]]
) -> None:
    await place.say()
    await place.until_all_are_delivered()
    await begin()
    await place.say()
    await place.until_health_is("degraded")
    await place.say()
    await end()
    await place.until_health_is("healthy")
    await place.say()
    await place.until_all_are_delivered()


async def test_a_database_that_takes_no_writes(home: Path) -> None:
    async with open_place(home) as place:

        async def set_read_only(value: str) -> None:
            await place.database.fetch(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
            await place.database.fetch("SELECT pg_reload_conf()")

        async def writable() -> None:
            async def work(connection: asyncpg.Connection) -> None:
                await connection.execute("SET default_transaction_read_only = off")
                await connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
                await connection.execute("SELECT pg_reload_conf()")

            await place.database.run(work)

        await through(place, lambda: set_read_only("on"), writable)


async def hold_every_connection(dsn: str, held: threading.Event, release: threading.Event) -> None:
    """End all sessions of the router, and take the place of each before it is back."""
    mine = [await asyncpg.connect(dsn)]
    while True:
        with suppress(asyncpg.TooManyConnectionsError):
            while True:
                mine.append(await asyncpg.connect(dsn))
        ended = await mine[0].fetchval(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE application_name LIKE 'postroom/%'"
        )
        if not ended:
            break
    held.set()
    while not release.is_set():  # of another thread
        await asyncio.sleep(0.05)
    for connection in mine:
        await connection.close()


async def test_a_database_that_has_no_connection_left(home: Path) -> None:
    async with open_place(home, max_connections=20) as place, trio.open_nursery() as nursery:
        held, release = threading.Event(), threading.Event()

        async def exhaust() -> None:
            work = partial(hold_every_connection, place.database.dsn, held, release)
            nursery.start_soon(trio.to_thread.run_sync, lambda: asyncio.run(work()))
            with trio.fail_after(kit.HANGS):
                while not held.is_set():
                    await trio.sleep(0.05)

        async def let_go() -> None:
            release.set()

        await through(place, exhaust, let_go)


async def test_a_database_that_is_out_of_reach_without_a_word(home: Path) -> None:
    async with open_place(home) as place:

        async def vanish() -> None:
            place.proxy.black_hole()

        async def come_back() -> None:
            place.proxy.heal()

        await through(place, vanish, come_back)


async def test_a_database_whose_commits_are_slow(home: Path) -> None:
    """A tenth of a second each: what comes meanwhile shares the next one, and nothing is degraded."""
    async with open_place(home) as place:
        for setting in ("commit_delay = 100000", "commit_siblings = 0"):
            await place.database.fetch(f"ALTER SYSTEM SET {setting}")
        await place.database.fetch("SELECT pg_reload_conf()")
        before = await place.database.value(_FLUSHES)
        messages = [kit.new_message("taxi", sender=f"99900500{number:04}") for number in range(60)]
        async with trio.open_nursery() as nursery:
            for message in messages:
                nursery.start_soon(accepted, place, message)
        assert await place.database.value(_FLUSHES) - before < 30
        place.sent = len(messages)
        await place.services.until_seen(place.sent)
        await place.until_health_is("healthy")
        assert {sight.message_id for sight in place.services.sights} == {m.message_id for m in messages}
        await place.database.until(lambda count: count == 0)
        assert (await place.database.recount()).ok


_FLUSHES = "SELECT coalesce(sum(flush), 0)::bigint FROM journal_writers"


async def accepted(place: Place, message: kit.Message) -> None:
    assert await kit.post(place.router.webhook, kit.body_of(message)) == 200
