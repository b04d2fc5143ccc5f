"""asyncpg speaks asyncio: one uvloop loop in one thread, behind a port that trio tasks call. A flush
crosses it once. Why a thread: docs/decisions/0001-asyncpg-bridge.md.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

import trio
import uvloop

T = TypeVar("T")

_END_SECONDS = 5.0


class Bridge:
    """Runs coroutines on the storage thread's loop. Open it with `open_bridge`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, token: trio.lowlevel.TrioToken) -> None:
        self._loop = loop
        self._token = token

    async def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `make()` over there and wait for its result.

        Cancelled here: the coroutine is cancelled over there and waited for, so that no connection is
        left in the middle of a statement; a result that it had by then is dropped.
        """
        task = trio.lowlevel.current_task()
        running: asyncio.Task[None] | None = None
        value: T | None = None
        error: BaseException | None = None
        begun = ended = cancelled = False

        async def work() -> None:
            nonlocal value, error, begun, ended
            begun = True
            try:
                value = await make()
            except BaseException as raised:
                error = raised
            ended = True
            self._token.run_sync_soon(trio.lowlevel.reschedule, task)

        def start() -> None:
            nonlocal running
            running = self._loop.create_task(work())

        def cancel() -> None:
            if not begun:  # a task that is cancelled before its first step never runs, nor ends here
                self._loop.call_soon(cancel)
            elif running is not None and not ended:
                running.cancel()

        def abort(_: object) -> trio.lowlevel.Abort:
            nonlocal cancelled
            cancelled = True
            self._loop.call_soon_threadsafe(cancel)
            return trio.lowlevel.Abort.FAILED  # the coroutine's end wakes this task

        await trio.lowlevel.checkpoint_if_cancelled()
        self._loop.call_soon_threadsafe(start)
        await trio.lowlevel.wait_task_rescheduled(abort)
        if cancelled:
            await trio.lowlevel.checkpoint_if_cancelled()
        if error is not None:
            raise error
        return cast(T, value)

    def call_soon(self, function: Callable[[], object]) -> None:
        """From the storage thread: run a function in the trio thread."""
        self._token.run_sync_soon(function)


@asynccontextmanager
async def open_bridge() -> AsyncIterator[Bridge]:
    """A storage thread for as long as the block runs; every coroutine must have ended by then."""
    loop = uvloop.new_event_loop()

    def work() -> None:
        loop.run_forever()
        loop.close()

    thread = threading.Thread(target=work, name="postroom-storage", daemon=True)
    thread.start()
    try:
        yield Bridge(loop, trio.lowlevel.current_trio_token())
    finally:
        asyncio.run_coroutine_threadsafe(_end(), loop)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(thread.join, 2 * _END_SECONDS)


async def _end() -> None:
    """Stop the loop when nothing is under way in it. asyncpg may still be asking a server to cancel a
    statement, in a task of its own: a loop that is closed under an open connection was seen to wait for ever.
    """
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        _, late = await asyncio.wait(others, timeout=_END_SECONDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
    await asyncio.sleep(0)  # what was closed calls back once more
    asyncio.get_running_loop().stop()
