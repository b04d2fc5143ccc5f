"""The bridge: results, exceptions, cancellation that waits, many callers, its end."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import pytest
import trio
from postgres_kit import Database, database, database_dsn, server

from router.postgres.bridge import open_bridge
from router.postgres.connections import Line

__all__ = ["database", "database_dsn", "server"]

HANGS = 10.0


async def answer(value: object) -> object:
    await asyncio.sleep(0)
    return value


async def test_the_result_comes_back_from_another_thread() -> None:
    async def where() -> tuple[int, str]:
        return threading.get_ident(), type(asyncio.get_running_loop()).__module__

    async with open_bridge() as bridge:
        thread, loop = await bridge.run(where)
        assert thread != threading.get_ident()
        assert loop.startswith("uvloop")
        assert await bridge.run(lambda: answer(None)) is None


async def test_what_is_raised_comes_back() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise ArithmeticError("over there")

    async with open_bridge() as bridge:
        with pytest.raises(ArithmeticError, match="over there"):
            await bridge.run(fail)
        assert await bridge.run(lambda: answer(1)) == 1


async def test_a_factory_that_raises() -> None:
    def make() -> object:
        raise ArithmeticError("no coroutine")

    async with open_bridge() as bridge:
        with pytest.raises(ArithmeticError):
            await bridge.run(make)  # type: ignore[arg-type]


async def test_a_cancelled_caller_waits_for_the_end_over_there() -> None:
    started, events = trio.Event(), []

    async with open_bridge() as bridge:

        async def work() -> None:
            bridge.call_soon(started.set)
            try:
                await asyncio.sleep(3_600)
            except asyncio.CancelledError:
                await asyncio.sleep(0.01)  # a clean-up that takes a moment
                events.append("cleaned up")
                raise

        with trio.fail_after(HANGS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bridge.run, work)
                await started.wait()
                nursery.cancel_scope.cancel()
        assert events == ["cleaned up"]


async def test_a_caller_that_is_cancelled_before_starts_nothing() -> None:
    began = []

    async def work() -> None:
        began.append(True)

    async with open_bridge() as bridge:
        with trio.CancelScope() as scope:
            scope.cancel()
            await bridge.run(work)
        assert scope.cancelled_caught
        await bridge.run(lambda: answer(None))
    assert began == []


async def test_a_result_that_cancellation_overtook_is_dropped() -> None:
    started = trio.Event()
    done = []

    async with open_bridge() as bridge:

        async def stubborn() -> str:
            bridge.call_soon(started.set)
            try:
                await asyncio.sleep(3_600)
            except asyncio.CancelledError:
                done.append(True)
            return "finished all the same"

        with trio.fail_after(HANGS), trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bridge.run, stubborn)
                await started.wait()
                scope.cancel()
        assert scope.cancelled_caught
    assert done == [True]


async def test_a_caller_that_is_cancelled_before_its_work_began_over_there_does_not_hang() -> None:
    async with open_bridge() as bridge:
        with trio.fail_after(HANGS):
            for _ in range(200):
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(bridge.run, lambda: asyncio.sleep(3_600))
                        await trio.lowlevel.checkpoint()
                        scope.cancel()
                assert scope.cancelled_caught


async def test_many_at_once() -> None:
    results: list[object] = []

    async with open_bridge() as bridge:

        async def one(number: int) -> None:
            results.append(await bridge.run(lambda: answer(number)))

        with trio.fail_after(HANGS):
            async with trio.open_nursery() as nursery:
                for number in range(1_000):
                    nursery.start_soon(one, number)
    assert sorted(results, key=str) == sorted(range(1_000), key=str)


async def test_many_at_once_half_of_them_cancelled() -> None:
    ended: list[int] = []

    async with open_bridge() as bridge:

        async def one(number: int) -> None:
            with trio.CancelScope() as scope:
                if number % 2:
                    scope.deadline = trio.current_time() + number / 50_000
                await bridge.run(lambda: asyncio.sleep(0.001))
            ended.append(number)

        with trio.fail_after(HANGS):
            async with trio.open_nursery() as nursery:
                for number in range(500):
                    nursery.start_soon(one, number)
    assert sorted(ended) == list(range(500))


async def test_two_bridges_in_one_program() -> None:
    async with open_bridge() as one, open_bridge() as two:
        assert await one.run(lambda: answer(1)) == 1
        assert await two.run(lambda: answer(2)) == 2


async def test_its_thread_ends_with_it() -> None:
    def storage_threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "postroom-storage"]

    before = len(storage_threads())
    with suppress(ArithmeticError):
        async with open_bridge() as bridge:
            assert len(storage_threads()) == before + 1
            await bridge.run(lambda: answer(1))
            raise ArithmeticError
    assert len(storage_threads()) == before


@pytest.mark.postgres
async def test_a_cancelled_statement_leaves_its_connection_usable(database: Database) -> None:
    line = Line(lambda: database.dsn, "bridge")

    async def value(statement: str) -> object:
        async with line.use() as connection:
            return await connection.fetchval(statement)

    backend = await database.bridge.run(lambda: value("SELECT pg_backend_pid()"))
    running = """
        SELECT count(*) FROM pg_stat_activity
         WHERE state = 'active' AND query LIKE 'SELECT pg_sleep%' AND pid = $1
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(database.bridge.run, lambda: value("SELECT pg_sleep(3600)"))
        while not await database.value(running, backend):
            pass
        nursery.cancel_scope.cancel()
    while await database.value(running, backend):
        pass  # the server has been asked to, and does it in its own time
    assert await database.bridge.run(lambda: value("SELECT pg_backend_pid()")) == backend
    await database.bridge.run(line.close)
