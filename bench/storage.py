"""`python -m bench storage`: what a message costs the database over its whole life, and what it leaves."""

import asyncio
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import trio

from actors.messages import Appended, Completion, Delivery, Item, Place, Session
from bench import audit, queries
from bench.audit import Watched
from bench.databases import ask, durable_settings, migrated
from bench.payloads import Population
from bench.queries import SHARE, UNDER_MS, Query, share
from bench.report import envelope, number, print_table, print_verdicts, verdict_rows, write_result
from bench.rounds import Round, measure_closed, measure_open
from bench.targets import IN_PROCESS, ROUTER, running
from bench.verdicts import Verdict, median_or_none, missed, ratio
from router.channels.whatsapp import Splitter
from router.clock import utc_now
from router.postgres.bridge import Bridge, open_bridge
from router.postgres.journal import PostgresJournal

BEYOND_PAYLOAD = 1_024.0  # bytes of WAL, at batch 100
HELD_SHARE = 0.90
DEAD_TUPLES = 20_000.0
"""A fraction of the versions that a minute of the load makes, which is how often autovacuum looks: most are
pruned by who comes by next, and hot tables stay a few pages."""

_HOT = (
    "journal_head",
    "journal_writers",
    "delivery_tallies",
    "leases",
    "user_sessions",
    "journal_stragglers",
)
# Everything between two places in the log, in two parts: records, and full images of pages that a checkpoint
# made necessary.
_WAL = """
SELECT coalesce(sum(record_size), 0) AS records, coalesce(sum(fpi_size), 0) AS images
  FROM pg_get_wal_stats($1::text::pg_lsn, $2::text::pg_lsn, false)
"""
_DEAD = "SELECT coalesce(sum(n_dead_tup), 0)::bigint FROM pg_stat_user_tables WHERE relname = ANY ($1)"


@dataclass(frozen=True)
class StorageSettings:
    """What one call does: items of each batch size, pairs of loads, seconds of a load and of the long one."""

    items: int = 20_000
    batches: tuple[int, ...] = (1, 100)
    rounds: int = 5
    seconds: float = 5.0
    connections: int = 128
    long_seconds: float = 600.0
    long_rate: float = 1_000.0
    messages: int = 5_000_000  # in the database whose queries are looked at

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Life:
    """Bytes of WAL for each item, from its body to its outcome, at one batch size; and of its body."""

    batch: int
    items: int
    checkpoints: int
    record_bytes: float
    image_bytes: float
    payload_bytes: float

    @property
    def beyond_payload(self) -> float:
        return self.record_bytes - self.payload_bytes


@dataclass(frozen=True)
class Held:
    """Acks per second without, and with a transaction that was held open all the time."""

    clean: Round
    held: Round

    @property
    def share(self) -> float | None:
        return ratio(self.held.rate, self.clean.rate)


# The life of an item


async def _connected(dsn: str, work: Callable[[asyncpg.Connection], Any]) -> Any:
    connection = await asyncpg.connect(dsn)
    try:
        return await work(connection)
    finally:
        await connection.close()


class Log:
    """What was written ahead since `begin`. Read before each checkpoint, after which its files may go."""

    def __init__(self, bridge: Bridge, dsn: str) -> None:
        self.records = self.images = 0
        self._bridge = bridge
        self._dsn = dsn
        self._at = ""

    async def begin(self) -> None:
        self._at = await self._now()

    async def _now(self) -> str:
        row = await ask(self._bridge, self._dsn, "SELECT pg_current_wal_lsn()::text")
        return str(row[0])

    async def read(self) -> None:
        now = await self._now()
        row = await ask(self._bridge, self._dsn, _WAL, self._at, now)
        self.records += int(row["records"])
        self.images += int(row["images"])
        self._at = now


def deliveries(bodies: Sequence[bytes]) -> list[Delivery]:
    splitter = Splitter("default", dedup_key=secrets.token_bytes(32), is_ours=lambda number: True)
    return [
        splitter.delivery(body, correlation_id=f"bench-{n}", traceparent=None, settle=lambda stored: None)
        for n, body in enumerate(bodies)
    ]


def completion(item: Item, version: int) -> Completion:
    """As most are: delivered, the session moved on, one reply less than most."""
    session = Session(
        key=item.session_key,
        phone_number_id=item.phone_number_id,
        wa_id=item.wa_id,
        user_id=None,
        active_service="rides",
        state={"step": "where_to", "at": version},
        version=version,
    )
    return Completion(
        item=item, place=Place.DELIVERED, service="rides", rule="keyword", attempts=1, session=session
    )


