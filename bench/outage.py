"""`python -m bench outage`: webhooks while a Postgres that the router did not start is killed and away, and
the time to catch up after it is back.
"""

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import asyncpg
import trio

from bench.databases import fetch_count, find_postmaster
from bench.load import LoadResult, LoadSpec
from bench.processes import ProcessFailed, free_port
from bench.report import envelope, number, print_table, print_verdicts, verdict_rows, write_result
from bench.rounds import SETTLE_SECONDS, run_generator
from bench.targets import IN_PROCESS, SECRET, start_router
from bench.verdicts import Verdict, missed
from router.conservation import recount
from router.postgres.embedded import EmbeddedPostgres

_WARM_UP_SECONDS = 2.0
_ENDED = """
SELECT count(*) FROM whatsapp_messages WHERE direction = 'inbound' AND place IN ('delivered', 'handled')
"""


@dataclass(frozen=True)
class OutageSettings:
    """What one call of the benchmark does; times in seconds, `rate` in webhooks per second."""

    rounds: int = 3
    seconds: float = 60.0
    rate: float = 300.0
    connections: int = 32

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class OutageRound:
    """The same load with Postgres there and away. `catch_up_seconds`: from Postgres accepting connections
    again until everything was journaled and delivered."""

    there: LoadResult
    away: LoadResult
    spooled_bytes: int
    catch_up_seconds: float
    lost: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def spooled(home: Path) -> int:
    """Bytes that wait in the files of the spool."""
    return sum(path.stat().st_size for path in (home / "data" / "spool").glob("*/*.spool"))


async def offer(port: int, settings: OutageSettings, seconds: float) -> LoadResult:
    """An open loop: what is late does not slow down what comes after it."""
    spec = LoadSpec(
        port=port,
        secret=SECRET,
        mode="open",
        connections=settings.connections,
        seconds=seconds,
        requests=int(settings.rate * seconds),
        rate=settings.rate,
    )
    return await run_generator(spec)


async def caught_up(home: Path, dsn: str) -> float:
    """Seconds until nothing waits in the spool and nothing is on its way to its service."""
    assert IN_PROCESS.unsettled is not None
    started = time.monotonic()
    while spooled(home) or await trio.to_thread.run_sync(fetch_count, dsn, IN_PROCESS.unsettled):
        if time.monotonic() - started > SETTLE_SECONDS:
            raise ProcessFailed(f"had not caught up {SETTLE_SECONDS} s after Postgres was back")
        await trio.sleep(0.02)
    return time.monotonic() - started


async def disagreements(dsn: str, loads: list[LoadResult]) -> list[str]:
    """What the answers and the tables do not agree about."""

    async def ask() -> tuple[list[str], int]:
        connection = await asyncpg.connect(dsn)
        try:
            return list((await recount(connection)).problems), await connection.fetchval(_ENDED)
        finally:
            await connection.close()

    problems, done = await trio.to_thread.run_sync(lambda: asyncio.run(ask()))
    acked = sum(load.ok for load in loads)
    if done != acked:
        problems.append(f"{acked} were answered 200, {done} have ended")
    return problems


async def outage_round(settings: OutageSettings, home: Path) -> OutageRound:
    """One start, one outage, one recovery, on a fresh cluster."""
    postgres = EmbeddedPostgres(home / "postgres")
    dsn = (await postgres.start()).dsn
    port = free_port()
    server = start_router(home, port, "--dev", "--migrate", env={"DATABASE_URL": dsn})
    try:
        loads = [await offer(port, settings, _WARM_UP_SECONDS)]
        loads.append(await offer(port, settings, settings.seconds / 4))
        postmaster = find_postmaster(home / "postgres")
        if postmaster is None:
            raise ProcessFailed("Postgres is not there")
        os.kill(postmaster, signal.SIGKILL)
        loads.append(await offer(port, settings, settings.seconds))
        waiting = spooled(home)
        await postgres.start()
        seconds = await caught_up(home, dsn)
        lost = await disagreements(dsn, loads)
    finally:
        server.stop()
        with trio.CancelScope(shield=True):
            await postgres.stop()
    return OutageRound(loads[1], loads[2], waiting, seconds, lost)


async def run_rounds(
    settings: OutageSettings, home: Path, progress: Callable[[str], None]
) -> list[OutageRound]:
    rounds = []
    for index in range(1, settings.rounds + 1):
        place = home / f"round-{index}"
        place.mkdir()
        one = await outage_round(settings, place)
        away = one.away.latency_ms
        progress(
            f"round {index}: away p50 {away['p50']:.1f} p99 {away['p99']:.1f} ms, "
            f"{one.spooled_bytes / 1e6:.1f} MB waited, caught up in {one.catch_up_seconds:.1f} s"
        )
        rounds.append(one)
        shutil.rmtree(place, ignore_errors=True)
    return rounds


def judge(rounds: list[OutageRound]) -> list[Verdict]:
    failed = sum(load.failed + load.unanswered for one in rounds for load in (one.there, one.away))
    return [
        Verdict("webhooks not answered 200", failed, 0, at_least=False, required=True, unit=""),
        Verdict(
            "disagreements about what was answered 200",
            sum(len(one.lost) for one in rounds),
            0,
            at_least=False,
            required=True,
            unit="",
        ),
    ]


def show(rounds: list[OutageRound]) -> None:
    def middle(values: list[float]) -> str:
        return number(median(values), 1)

    def latencies(loads: list[LoadResult]) -> list[str]:
        return [middle([load.latency_ms[name] for load in loads]) for name in ("p50", "p95", "p99", "max")]

    print_table(
        "Answers to webhooks: medians of the rounds",
        ("Postgres", "p50 ms", "p95 ms", "p99 ms", "longest ms", "MB spooled", "catch-up s"),
        [
            ("is there", *latencies([one.there for one in rounds]), "", ""),
            (
                "is away",
                *latencies([one.away for one in rounds]),
                middle([one.spooled_bytes / 1e6 for one in rounds]),
                middle([one.catch_up_seconds for one in rounds]),
            ),
        ],
    )


def run(settings: OutageSettings, json_path: Path | None) -> int:
    """The whole benchmark; the exit code, 1 when an answer was wrong."""
    head = envelope("outage", settings.as_json())
    # Postgres runs as another user when we are root, and must be able to pass through.
    home = Path(tempfile.mkdtemp(prefix="postroom-bench-", dir="/tmp"))
    home.chmod(0o755)
    try:
        rounds = trio.run(run_rounds, settings, home, lambda line: print(line, flush=True))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    verdicts = judge(rounds)
    show(rounds)
    print_verdicts(verdicts)
    failures = missed(verdicts)
    body = {
        **head,
        "verdicts": verdict_rows(verdicts),
        "passed": not failures,
        "rounds": [one.as_json() for one in rounds],
    }
    print(f"result: {write_result(body, json_path)}")
    return 1 if failures else 0
