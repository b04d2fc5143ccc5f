"""Health on the admin port, with a router whose database can be taken away."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from wire import GONE, Answer, connected, get

from actors.errors import JournalUnavailable
from router.edge import admin
from router.edge.admin import admin_app, serve_admin


@dataclass
class StandIn:
    """As much of a router as health asks for."""

    delivers: bool = True
    epoch: int | None = 7
    away: bool = False
    hangs: bool = False
    probes: list[float] = field(default_factory=list)

    async def probe(self) -> None:
        self.probes.append(trio.current_time())
        if self.hangs:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        if self.away:
            raise JournalUnavailable("the database is away")

    def statistics(self) -> Any:
        return SimpleNamespace(epoch=self.epoch, undelivered=3, live_sessions=2, waiting_for={"rides": 1})


async def ask(router: StandIn, path: str, *, ready: bool = True) -> tuple[int, Any]:
    client = admin_app(router, is_ready=lambda: ready).test_client()  # type: ignore[arg-type]
    response = await client.get(path)
    assert response.content_type == "application/json"
    return response.status_code, await response.get_json()


class TestReady:
    async def test_ready(self) -> None:
        assert await ask(StandIn(), "/health/ready") == (200, {"status": "healthy"})

    async def test_also_when_another_process_delivers(self) -> None:
        router = StandIn(delivers=False, epoch=None)
        assert await ask(router, "/health/ready") == (200, {"status": "healthy"})

    @pytest.mark.parametrize(("ready", "away"), [(False, False), (True, True), (False, True)])
    async def test_not_ready(self, ready: bool, away: bool) -> None:
        assert await ask(StandIn(away=away), "/health/ready", ready=ready) == (503, {"status": "unhealthy"})


class TestLive:
    @pytest.mark.parametrize("ready", [True, False])
    async def test_it_asks_nobody(self, ready: bool) -> None:
        router = StandIn(away=True)
        assert await ask(router, "/health/live", ready=ready) == (200, {"status": "healthy"})
        assert router.probes == []


class TestHealth:
    async def test_all_is_well(self) -> None:
        status, body = await ask(StandIn(), "/health")
        assert (status, body["status"]) == (200, "healthy")
        assert body["components"]["database"].keys() == {"status", "latency_ms"}
        assert 0 <= body["components"]["database"]["latency_ms"] < 5_000
        assert body["components"]["delivery"] == {
            "status": "healthy",
            "role": "delivers",
            "epoch": 7,
            "undelivered": 3,
            "live_sessions": 2,
            "waiting_for": {"rides": 1},
        }

    async def test_the_database_is_away(self) -> None:
        status, body = await ask(StandIn(away=True), "/health")
        assert (status, body["status"]) == (503, "unhealthy")
        assert body["components"]["database"]["status"] == "unhealthy"
        assert body["components"]["delivery"]["status"] == "healthy"

    async def test_the_process_is_stopping(self) -> None:
        status, body = await ask(StandIn(), "/health", ready=False)
        assert (status, body["status"]) == (503, "unhealthy")
        assert body["components"]["database"]["status"] == "healthy"

    async def test_another_process_delivers(self) -> None:
        _, body = await ask(StandIn(delivers=False, epoch=None), "/health")
        assert (body["components"]["delivery"]["role"], body["components"]["delivery"]["epoch"]) == (
            "stands by",
            None,
        )

    @pytest.mark.parametrize("path", ["/health", "/health/ready"])
    async def test_a_database_that_hangs_is_away(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(admin, "PROBE_SECONDS", 0.05)
        with trio.fail_after(10):
            status, body = await ask(StandIn(hangs=True), path)
        assert (status, body["status"]) == (503, "unhealthy")


@asynccontextmanager
async def serving(router: StandIn) -> AsyncIterator[tuple[str, trio.Event]]:
    app = admin_app(router, is_ready=lambda: True)  # type: ignore[arg-type]
    stopped = trio.Event()

    async def run(*, task_status: trio.TaskStatus[str]) -> None:
        await serve_admin(app, "127.0.0.1", 0, stopped=stopped.wait, task_status=task_status)

    async with trio.open_nursery() as nursery:
        yield await nursery.start(run), stopped
        stopped.set()


async def over_the_wire(url: str, path: bytes) -> Answer:
    async with connected(int(url.rpartition(":")[2])) as wire:
        await wire.send(get(path))
        return await wire.answer()


class TestServing:
    async def test_over_a_socket(self) -> None:
        async with serving(StandIn()) as (url, _):
            assert url.startswith("http://127.0.0.1:")
            assert (await over_the_wire(url, b"/health/ready")).status == 200
            assert (await over_the_wire(url, b"/nothing")).status == 404
            assert (await over_the_wire(url, b"/webhooks/whatsapp")).status == 404

    async def test_it_ends_when_it_is_told_to(self) -> None:
        with trio.fail_after(10):
            async with serving(StandIn()) as (url, stopped):
                stopped.set()
        with pytest.raises(GONE):
            await over_the_wire(url, b"/health")

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    async def test_a_port_that_is_taken(self) -> None:
        async with serving(StandIn()) as (url, _):
            app = admin_app(StandIn(), is_ready=lambda: True)  # type: ignore[arg-type]
            with pytest.raises(ExceptionGroup) as raised:
                await serve_admin(app, "127.0.0.1", int(url.rpartition(":")[2]), stopped=trio.sleep_forever)
            assert raised.group_contains(OSError)
        del raised
        gc.collect()  # hypercorn forgets the socket that it could not bind