async def life(bridge: Bridge, dsn: str, journal: PostgresJournal, batch: int, items: int) -> Life:
    """Append and complete so many items in batches, over two checkpoints at least."""
    epoch = (await ask(bridge, dsn, "SELECT postroom_take_lease(gen_random_uuid(), '1 hour', true)"))[0]
    bodies = Population().bodies(items)
    log = Log(bridge, dsn)
    await log.begin()
    every = max(items // 3 // batch, 1)
    checkpoints = 0
    for number_of, start in enumerate(range(0, items, batch)):
        if number_of % every == every - 1:
            await log.read()
            await ask(bridge, dsn, "CHECKPOINT")
            checkpoints += 1
        result = await journal.append(deliveries(bodies[start : start + batch]), duplicates=0)
        if not isinstance(result, Appended):
            raise RuntimeError("the bodies of the benchmark are no duplicates")
        last = result.first_seq + len(result.session_keys)
        done = [completion(item, item.seq) for item in await journal.read(range(result.first_seq, last))]
        await journal.complete(done, epoch=epoch, low_water=last, stragglers=[])
    await log.read()
    return Life(
        batch=batch,
        items=items,
        checkpoints=checkpoints,
        record_bytes=log.records / items,
        image_bytes=log.images / items,
        payload_bytes=sum(map(len, bodies)) / items,
    )


async def lives(settings: StorageSettings, home: Path, progress: Callable[[str], None]) -> list[Life]:
    async with migrated(home) as (bridge, dsn):
        durable_settings_of = await trio.to_thread.run_sync(durable_settings, dsn)
        progress(f"postgres {durable_settings_of['server_version']}")
        await ask(bridge, dsn, "CREATE EXTENSION IF NOT EXISTS pg_walinspect")
        found = []
        for batch in settings.batches:
            async with _journal(bridge, dsn) as journal:
                found.append(await life(bridge, dsn, journal, batch, settings.items))
            one = found[-1]
            progress(f"batch {batch}: {one.record_bytes:,.0f} bytes of WAL an item")
        return found


@asynccontextmanager
async def _journal(bridge: Bridge, dsn: str) -> AsyncIterator[PostgresJournal]:
    journal = PostgresJournal(bridge, lambda: dsn, clock=utc_now, notify=lambda: False)
    try:
        await journal.keep_house()
        yield journal
    finally:
        with trio.CancelScope(shield=True):
            await journal.close()


# A load, with and without somebody who looks at the past


async def hold(dsn: str, ready: trio.Event) -> None:
    """Keep a transaction with a snapshot open until cancelled."""
    async with open_bridge() as bridge:
        connection = await bridge.run(lambda: asyncpg.connect(dsn))
        try:
            transaction = connection.transaction(isolation="repeatable_read")
            await bridge.run(transaction.start)
            await bridge.run(lambda: connection.fetchval("SELECT count(*) FROM journal_head"))
            ready.set()
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await bridge.run(connection.close)


async def held_open(settings: StorageSettings, home: Path, progress: Callable[[str], None]) -> list[Held]:
    pairs = []
    async with running(ROUTER, home) as router:
        assert router.dsn is not None

        async def load(number_of: int) -> Round:
            return await measure_closed(
                router,
                number_of,
                connections=settings.connections,
                seconds=settings.seconds,
                warm_up_seconds=1.0,
            )

        for number_of in range(settings.rounds):
            first_held = bool(number_of % 2)
            results: dict[bool, Round] = {}
            for is_held in (first_held, not first_held):
                async with trio.open_nursery() as nursery:
                    if is_held:
                        ready = trio.Event()
                        nursery.start_soon(hold, router.dsn, ready)
                        await ready.wait()
                    results[is_held] = await load(number_of)
                    nursery.cancel_scope.cancel()
            pairs.append(Held(results[False], results[True]))
            progress(
                f"round {number_of + 1}: {results[False].rate:,.0f} acks/s clean, "
                f"{results[True].rate:,.0f} with a transaction held open"
            )
    return pairs


async def dead_tuples(settings: StorageSettings, home: Path, progress: Callable[[str], None]) -> list[int]:
    """The dead tuples of the hot tables together, looked at every five seconds of a steady load."""
    seen: list[int] = []
    async with running(IN_PROCESS, home) as router:
        dsn = router.dsn
        assert dsn is not None

        async def look() -> None:
            while True:
                await trio.sleep(5)
                seen.append(await trio.to_thread.run_sync(_dead, dsn))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await measure_open(
                router,
                0,
                connections=settings.connections,
                seconds=settings.long_seconds,
                warm_up_seconds=1.0,
                rate=settings.long_rate,
            )
            nursery.cancel_scope.cancel()
    progress(
        f"dead tuples of the hot tables in {settings.long_seconds:,.0f} s: at most {max(seen, default=0):,}"
    )
    return seen


def _dead(dsn: str) -> int:
    async def work(connection: asyncpg.Connection) -> int:
        return int(await connection.fetchval(_DEAD, list(_HOT)))

    return int(asyncio.run(_connected(dsn, work)))


# The whole


@dataclass
class Found:
    """What each part of the benchmark found."""

    lives: list[Life] = field(default_factory=list)
    pairs: list[Held] = field(default_factory=list)
    dead: list[int] = field(default_factory=list)
    queries: list[Query] = field(default_factory=list)
    watched: list[Watched] = field(default_factory=list)


def judge(found: Found) -> list[Verdict]:
    verdicts = [
        Verdict(
            f"bytes of WAL of an item beyond its payload, batch {one.batch}",
            one.beyond_payload,
            BEYOND_PAYLOAD,
            at_least=False,
            required=one.batch >= 100,
            unit="bytes",
        )
        for one in found.lives
    ]
    counted = [
        pair.share
        for pair in found.pairs
        if not (pair.clean.void or pair.held.void) and pair.share is not None
    ]
    verdicts.append(
        Verdict(
            "acks/s with a transaction held open / clean, median of the pairs",
            median_or_none(share for share in counted if share is not None),
            HELD_SHARE,
            at_least=True,
            required=True,
        )
    )
    verdicts.append(
        Verdict(
            "dead tuples of the hot tables, at most",
            float(max(found.dead)) if found.dead else None,
            DEAD_TUPLES,
            at_least=False,
            required=True,
            unit="",
        )
    )
    verdicts.append(
        Verdict(
            f"queries of commands under {UNDER_MS:.0f} ms, share",
            share(found.queries),
            SHARE,
            at_least=True,
            required=True,
        )
    )
    return verdicts


async def run_parts(settings: StorageSettings, home: Path, progress: Callable[[str], None]) -> Found:
    def place(part: str) -> Path:
        (home / part).mkdir()
        return home / part

    found = Found()
    found.lives = await lives(settings, place("life"), progress)
    found.pairs = await held_open(settings, place("held"), progress)
    found.watched = await audit.measured(place("audit"), settings.rounds, progress)
    found.queries = await queries.measured(
        queries.QuerySettings(messages=settings.messages), place("queries"), progress
    )
    shutil.rmtree(home / "queries")
    found.dead = await dead_tuples(settings, place("dead"), progress)
    return found


def run(settings: StorageSettings, json_path: Path | None) -> int:
    """The whole benchmark; the exit code, 1 when an acceptance line is missed."""
    head = envelope("storage", settings.as_json())
    # Postgres runs as another user when we are root, and must be able to pass through.
    home = Path(tempfile.mkdtemp(prefix="postroom-bench-", dir="/tmp"))
    home.chmod(0o755)
    try:
        found = trio.run(run_parts, settings, home, lambda line: print(line, flush=True))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    verdicts = judge(found)
    print_table(
        "Bytes of WAL for an item over its whole life",
        ("batch", "payload", "records", "beyond the payload", "full-page images", "checkpoints"),
        [
            (
                f"{one.batch}",
                number(one.payload_bytes),
                number(one.record_bytes),
                number(one.beyond_payload),
                number(one.image_bytes),
                f"{one.checkpoints}",
            )
            for one in found.lives
        ],
    )
    print_table(
        "The slowest queries of commands",
        ("command", "query", "ms"),
        [
            (one.command, one.name, number(one.milliseconds))
            for one in sorted(found.queries, key=lambda one: -one.milliseconds)[:10]
        ],
    )
    print_table(
        "A changed row of a table that is watched by the audit log",
        ("rows of a statement", "us", "us, watched", "bytes of WAL", "bytes of WAL, watched"),
        [
            (
                f"{one.rows}",
                number(one.plain_us),
                number(one.watched_us),
                number(one.plain_wal),
                number(one.watched_wal),
            )
            for one in found.watched
        ],
    )
    print_verdicts(verdicts)
    failures = missed(verdicts)
    body = {
        **head,
        "lives": [{**asdict(one), "beyond_payload": one.beyond_payload} for one in found.lives],
        "held": [{"clean": pair.clean.as_json(), "held": pair.held.as_json()} for pair in found.pairs],
        "dead_tuples": found.dead,
        "queries": [one.as_json() for one in found.queries],
        "audit": [one.as_json() for one in found.watched],
        "verdicts": verdict_rows(verdicts),
        "passed": not failures,
    }
    print(f"result: {write_result(body, json_path)}")
    return 1 if failures else 0
