"""Postgres dies under the router: the postmaster, the backend that appends, and connections in the middle
of a COMMIT, whose outcome is then unknown. Nothing is lost and nothing is stored twice.
"""

# ruff: noqa: ASYNC110 - tables send no events

from __future__ import annotations

import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, Load, Plan, open_services

from router.postgres.embedded import EmbeddedPostgres
from router.postgres.postmaster import PORT, socket_path

pytestmark = pytest.mark.postgres

AT_LEAST = 50


async def kill_postmaster(home: Path, rounds: int, *, seed: int) -> None:
    data = home / "data"
    database = Database.of(data)
    counted: list[int] = []
    async with open_services() as services:
        slow = False
        services.plan = lambda sight: Plan(delay=0.3 if slow else 0.0)
        load = Load(services.ledger, seed=seed)
        config = kit.write_config(home, services)
        async with kit.serving(home, "--data-dir", data, "--config", config) as router:
            load.urls = [router.webhook]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(load.run)
                for _ in range(2 * rounds):
                    slow = True
                    unfinished = await database.until(lambda count: count >= AT_LEAST + 30)
                    postmaster = kit.postmaster_of(data)
                    assert postmaster is not None
                    os.kill(postmaster, signal.SIGKILL)
                    before = len(services.sights)
                    await back(database, data, postmaster)
                    # The tables cannot be asked while Postgres is down: what the services were given since
                    # the count is taken off it.
                    unfinished -= len(services.sights) - before
                    if unfinished >= AT_LEAST:
                        counted.append(unfinished)
                        kit.say(f"round {len(counted)}: at least {unfinished} unfinished items at the kill")
                    slow = False
                    if len(counted) == rounds:
                        break
                    await kit.caught_up(load, database)
                await trio.sleep(0.5)  # of traffic on the recovered server
                load.stop()
            assert load.unanswered == 0
            await database.until(lambda count: count == 0)
            report = await kit.verdict(database, services)
            assert await router.stop() == 0
    kit.say(f"{report.received} messages answered 200, {report.repeats} delivered again")
    assert len(counted) == rounds
    assert report.received == report.distinct == sum(report.delivered.values())


async def back(database: Database, data: Path, old: int) -> None:
    """Wait for another postmaster that answers."""
    with trio.fail_after(kit.HANGS):
        while True:
            if kit.postmaster_of(data) not in (None, old):
                with suppress(Exception):
                    await database.value("SELECT 1")
                    return
            await trio.sleep(0.02)


async def test_postmaster_killed_under_load(home: Path) -> None:
    await kill_postmaster(home, 1, seed=3)


@pytest.mark.acceptance
async def test_postmaster_killed_five_times_under_load(home: Path) -> None:
    await kill_postmaster(home, 5, seed=4)


async def kill_backends(home: Path, rounds: int, *, seed: int) -> None:
    """The backend that executes the append is killed, which makes the postmaster end all others, too."""
    data = home / "data"
    database = Database.of(data)
    killed = 0
    async with open_services() as services:
        slow = True
        services.plan = lambda sight: Plan(delay=0.3 if slow else 0.0)
        load = Load(services.ledger, seed=seed)
        config = kit.write_config(home, services)
        async with kit.serving(home, "--data-dir", data, "--config", config) as router:
            load.urls = [router.webhook]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(load.run)
                for _ in range(3 * rounds):
                    if killed == rounds:
                        break
                    slow = True
                    unfinished = await database.until(lambda count: count >= AT_LEAST + 30)
                    before = len(services.sights)
                    if await kill_appending_backend(database):
                        unfinished -= len(services.sights) - before
                        if unfinished >= AT_LEAST:
                            killed += 1
                            kit.say(f"round {killed}: at least {unfinished} unfinished items at the kill")
                        slow = False
                        await answers_again(database)
                        await kit.caught_up(load, database)
                load.stop()
            assert load.unanswered == 0
            await database.until(lambda count: count == 0)
            report = await kit.verdict(database, services)
            assert await router.stop() == 0
    assert killed == rounds
    assert report.received == report.distinct == sum(report.delivered.values())


