"""`python -m bench recover`: a start after a SIGKILL, beside millions of completed messages, and with many
undelivered ones.
"""

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import trio

from bench.databases import fetch_count
from bench.load import LoadResult, LoadSpec
from bench.processes import ProcessFailed, Server, free_port
from bench.report import envelope, number, print_table, print_verdicts, verdict_rows, write_result
from bench.rounds import run_generator
from bench.targets import IN_PROCESS, SECRET, start_router
from bench.verdicts import Verdict, missed
from router.conservation import recount
from router.postgres.embedded import EmbeddedPostgres

_SETTLE_SECONDS = 600.0
_AT_ONCE = 100_000  # rows of one statement

# Set apart below the low-water mark, each an hour older than the next.
_GROW_OLD = """
WITH aged AS (
    UPDATE whatsapp_messages_items SET received_at = $1::timestamptz + seq * interval '1 hour'
    RETURNING event_id, received_at
), events AS (
    UPDATE wa_events e SET received_at = a.received_at FROM aged a WHERE e.event_id = a.event_id
)
INSERT INTO journal_stragglers SELECT generate_series(1, $2::bigint)
"""
_COMPLETED = """
WITH new AS (
    SELECT h.next_seq + n AS seq, h.next_event AS event, $1::timestamptz AS at
      FROM journal_head h, generate_series(0, $2::bigint - 1) AS n
), events AS (
    INSERT INTO wa_events (event_id, received_at, app, correlation_id, partial, body)
    SELECT next_event, $1, 'default', 'bench', false, '{}' FROM journal_head
), items AS (
    INSERT INTO whatsapp_messages_items (seq, received_at, event_id, key, kind, path, message_id,
                                         phone_number_id, session_key, type)
    SELECT seq, at, event, decode(lpad(to_hex(seq), 32, '0'), 'hex'), 'm', '0.0.m0', 'wamid.' || seq, '1',
           '1:' || seq % 5000, 'text'
      FROM new
), outcomes AS (
    INSERT INTO message_outcomes (seq, received_at, completed_at, epoch, attempts, outcome, service, rule)
    SELECT seq, at, at, 1, 1, 'delivered', 'rides', 'keyword' FROM new
)
UPDATE journal_head SET next_seq = next_seq + $2, next_event = next_event + 1, received = received + $2
"""
_COUNTED = """
UPDATE delivery_tallies SET delivered = delivered + $1, low_water = (SELECT next_seq FROM journal_head)
"""


@dataclass(frozen=True)
class RecoverSettings:
    """What one call of the benchmark does: rows and messages, seconds of the load that is compared with."""

    completed: int = 5_000_000
    old: int = 100
    undelivered: int = 100_000
    seconds: float = 8.0
    connections: int = 32

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Found:
    """After the ready line: seconds until the first of the old messages was delivered, and all of them."""

    first_seconds: float
    all_seconds: float
    problems: list[str]


@dataclass(frozen=True)
class Rates:
    """Messages delivered per second: while they come in, and of those that a start finds undelivered."""

    normal: float
    recovering: float
    problems: list[str]


def echo_router(home: Path, port: int, *, delivers: bool) -> Server:
    """With a service for every domain, which answers at once."""
    enabled = "true" if delivers else "false"
    return start_router(home, port, "--dev", config=f"[delivery]\nenabled = {enabled}\n")


async def offer(spec: LoadSpec) -> LoadResult:
    result = await run_generator(spec)
    if result.failed or result.unanswered:
        raise ProcessFailed(f"{result.failed} answers were not 200, {result.unanswered} never came")
    return result


def ask(dsn: str, *statements: tuple[str, Sequence[object]]) -> None:
    """Execute these, one after the other. Blocks."""

    async def work() -> None:
        connection = await asyncpg.connect(dsn)
        try:
            for statement, arguments in statements:
                await connection.execute(statement, *arguments)
        finally:
            await connection.close()

    asyncio.run(work())


def problems_of(dsn: str) -> list[str]:
    """What the recount says. Blocks."""

    async def work() -> list[str]:
        connection = await asyncpg.connect(dsn)
        try:
            return list((await recount(connection)).problems)
        finally:
            await connection.close()

    return asyncio.run(work())


async def until(dsn: str, query: str, holds: Callable[[int], bool]) -> float:
    """Seconds until the number that `query` gives is as wanted. Looking takes a fifth of the time at most."""
    started = time.monotonic()
    while True:
        asked = time.monotonic()
        if holds(await trio.to_thread.run_sync(fetch_count, dsn, query)):
            return time.monotonic() - started
        if asked - started > _SETTLE_SECONDS:
            raise ProcessFailed(f"not after {_SETTLE_SECONDS:g} s: {query}")
        await trio.sleep(max(0.01, 4 * (time.monotonic() - asked)))


def kill(server: Server) -> None:
    os.kill(server.pid, signal.SIGKILL)
    server.stop()


