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
    a_connection_that_is_to_close_is_closed,
    an_idle_connection_is_closed,
    way_in,
)
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio import serve
from quart_trio import QuartTrio
from wire import listening

from router.edge.blueprint import webhook_blueprint


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
        await serve(app, config, shutdown_trigger=stopped.wait, task_status=task_status)

    async with way_in() as (journal, router), trio.open_nursery() as nursery:
        app.register_blueprint(webhook_blueprint(router))
        (url,) = await nursery.start(run)
        yield World(int(url.rpartition(":")[2]), journal, guard=1.0)
        stopped.set()


NOT_BEHIND_HYPERCORN = {a_connection_that_is_to_close_is_closed, an_idle_connection_is_closed}

Edge = Callable[[], AbstractAsyncContextManager[World]]


@pytest.mark.parametrize("edge", [hot, blueprint], ids=lambda edge: edge.__name__)
@pytest.mark.parametrize("law", CONTRACT, ids=lambda law: law.__name__)
async def test_contract(
    law: Callable[[World], Awaitable[None]], edge: Edge, request: pytest.FixtureRequest
) -> None:
    if edge is blueprint and law in NOT_BEHIND_HYPERCORN:
        # Quart-Trio cancels its handler when hypercorn says that the answer is written, and with it
        # hypercorn's own next step, which is to close or to set the idle timer. The socket stays open until
        # the sender closes it (senders_that_leave_leave_no_socket).
        request.node.add_marker(pytest.mark.xfail(reason="hypercorn 0.18 and quart-trio 0.12 never close"))
    async with edge() as world:
        await law(world)