async def kill_appending_backend(database: Database) -> bool:
    """SIGKILL it while it executes, or false when it was never seen to."""

    async def look_and_kill(connection: object) -> bool:
        for _ in range(2_000):
            pid = await connection.fetchval(  # type: ignore[attr-defined]
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'postroom/append' "
                "AND state = 'active' AND query LIKE '%postroom_append%'"
            )
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    # Its own connection goes down with the others, perhaps before it could say that it killed one.
    with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return bool(await database.run(look_and_kill))
    return False


async def answers_again(database: Database) -> None:
    with trio.fail_after(kit.HANGS):
        while True:
            with suppress(Exception):
                await database.value("SELECT 1")
                return
            await trio.sleep(0.02)


async def test_appending_backend_killed_under_load(home: Path) -> None:
    await kill_backends(home, 1, seed=5)


@pytest.mark.acceptance
async def test_appending_backend_killed_five_times_under_load(home: Path) -> None:
    await kill_backends(home, 5, seed=6)


# Connections that break in the middle of a commit

APPEND = re.compile(rb"postroom_append\s*\(")
BIND, PARSE = b"B", b"P"


class Proxy:
    """Stands between the router and Postgres, on a socket of its own, and can break the connection of the
    next append: before the server gets it, or when the server has answered it and thus committed.
    """

    def __init__(self, socket_dir: Path) -> None:
        self.socket_dir = socket_dir
        self.cut: str | None = None
        self.cuts: list[str] = []
        self._target = ""

    def dsn(self) -> str:
        return f"postgresql://postroom@/postroom?host={quote(str(self.socket_dir), safe='')}&port={PORT}"

    async def run(self, target: Path, *, task_status: trio.TaskStatus[None]) -> None:
        self._target = str(target)
        listening = trio.socket.socket(trio.socket.AF_UNIX)
        await listening.bind(str(socket_path(self.socket_dir)))
        listening.listen(50)
        await trio.serve_listeners(
            self._connection, [trio.SocketListener(listening)], task_status=task_status
        )

    async def _connection(self, client: trio.SocketStream) -> None:
        async with client, await trio.open_unix_socket(self._target) as server:
            link = _Link(self, client, server)
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(link.up, nursery.cancel_scope)
                    nursery.start_soon(link.down, nursery.cancel_scope)


class _Link:
    """One connection. Statements are prepared by name once, so it remembers which name is the append."""

    def __init__(self, proxy: Proxy, client: trio.SocketStream, server: trio.SocketStream) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._append: bytes | None = None
        self._cut_answer = False
        self._greeted = False
        self._pending = bytearray()

    async def up(self, scope: trio.CancelScope) -> None:
        while chunk := await self._client.receive_some(65_536):
            if self._is_append(chunk) and self._proxy.cut is not None:
                cut, self._proxy.cut = self._proxy.cut, None
                self._proxy.cuts.append(cut)
                if cut == "before":
                    break
                self._cut_answer = True
            await self._server.send_all(chunk)
        scope.cancel()

    async def down(self, scope: trio.CancelScope) -> None:
        while chunk := await self._server.receive_some(65_536):
            if self._cut_answer:
                # The answer to an append begins when its transaction is ready; ReadyForQuery ends it.
                while not chunk.endswith(b"Z\x00\x00\x00\x05I"):
                    chunk += await self._server.receive_some(65_536)
                break
            await self._client.send_all(chunk)
        scope.cancel()

    def _is_append(self, chunk: bytes) -> bool:
        """Whether a Bind of the append begins in what has come by now."""
        self._pending += chunk
        found = False
        while True:
            head = 0 if not self._greeted else 1
            if len(self._pending) < head + 4:
                return found
            kind = bytes(self._pending[:head])
            length = int.from_bytes(self._pending[head : head + 4], "big")
            whole = len(self._pending) >= head + length
            content = bytes(self._pending[head + 4 : head + length])
            if kind == BIND and not whole:
                # A flush may be larger than one read: its name stands at the beginning.
                return found or self._names_append(content)
            if not whole:
                return found
            if kind == PARSE and APPEND.search(content):
                self._append = content.split(b"\0", 1)[0]
            found |= kind == BIND and self._names_append(content)
            self._greeted |= head == 0 and length != 8  # 8: an SSLRequest comes before the greeting
            del self._pending[: head + length]

    def _names_append(self, content: bytes) -> bool:
        portal_and_name = content.split(b"\0", 2)
        return self._append is not None and portal_and_name[1:2] == [self._append]


