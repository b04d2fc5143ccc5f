"""Health on the admin port, with a router whose database can be taken away."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from wire import GONE, Answer, connected, get

from actors.errors import JournalUnavailable
from actors.histogram import HistogramSnapshot
from actors.ingress import IngressStatistics
from actors.outbound import OutboundStatistics
from router.app import DeadLetterCounts, RouterStatistics
from router.delivery.variants import ShadowStatistics
from router.edge import admin
from router.edge.admin import admin_app, serve_admin
from router.roster import CanaryStatus, ServiceStatus

START = datetime(2030, 1, 1, tzinfo=UTC)
RETRIER = "/functions/v1/dlq-processor"
COUNTS = (10, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0)
RIDES = ServiceStatus(
    state="active",
    version=3,
    breaker="open",
    breaker_reason="answered 500",
    lanes=6,
    attempts=9,
    failures=4,
    latency=HistogramSnapshot(COUNTS, 2.0),
    canary=CanaryStatus("closed", 2, 0),
    shadow=ShadowStatistics(copies=5, failures=1),
)


@dataclass
class StandIn:
    """As much of a router as health asks for."""

    delivers: bool = True
    epoch: int | None = 7
    away: bool = False
    hangs: bool = False
    probes: list[float] = field(default_factory=list)
    token: str | None = "a-token-of-20-letters"
    asked: int = 0
    since_last_run: timedelta | None = timedelta(minutes=1)
    spools: bool | None = True  # None: there is no spool
    spooled: int = 0
    refuses: bool = False
    sender_breaker: str | None = None

    @property
    def config(self) -> Any:
        return SimpleNamespace(admin_token=self.token)

    async def ask_for_retries(self) -> None:
        await self.probe()
        self.asked += 1

    async def dead_letters(self) -> DeadLetterCounts:
        await self.probe()
        since = self.since_last_run
        return DeadLetterCounts(3, 2, None if since is None else START - since, since)

    async def probe(self) -> None:
        self.probes.append(trio.current_time())
        if self.hangs:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        if self.away:
            raise JournalUnavailable("the database is away")

    def statistics(self) -> RouterStatistics:
        return RouterStatistics(
            epoch=self.epoch,
            undelivered=3,
            live_sessions=2,
            waiting_for={"rides": 1},
            services={"rides": RIDES},
            attached={"jobs": 2},
            spool_bytes=None if self.spools is None else self.spooled,
            ingress=IngressStatistics(refused=4, spooled=5),
            outbound=None if self.sender_breaker is None else OutboundStatistics(7, 1, 2),
            sender_breaker=self.sender_breaker,
        )

    async def can_accept(self) -> bool:
        return bool(self.spools)


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
        router = StandIn(away=away, spools=None)
        assert await ask(router, "/health/ready", ready=ready) == (503, {"status": "unhealthy"})

    async def test_not_while_what_comes_is_refused(self) -> None:
        assert await ask(StandIn(refuses=True), "/health/ready") == (503, {"status": "unhealthy"})

    async def test_with_a_spool_it_is_ready_while_the_database_is_away(self) -> None:
        router = StandIn(away=True, spools=True)
        assert await ask(router, "/health/ready") == (200, {"status": "degraded"})
        assert await ask(router, "/health/ready", ready=False) == (503, {"status": "unhealthy"})


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
            "breakers": {"rides": "open"},
            "services": {
                "rides": {
                    "state": "active",
                    "version": 3,
                    "breaker": "open",
                    "breaker_reason": "answered 500",
                    "lanes": 6,
                    "attempts": 9,
                    "failures": 4,
                    "latency_ms": {"p50": 1.0, "p95": 235.0, "p99": 247.0},
                    "canary": {"breaker": "closed", "attempts": 2, "failures": 0},
                    "shadow": {"copies": 5, "failures": 1, "dropped": 0},
                }
            },
            "attached": {"jobs": 2},
        }
        assert body["components"]["spool"] == {"status": "healthy", "bytes": 0}
        assert body["components"]["ingress"] == {"status": "healthy", "refused": 4, "spooled": 5}
        assert "sender" not in body["components"]

    @pytest.mark.parametrize(("breaker", "expected"), [("closed", "healthy"), ("open", "degraded")])
    async def test_there_is_a_sender(self, breaker: str, expected: str) -> None:
        status, body = await ask(StandIn(sender_breaker=breaker), "/health")
        assert (status, body["status"]) == (200, "healthy")
        assert body["components"]["sender"] == {
            "status": expected,
            "breaker": breaker,
            "sent": 7,
            "refused": 1,
            "put_off": 2,
        }

    async def test_a_spool_that_cannot_be_used_is_seen_before_it_is_needed(self) -> None:
        status, body = await ask(StandIn(spools=False), "/health")
        assert (status, body["status"]) == (200, "degraded")
        assert body["components"]["spool"]["status"] == "unhealthy"

    async def test_what_comes_is_refused(self) -> None:
        status, body = await ask(StandIn(refuses=True), "/health")
        assert (status, body["status"]) == (503, "unhealthy")
        assert body["components"]["ingress"]["status"] == "unhealthy"

    async def test_the_database_is_away(self) -> None:
        status, body = await ask(StandIn(away=True, spools=False), "/health")
        assert (status, body["status"]) == (503, "unhealthy")
        assert body["components"]["database"]["status"] == "unhealthy"
        assert body["components"]["delivery"]["status"] == "healthy"

    async def test_the_database_is_away_and_the_spool_takes_what_comes(self) -> None:
        status, body = await ask(StandIn(away=True, spools=True, spooled=5), "/health")
        assert (status, body["status"]) == (200, "degraded")
        assert body["components"]["spool"] == {"status": "healthy", "bytes": 5}

    async def test_the_database_is_back_and_the_spool_is_not_empty_yet(self) -> None:
        status, body = await ask(StandIn(spools=True, spooled=5), "/health")
        assert (status, body["status"]) == (200, "degraded")

    async def test_there_is_no_spool(self) -> None:
        _, body = await ask(StandIn(spools=None), "/health")
        assert "spool" not in body["components"]

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
            status, body = await ask(StandIn(hangs=True, spools=None), path)
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


class TestRetrier:
    async def call(
        self, router: StandIn, method: str, path: str, authorization: str | None
    ) -> tuple[int, Any]:
        client = admin_app(router, is_ready=lambda: True).test_client()  # type: ignore[arg-type]
        headers = {} if authorization is None else {"Authorization": authorization}
        response = await client.open(path, method=method, headers=headers)
        return response.status_code, await response.get_json()

    @pytest.mark.parametrize(("method", "path"), [("POST", RETRIER), ("GET", f"{RETRIER}/health")])
    async def test_only_who_has_the_token_is_let_in(self, method: str, path: str) -> None:
        refused = (401, {"error": "unauthorized"})
        for authorization in (
            None, "", "Bearer", "Bearer ", "Bearer a-token-of-20-letter", "Bearer A-TOKEN-OF-20-LETTERS",
            "Basic a-token-of-20-letters", "a-token-of-20-letters", "Bearer \u00e9",
        ):  # fmt: skip
            router = StandIn()
            assert await self.call(router, method, path, authorization) == refused, authorization
            assert router.asked == len(router.probes) == 0
        for authorization in ("Bearer a-token-of-20-letters", "Bearer None", "Bearer "):
            assert await self.call(StandIn(token=None), method, path, authorization) == refused
        status, _ = await self.call(StandIn(), method, path, "bearer a-token-of-20-letters")
        assert status in (200, 202)

    async def test_a_run_is_asked_for(self) -> None:
        router = StandIn()
        answer = await self.call(router, "POST", RETRIER, f"Bearer {router.token}")
        assert answer == (202, {"status": "accepted"})
        assert router.asked == 1

    @pytest.mark.parametrize(("method", "path"), [("POST", RETRIER), ("GET", f"{RETRIER}/health")])
    async def test_without_a_database(self, method: str, path: str) -> None:
        status, _ = await self.call(StandIn(away=True), method, path, "Bearer a-token-of-20-letters")
        assert status == 503

    @pytest.mark.parametrize(
        ("since", "state"),
        [(timedelta(minutes=5), "healthy"), (timedelta(minutes=11), "degraded"), (None, "degraded")],
    )
    async def test_its_health(self, since: timedelta | None, state: str) -> None:
        router = StandIn(since_last_run=since)
        status, body = await self.call(router, "GET", f"{RETRIER}/health", f"Bearer {router.token}")
        assert status == 200
        last_run = None if since is None else (START - since).isoformat()
        assert body == {"status": state, "open": 3, "failed": 2, "last_run": last_run}
