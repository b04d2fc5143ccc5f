"""The edge contract on the hot listener, and on the Quart blueprint behind hypercorn."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio
from edge_contract import (
    CONTRACT,
    IDLE_MS,
    World,
    way_in,
)
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio import serve
from quart_trio import QuartTrio
from wire import listening

from router.edge.blueprint import webhook_blueprint
from router.edge.disconnects import withhold_disconnects


@asynccontextmanager
async def hot() -> AsyncIterator[World]:
    async with (
        way_in() as (journal, router),
        listening(router.webhooks.accept_nowait, limits=router.config.limits) as edge,
    ):
        yield World(edge.port, journal)


@asynccontextmanager
async def blueprint() -> AsyncIterator[World]:
    app = QuartTrio("host")
    config = HypercornConfig()
    config.bind = ["127.0.0.1:0"]
    config.accesslog = config.errorlog = None
    config.graceful_timeout = 1.0
    config.keep_alive_timeout = IDLE_MS / 1000
    stopped = trio.Event()

    async def run(*, task_status: trio.TaskStatus[list[str]]) -> None:
        await serve(withhold_disconnects(app), config, shutdown_trigger=stopped.wait, task_status=task_status)

    async with way_in() as (journal, router), trio.open_nursery() as nursery:
        app.register_blueprint(webhook_blueprint(router))
        (url,) = await nursery.start(run)
        yield World(int(url.rpartition(":")[2]), journal, guard=1.0)
        stopped.set()


Edge = Callable[[], AbstractAsyncContextManager[World]]


@pytest.mark.parametrize("edge", [hot, blueprint], ids=lambda edge: edge.__name__)
@pytest.mark.parametrize("law", CONTRACT, ids=lambda law: law.__name__)
async def test_contract(law: Callable[[World], Awaitable[None]], edge: Edge) -> None:
    async with edge() as world:
        await law(world)
