"""`postroom demo`: a router, two services and a population of phones in one process, and the verdict of
the phones' own ledger at the end.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random, SystemRandom
from typing import Any

import asyncpg
import trio
from rich.console import Console
from rich.live import Live
from rich.table import Table

from actors.messages import Ack, Envelope, Outcome, Reply, Retry
from router.app import Router, open_router
from router.config import Config, SenderConfig
from router.conservation import Conservation, recount
from router.delivery.in_process import HandlerFunction
from router.edge.http1 import Listener
from router.postgres.bridge import open_bridge
from router.postgres.connections import ADMIN, connect
from router.postgres.embedded import EmbeddedPostgres
from router.postgres.statements import statements
from router.simulator import GraphEndpoint, Ledger, Population, Report, Taken, run_traffic

_SQL = statements("demo")

TEXTS: Mapping[str, tuple[str, ...]] = {
    "rides": ("taxi", "a ride to the airport", "moto please"),
    "insurance": ("insurance", "my claim", "assurance auto"),
}
NUMBERS = ("100000000000001", "100000000000002")
CONNECTIONS = 16
SETTLE_SECONDS = 30.0  # that everything in flight may take to end after the phones have stopped
_FAILING_SHARE = 0.05  # of insurance's attempts
_BROKEN_SHARE = 0.005  # of insurance's messages: every attempt at these fails

Services = Callable[[Ledger, Random], Mapping[str, HandlerFunction]]


@dataclass(frozen=True)
class Summary:
    """What the phones saw, what the router's tables say, and whether they agree."""

    report: Report
    conservation: Conservation
    settled: bool

    @property
    def ok(self) -> bool:
        return self.report.ok and self.conservation.ok and self.settled

    def problems(self) -> list[str]:
        found = [f"phones: {problem}" for problem in self.report.problems]
        found += [f"router: {problem}" for problem in self.conservation.problems]
        if not self.settled:
            left = self.conservation.places["undelivered"]
            found.append(f"router: {left} items had not ended {SETTLE_SECONDS:g} s after the last message")
        return found

    def as_dict(self) -> dict[str, Any]:
        return {
            "conservation": "ok" if self.ok else "broken",
            "phones": asdict(self.report),
            "router": self.conservation.as_dict(),
            "problems": self.problems(),
        }

    def text(self) -> str:
        report = self.report
        delivered = ", ".join(f"{domain} {count}" for domain, count in sorted(report.delivered.items()))
        lines = [
            f"received       {report.received} of {report.distinct} messages, {report.statuses} statuses",
            f"duplicates     {self.conservation.duplicates}, statuses too ({report.duplicates} messages)",
            f"delivered      {delivered or 'nothing'}",
            f"dead letters   {report.dead_letters}",
            f"replies        {report.replies}",
            f"ack            p50 {report.p50_ms:.1f} ms, p95 {report.p95_ms:.1f} ms, "
            f"p99 {report.p99_ms:.1f} ms",
            *(f"problem        {problem}" for problem in self.problems()),
            f"conservation: {'ok' if self.ok else 'broken'}",
        ]
        return "\n".join(lines)


def demo_services(ledger: Ledger, rng: Random) -> dict[str, HandlerFunction]:
    """Rides works; insurance fails now and then, and at a few messages always."""

    def service(domain: str, fails: Callable[[Envelope], bool]) -> HandlerFunction:
        async def handle(envelope: Envelope) -> Outcome:
            failed = fails(envelope)
            ledger.seen(domain, envelope.message_id or "", envelope.id, envelope.attempt, accepted=not failed)
            if failed:
                return Retry(reason="the demo service failed on purpose")
            text = f"{domain} is on it ({envelope.id[4:]})"
            ledger.replied(envelope.message_id or "", [text])
            return Ack((Reply(text),))

        return handle

    def fails(envelope: Envelope) -> bool:
        broken = int(envelope.id[4:12], 16) / 2**32 < _BROKEN_SHARE
        return broken or rng.random() < _FAILING_SHARE

    return {"rides": service("rides", lambda _: False), "insurance": service("insurance", fails)}


