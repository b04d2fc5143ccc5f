"""The bridge that the router does not use: asyncpg through trio-asyncio, in the trio thread. Kept for
`bench bridge`, which measures it beside router.postgres.bridge.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import trio
import trio_asyncio

T = TypeVar("T")


class TrioAsyncioBridge:
    """The same interface as router.postgres.bridge.Bridge."""

    def __init__(self, loop: Any, token: trio.lowlevel.TrioToken) -> None:
        self._loop = loop
        self._token = token

    async def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `make()` on the asyncio loop; cancelled, it is cancelled there and waited for."""
        value: T = await self._loop.run_aio_coroutine(make())
        return value

    def call_soon(self, function: Callable[[], object]) -> None:
        self._token.run_sync_soon(function)


@asynccontextmanager
async def open_bridge() -> AsyncIterator[TrioAsyncioBridge]:
    """An asyncio loop inside this trio program for as long as the block runs."""
    async with trio_asyncio.open_loop() as loop:
        yield TrioAsyncioBridge(loop, trio.lowlevel.current_trio_token())
