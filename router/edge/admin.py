"""The admin port: quart-trio on hypercorn. Nothing hot: health, and asking for a run of the retrier."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio import serve as hypercorn_serve
from quart import Response, jsonify, request
from quart_trio import QuartTrio

from actors.errors import JournalUnavailable
from router.app import Router
from router.credentials import bearer_of
from router.edge.disconnects import withhold_disconnects
from router.observe.masking import mask_text
from router.roster import ServiceStatus

HEALTHY, DEGRADED, UNHEALTHY = "healthy", "degraded", "unhealthy"
PROBE_SECONDS = 5.0  # the database probe's bound (M26)
RETRIER_LATE = timedelta(minutes=10)  # without a run for so long, it does not keep its five minutes


def admin_app(router: Router, *, is_ready: Callable[[], bool]) -> QuartTrio:
    """The admin application: `/health`, `/health/live`, `/health/ready`; and, for who has the admin token,
    POST `/functions/v1/dlq-processor` with its `/health`.
    """
    app = QuartTrio("postroom")

    @app.get("/health/live")
    async def live() -> Response:
        return jsonify({"status": HEALTHY})

    @app.get("/health/ready")
    async def ready() -> tuple[Response, int]:
        database = await _probe(router)
        status = await _status(database, router) if is_ready() else UNHEALTHY
        return jsonify({"status": status}), 503 if status == UNHEALTHY else 200

    @app.get("/health")
    async def health() -> tuple[Response, int]:
        database = await _probe(router)
        statistics = router.statistics()
        delivery = {
            "status": HEALTHY,
            "role": "delivers" if router.delivers else "stands by",
            "epoch": statistics.epoch,
            "undelivered": statistics.undelivered,
            "live_sessions": statistics.live_sessions,
            "waiting_for": dict(statistics.waiting_for),
            "breakers": statistics.breakers,
            "services": {name: _service(status) for name, status in statistics.services.items()},
            "attached": dict(statistics.attached),
        }
        ingress = {
            "status": UNHEALTHY if router.refuses else HEALTHY,
            "refused": statistics.ingress.refused,
            "spooled": statistics.ingress.spooled,
        }
        components = {"database": database, "ingress": ingress, "delivery": delivery}
        if statistics.outbound is not None:
            components["sender"] = {
                "status": HEALTHY if statistics.sender_breaker == "closed" else DEGRADED,
                "breaker": statistics.sender_breaker,
                **asdict(statistics.outbound),
            }
        if statistics.spool_bytes is not None:
            usable = await router.can_accept()
            components["spool"] = {
                "status": HEALTHY if usable else UNHEALTHY,
                "bytes": statistics.spool_bytes,
            }
        status = await _status(database, router) if is_ready() else UNHEALTHY
        body = {"status": status, "components": components}
        return jsonify(body), 503 if status == UNHEALTHY else 200

    def may_act() -> bool:
        given = bearer_of(request.headers.get("Authorization", ""))
        token = router.config.admin_token
        return token is not None and hmac.compare_digest(given.encode(), token.encode())

    @app.post("/functions/v1/dlq-processor")
    async def retry_dead_letters() -> tuple[Response, int]:
        if not may_act():
            return _refused()
        try:
            await router.ask_for_retries()
        except JournalUnavailable:
            return jsonify({"error": "unavailable", "detail": "the database is away; ask again"}), 503
        return jsonify({"status": "accepted"}), 202

    @app.get("/functions/v1/dlq-processor/health")
    async def retrier_health() -> tuple[Response, int]:
        if not may_act():
            return _refused()
        with trio.move_on_after(PROBE_SECONDS):
            try:
                counts = await router.dead_letters()
            except JournalUnavailable:
                return jsonify({"status": UNHEALTHY}), 503
            late = counts.since_last_run is None or counts.since_last_run > RETRIER_LATE
            body = {
                "status": DEGRADED if late else HEALTHY,
                "open": counts.open,
                "failed": counts.failed,
                "last_run": None if counts.last_run is None else counts.last_run.isoformat(),
            }
            return jsonify(body), 200
        return jsonify({"status": UNHEALTHY}), 503

    return app


async def _status(database: dict[str, Any], router: Router) -> str:
    """Degraded: what comes waits in the spool, or could not wait there if it had to."""
    if router.refuses:
        return UNHEALTHY
    spools, waiting = await router.can_accept(), router.statistics().spool_bytes
    if database["status"] != HEALTHY:
        return DEGRADED if spools else UNHEALTHY
    return HEALTHY if waiting is None or (spools and not waiting) else DEGRADED


def _service(status: ServiceStatus) -> dict[str, Any]:
    latency = status.latency
    return {
        "state": status.state,
        "version": status.version,
        "breaker": status.breaker,
        "breaker_reason": mask_text(status.breaker_reason),  # a service's own words
        "lanes": status.lanes,
        "attempts": status.attempts,
        "failures": status.failures,
        "latency_ms": {
            name: None if seconds is None else round(seconds * 1000, 3)
            for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
            for seconds in (latency.quantile(share),)
        },
        "canary": None if status.canary is None else asdict(status.canary),
        "shadow": None if status.shadow is None else asdict(status.shadow),
    }


def _refused() -> tuple[Response, int]:
    response = jsonify({"error": "unauthorized"})
    response.headers["WWW-Authenticate"] = "Bearer"
    return response, 401


async def _probe(router: Router) -> dict[str, Any]:
    started = trio.current_time()
    with trio.move_on_after(PROBE_SECONDS):
        try:
            await router.probe()
        except JournalUnavailable:
            return {"status": UNHEALTHY, "latency_ms": _since(started)}
        return {"status": HEALTHY, "latency_ms": _since(started)}
    return {"status": UNHEALTHY, "latency_ms": _since(started)}


def _since(started: float) -> float:
    return round((trio.current_time() - started) * 1000, 3)


async def serve_admin(
    app: QuartTrio,
    host: str,
    port: int,
    *,
    stopped: Callable[[], Awaitable[None]],
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `stopped` returns; reports the URL it listens on. Raises OSError: it cannot bind."""
    config = HypercornConfig()
    config.bind = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
    config.accesslog = None
    config.errorlog = logging.getLogger("postroom.admin")
    config.graceful_timeout = 1.0
    config.shutdown_timeout = 2.0
    async with trio.open_nursery() as nursery:
        binds: list[str] = await nursery.start(_hypercorn, app, config, stopped)
        task_status.started(binds[0])


async def _hypercorn(
    app: QuartTrio,
    config: HypercornConfig,
    stopped: Callable[[], Awaitable[None]],
    *,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    await hypercorn_serve(
        withhold_disconnects(app), config, shutdown_trigger=stopped, task_status=task_status
    )