async def find(settings: RecoverSettings, home: Path, progress: Callable[[str], None]) -> Found:
    """The old messages are journaled, then the completed ones are put beside them."""
    port = free_port()
    server = echo_router(home, port, delivers=False)
    dsn = EmbeddedPostgres(home / "data").dsn()
    try:
        load = LoadSpec(
            port=port, secret=SECRET, connections=1, seconds=60, requests=settings.old, texts=("taxi",)
        )
        await offer(load)
        now = datetime.now(UTC)
        await trio.to_thread.run_sync(
            ask,
            dsn,
            ("SELECT postroom_make_partitions($1, 1)", (now - timedelta(days=7),)),
            (_GROW_OLD, (now - timedelta(days=6), settings.old)),
        )
        for start in range(0, settings.completed, _AT_ONCE):
            rows = min(_AT_ONCE, settings.completed - start)
            await trio.to_thread.run_sync(ask, dsn, (_COMPLETED, (now, rows)))
        await trio.to_thread.run_sync(ask, dsn, (_COUNTED, (settings.completed,)))
        progress(f"{settings.completed:,} completed messages beside {settings.old} undelivered ones")
    finally:
        kill(server)
    server = echo_router(home, port, delivers=True)
    try:
        ended = f"SELECT count(*) FROM message_outcomes WHERE seq <= {settings.old}"
        first = await until(dsn, ended, lambda count: count > 0)
        rest = await until(dsn, ended, lambda count: count == settings.old)
        problems = await trio.to_thread.run_sync(problems_of, dsn)
    finally:
        server.stop()
    progress(f"the first was delivered {first:.2f} s after the ready line")
    return Found(first, first + rest, problems)


async def rates(settings: RecoverSettings, home: Path, progress: Callable[[str], None]) -> Rates:
    """The same router, first with messages as they come, then with those that it finds."""
    assert IN_PROCESS.unsettled is not None
    port = free_port()
    spec = LoadSpec(port=port, secret=SECRET, connections=settings.connections)
    server = echo_router(home, port, delivers=True)
    dsn = EmbeddedPostgres(home / "data").dsn()
    try:
        warm = await offer(replace(spec, seconds=2.0, requests=20_000))
        await until(dsn, IN_PROCESS.unsettled, lambda count: count == 0)
        load = await offer(
            replace(spec, seconds=settings.seconds, requests=int(2 * warm.rate * settings.seconds) + 1_000)
        )
        settled = await until(dsn, IN_PROCESS.unsettled, lambda count: count == 0)
        normal = load.ok / (load.seconds + settled)
    finally:
        server.stop()
    server = echo_router(home, port, delivers=False)
    try:
        await offer(replace(spec, seconds=_SETTLE_SECONDS, requests=settings.undelivered))
        progress(f"{settings.undelivered:,} undelivered messages, normal rate {normal:,.0f}/s")
    finally:
        kill(server)
    server = echo_router(home, port, delivers=True)
    try:
        seconds = await until(dsn, IN_PROCESS.unsettled, lambda count: count == 0)
        problems = await trio.to_thread.run_sync(problems_of, dsn)
    finally:
        server.stop()
    progress(f"delivered {settings.undelivered / seconds:,.0f}/s after the start")
    return Rates(normal, settings.undelivered / seconds, problems)


def judge(found: Found, measured: Rates) -> list[Verdict]:
    return [
        Verdict(
            "ready line to the first old message delivered", found.first_seconds, 2.0, False, True, unit="s"
        ),
        Verdict(
            "delivery rate of what was found / normal rate",
            measured.recovering / measured.normal,
            0.5,
            True,
            True,
        ),
        Verdict(
            "disagreements in the tables",
            len(found.problems) + len(measured.problems),
            0,
            False,
            True,
            unit="",
        ),
    ]


async def run_parts(
    settings: RecoverSettings, home: Path, progress: Callable[[str], None]
) -> tuple[Found, Rates]:
    for part in ("find", "rates"):
        (home / part).mkdir()
    measured = await rates(settings, home / "rates", progress)
    found = await find(settings, home / "find", progress)
    return found, measured


def run(settings: RecoverSettings, json_path: Path | None) -> int:
    """The whole benchmark; the exit code, 1 when an acceptance line is missed."""
    head = envelope("recover", settings.as_json())
    # Postgres runs as another user when we are root, and must be able to pass through.
    home = Path(tempfile.mkdtemp(prefix="postroom-bench-", dir="/tmp"))
    home.chmod(0o755)
    try:
        found, measured = trio.run(run_parts, settings, home, lambda line: print(line, flush=True))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    verdicts = judge(found, measured)
    print_table(
        "A start after SIGKILL",
        ("what", "value"),
        [
            ("first of the old messages, s after ready", number(found.first_seconds, 2)),
            ("all of them, s after ready", number(found.all_seconds, 2)),
            ("normal delivery, messages/s", number(measured.normal)),
            ("delivery of what was found, messages/s", number(measured.recovering)),
        ],
    )
    print_verdicts(verdicts)
    failures = missed(verdicts)
    body = {
        **head,
        "found": asdict(found),
        "rates": asdict(measured),
        "verdicts": verdict_rows(verdicts),
        "passed": not failures,
    }
    print(f"result: {write_result(body, json_path)}")
    return 1 if failures else 0