@asynccontextmanager
async def proxied(home: Path) -> AsyncIterator[tuple[Proxy, Database]]:
    postgres = EmbeddedPostgres(home / "data")
    await postgres.start()
    sockets = home / "proxy"
    sockets.mkdir()
    proxy = Proxy(sockets)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(proxy.run, socket_path(home / "data" / "run"))
            yield proxy, Database(postgres.dsn())
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await postgres.stop()


async def cut_once(proxy: Proxy, cut: str) -> None:
    done = len(proxy.cuts)
    proxy.cut = cut
    with trio.fail_after(kit.HANGS):
        while len(proxy.cuts) == done:
            await trio.sleep(0.005)


@pytest.mark.parametrize("cut", ["before", "after"])
async def test_a_lone_append_whose_connection_breaks_is_stored_once(home: Path, cut: str) -> None:
    async with proxied(home) as (proxy, database), open_services() as services:
        config = kit.write_config(home, services)
        async with kit.serving(home, "--database-url", proxy.dsn(), "--config", config) as router:
            assert await kit.post(router.webhook, kit.body_of(kit.new_message("taxi"))) == 200
            await services.until_seen(1)
            flushes = await database.value("SELECT sum(flush) FROM journal_writers")
            second = kit.new_message("taxi please")
            proxy.cut = cut
            assert await kit.post(router.webhook, kit.body_of(second)) == 200
            assert proxy.cuts == [cut]
            await services.until_seen(2)
            await database.until(lambda count: count == 0)
            places = await database.fetch(
                "SELECT place FROM whatsapp_messages WHERE message_id = $1", second.message_id
            )
            assert [row["place"] for row in places] == ["delivered"]
            assert await database.value("SELECT duplicates FROM journal_head") == 0
            # A commit that was in doubt is found by its number and not made again: the number that the
            # second attempt would have had was not used.
            writers = await database.value("SELECT sum(flush) FROM journal_writers")
            assert writers == flushes + (1 if cut == "after" else 2)
            assert len(services.of(second.message_id)) == 1
            assert (await database.recount()).ok
            assert await router.stop() == 0


async def cut_under_load(home: Path, rounds: int, *, seed: int) -> None:
    async with proxied(home) as (proxy, database), open_services() as services:
        slow = False
        services.plan = lambda sight: Plan(delay=0.3 if slow else 0.0)
        load = Load(services.ledger, seed=seed)
        config = kit.write_config(home, services)
        async with kit.serving(home, "--database-url", proxy.dsn(), "--config", config) as router:
            load.urls = [router.webhook]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(load.run)
                done = 0
                for _ in range(3 * rounds):
                    if done == rounds:
                        break
                    slow = True
                    unfinished = await database.until(lambda count: count >= AT_LEAST + 30)
                    before = len(services.sights)
                    await cut_once(proxy, "after" if done % 2 else "before")
                    unfinished -= len(services.sights) - before
                    done += unfinished >= AT_LEAST
                    kit.say(
                        f"round {done}: at least {unfinished} unfinished items, cut {proxy.cuts[-1]} commit"
                    )
                    slow = False
                    await kit.caught_up(load, database)
                load.stop()
            assert load.unanswered == 0
            await database.until(lambda count: count == 0)
            report = await kit.verdict(database, services)
            assert await router.stop() == 0
    assert done == rounds
    assert report.received == report.distinct == sum(report.delivered.values())
    assert report.repeats == 0


async def test_connections_cut_during_commit_under_load(home: Path) -> None:
    await cut_under_load(home, 4, seed=7)


@pytest.mark.acceptance
async def test_connections_cut_twenty_times_during_commit_under_load(home: Path) -> None:
    await cut_under_load(home, 20, seed=8)