async def run_demo(
    *,
    seconds: float | None,
    rate: float,
    phones: int,
    seed: int | None,
    data_dir: Path | None,
    live: bool,
    services: Services = demo_services,
    before_verdict: Callable[[str], Awaitable[None]] | None = None,
) -> Summary:
    """Run until `seconds` have passed, or SIGINT or SIGTERM. `before_verdict` gets the connection string
    when everything has ended: a port for faults that the verdict must find.

    Raises:
        EmbeddedPostgresError, MigrationError, JournalUnavailable: the database cannot be used.
    """
    rng = Random(seed if seed is not None else SystemRandom().getrandbits(64))
    ledger = Ledger()
    population = Population(phones, NUMBERS, rng, TEXTS)
    secret = f"{rng.getrandbits(128):032x}"
    async with _directory(data_dir) as directory, _phones(ledger, population, rng) as sender:
        config = Config.for_embedding(
            app_secret=secret, verify_token="demo", data_dir=directory, port=0, sender=sender
        )
        listener = Listener(config.limits)
        port = listener.bind(config.host, config.port)
        url = f"http://{config.host}:{port}{config.apps[0].path}"
        console = Console(stderr=True, quiet=not live, soft_wrap=True)

        def say(line: str) -> None:
            console.print(line)

        say(f"embedded Postgres in {directory}, webhook at {url}")
        async with open_router(config, services(ledger, rng), report=say) as router:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listener.serve, router.webhooks.accept_nowait)
                stop = trio.Event()
                nursery.start_soon(_stop_after, seconds, stop)
                if live:
                    nursery.start_soon(_show, router, ledger)
                await run_traffic(
                    population,
                    ledger,
                    url,
                    secret,
                    connections=CONNECTIONS,
                    rate=rate,
                    stop=stop,
                    settle=SETTLE_SECONDS,
                )
                dsn = EmbeddedPostgres(directory).dsn()
                settled = await _settle(router, dsn)
                listener.drain()
                nursery.cancel_scope.cancel()
            if before_verdict is not None:
                await before_verdict(dsn)
            return await _verdict(dsn, ledger, settled)


async def _settle(router: Router, dsn: str) -> bool:
    """Wait until nothing is undelivered, and no reply unsent."""

    async def replies_left() -> int:
        connection: asyncpg.Connection = await connect(dsn, name="demo", role=ADMIN)
        try:
            left: int = await connection.fetchval(_SQL["unsent"])
            return left
        finally:
            await connection.close()

    with trio.move_on_after(SETTLE_SECONDS):
        async with open_bridge() as bridge:
            while router.statistics().undelivered or await bridge.run(replies_left):  # noqa: ASYNC110
                await trio.sleep(0.05)
        return True
    return False


async def _verdict(dsn: str, ledger: Ledger, settled: bool) -> Summary:
    async def read() -> tuple[Conservation, list[str], list[str]]:
        connection: asyncpg.Connection = await connect(dsn, name="demo", role=ADMIN)
        try:
            stored = [row["message_id"] for row in await connection.fetch(_SQL["stored"])]
            letters = [row["message_id"] for row in await connection.fetch(_SQL["dead_letters"])]
            return await recount(connection), stored, letters
        finally:
            await connection.close()

    async with open_bridge() as bridge:
        conservation, stored, letters = await bridge.run(read)
    report = ledger.verify(dead_letters=letters, stored=stored, replies=True)
    return Summary(report, conservation, settled)


async def _stop_after(seconds: float | None, stop: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        with trio.move_on_after(float("inf") if seconds is None else seconds):
            async for _ in signals:
                break
        stop.set()
        await trio.sleep_forever()  # a second Ctrl-C must not cut the verdict short


async def _show(router: Router, ledger: Ledger) -> None:
    """The live view, a few times a second, where there is a terminal to show it."""
    console = Console()
    if not console.is_terminal:
        return
    with Live(console=console, transient=True, auto_refresh=False) as view:
        while True:
            view.update(_table(router, ledger), refresh=True)
            await trio.sleep(0.25)


def _table(router: Router, ledger: Ledger) -> Table:
    report = ledger.verify(dead_letters=(), stored=(), replies=True)
    statistics = router.statistics()
    table = Table(title="postroom demo", show_header=False, min_width=48)
    table.add_row("messages answered 200", str(report.received))
    table.add_row("duplicates found", str(statistics.ingress.duplicates))
    for domain, count in sorted(report.delivered.items()):
        table.add_row(f"delivered to {domain}", str(count))
    table.add_row("replies read by phones", str(report.replies))
    table.add_row("undelivered now", str(statistics.undelivered))
    table.add_row("conversations live", str(statistics.live_sessions))
    table.add_row(
        "ack p50 / p95 / p99", f"{report.p50_ms:.1f} / {report.p95_ms:.1f} / {report.p99_ms:.1f} ms"
    )
    table.add_row("flushes", str(statistics.ingress.flushes))
    return table


@asynccontextmanager
async def _phones(ledger: Ledger, population: Population, rng: Random) -> AsyncIterator[SenderConfig]:
    """Where replies are sent: to the same phones, which report how far each message came."""

    def taken(message: Taken) -> None:
        ledger.reply_taken(message.phone_number_id, message.recipient, message.text)
        population.took(message.message_id, message.phone_number_id, message.recipient)

    token = f"{rng.getrandbits(128):032x}"
    graph = GraphEndpoint(token=token, rng=rng, on_taken=taken)
    async with trio.open_nursery() as nursery:
        url: str = await nursery.start(graph.serve)
        failure: Exception | None = None
        try:
            yield SenderConfig(url=url, token=token)
        except Exception as error:
            failure = error  # raised below as it is: a nursery would wrap it
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


@asynccontextmanager
async def _directory(given: Path | None) -> AsyncIterator[Path]:
    if given is not None:
        yield given
        return
    made = Path(tempfile.mkdtemp(prefix="postroom-demo-"))
    try:
        yield made
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lambda: shutil.rmtree(made, ignore_errors=True))
