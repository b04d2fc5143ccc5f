"""The queries that operators' commands make, one by one, in a database of millions of messages: how long each
takes, and by which plan. A part of `python -m bench storage`.
"""

import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import asyncpg
import trio

from bench.databases import migrated
from router.archive.files import ArchiveFiles
from router.config import Config
from router.erasing import Eraser
from router.operations import Letters, Operations
from router.postgres.bridge import Bridge
from router.postgres.connections import ADMIN, OWNER, connect
from router.postgres.statements import statements
from router.retrieval import search

UNDER_MS = 100.0
SHARE = 0.95
_NUMBER = "100200300"
_AT_ONCE = 50_000
_LONG = 3_600.0
_LONG_COMMAND = 20.0  # seconds; one that pages through everything makes each query often enough in one run
_PLAN_CHARACTERS = 4_000
_DAYS = 28.0
# Plans come as messages to the client, those of the statements inside of functions too.
_EXPLAINED = (
    "-c session_preload_libraries=auto_explain -c auto_explain.log_min_duration=0 -c client_min_messages=log "
    "-c auto_explain.log_nested_statements=on"
)

_JOB = "dlq-report"
_WEEKS = """
SELECT postroom_make_partitions($1::timestamptz - make_interval(weeks => n), 1) FROM generate_series(0, 5) n
"""
# One in 5,000 is malformed, one in a hundred a dead letter, one in five was answered. $1 the time of the
# first, $2 how many, $3 the time between two, $4 people.
_MESSAGES = """
WITH new AS MATERIALIZED (
    SELECT h.next_seq + n AS seq, h.next_event + n AS event, $1::timestamptz + n * $3::interval AS at,
           (250700000000 + (h.next_seq + n) % $4::bigint)::text AS person,
           '100200300:' || (250700000000 + (h.next_seq + n) % $4::bigint) AS session_key,
           decode(lpad(to_hex(h.next_seq + n), 32, '0'), 'hex') AS key,
           (h.next_seq + n) % 5000 = 0 AS is_malformed, (h.next_seq + n) % 100 = 1 AS is_letter,
           (h.next_seq + n) % 1000 = 1 AS is_pending, (h.next_seq + n) % 5 = 0 AS is_answered
      FROM journal_head h, generate_series(0, $2::bigint - 1) AS n
), events AS (
    INSERT INTO wa_events (event_id, received_at, app, correlation_id, partial, body)
    SELECT event, at, 'default', 'bench-' || seq, false, convert_to(format(
           '{"object":"whatsapp_business_account","entry":[{"id":"1","changes":[{"field":"messages","value":{'
           '"messaging_product":"whatsapp","metadata":{"display_phone_number":"15550000000",'
           '"phone_number_id":"100200300"},"contacts":[{"profile":{"name":"Ada"},"wa_id":"%1$s"}],"messages":['
           '{"from":"%1$s","id":"wamid.%2$s","timestamp":"1700000000","type":"text","text":{"body":"%3$s"}}'
           ']}}]}]}', person, seq, repeat('word ', 50)), 'UTF8')
      FROM new
), items AS (
    INSERT INTO whatsapp_messages_items (seq, received_at, event_id, key, kind, path, message_id,
                                         phone_number_id, session_key, type, bucket, reason)
    SELECT seq, at, event, key, 'm', '0.0.m0', 'wamid.' || seq, '100200300',
           CASE WHEN NOT is_malformed THEN session_key END, 'text',
           CASE WHEN is_malformed THEN 'malformed' END, CASE WHEN is_malformed THEN 'no_sender' END
      FROM new
), ledger AS (
    INSERT INTO dedup_ledger_0 (key, seq) SELECT key, seq FROM new
), outcomes AS (
    INSERT INTO message_outcomes (seq, received_at, completed_at, epoch, attempts, outcome, service, rule)
    SELECT seq, at, at, 1, 1, CASE WHEN is_letter THEN 'dead_letter' ELSE 'delivered' END, 'rides', 'keyword'
      FROM new WHERE NOT is_malformed
), replies AS (
    INSERT INTO whatsapp_outbox (seq, ordinal, session_key, phone_number_id, recipient, service, payload,
                                 status, correlation_id, created_at, message_id)
    SELECT seq, 1, session_key, '100200300', person, 'rides',
           '{"type": "text", "text": {"body": "a driver is on the way"}}', 'sent', 'bench-' || seq, at,
           'wamid.out' || seq
      FROM new WHERE is_answered
), statuses AS (
    INSERT INTO whatsapp_statuses (phone_number_id, message_id, status, rank, status_at, recorded_at)
    SELECT '100200300', 'wamid.out' || seq, 'read', 3, at, at FROM new WHERE is_answered
), letters AS (
    INSERT INTO webhook_dlq (phone_number, service, payload, error_message, status, resolution, created_at,
                             updated_at, seq, received_at, message_id, session_key, attempts, correlation_id,
                             next_retry_at)
    SELECT person, (ARRAY['rides', 'wallet', 'jobs'])[1 + seq % 3],
           '{"type": "text", "text": {"body": "taxi please"}}', 'answered 503',
           CASE WHEN is_pending THEN 'pending' ELSE 'failed' END,
           CASE WHEN NOT is_pending THEN 'exhausted' END, at, at, seq, at, 'wamid.' || seq, session_key, 1,
           'bench-' || seq, CASE WHEN is_pending THEN at END
      FROM new WHERE is_letter
), tallies AS (
    UPDATE delivery_tallies
       SET delivered = delivered + (SELECT count(*) FROM new WHERE NOT is_malformed AND NOT is_letter),
           dead_letter = dead_letter + (SELECT count(*) FROM new WHERE is_letter),
           low_water = (SELECT max(seq) + 1 FROM new)
)
UPDATE journal_head SET next_seq = next_seq + $2, next_event = next_event + $2, received = received + $2,
                        malformed = malformed + (SELECT count(*) FROM new WHERE is_malformed)
"""
_PEOPLE = """
WITH people AS (
    SELECT (250700000000 + n)::text AS person, n FROM generate_series(0, $1::bigint - 1) AS n
), named AS (
    INSERT INTO session_names (phone_number_id, name, session_key, since)
    SELECT '100200300', person, '100200300:' || person, n FROM people
)
INSERT INTO user_sessions (session_key, phone_number_id, wa_id, active_service, state, version,
                           last_interaction, created_at)
SELECT '100200300:' || person, '100200300', person, 'rides', '{"step": "where_to"}', n, $2, $2 FROM people
"""


@dataclass(frozen=True)
class QuerySettings:
    """How many messages there are, of how many people; each command is done so many times after the first."""

    messages: int = 5_000_000
    people: int = 100_000
    repeats: int = 3

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Query:
    """One query of one command: seconds of each time, and the plans, its own last."""

    command: str
    name: str
    seconds: list[float] = field(default_factory=list)
    plan: list[str] = field(default_factory=list)

    @property
    def milliseconds(self) -> float:
        return median(self.seconds) * 1_000 if self.seconds else float("inf")

    def as_json(self) -> dict[str, Any]:
        return {
            "command": self.command,
            "name": self.name,
            "ms": round(self.milliseconds, 2),
            "plan": self.plan,
        }


Work = Callable[[Operations], Awaitable[Any]]


@dataclass(frozen=True)
class Command:
    """One command as the command line has it, and what it asks of the database."""

    name: str
    work: Work
    role: str = ADMIN


def commands(home: Path, messages: int, people: int) -> list[Command]:
    """Those that read or change what is there; not those that only start something."""
    letter = messages // 2 // 100 * 100 + 1
    event = messages // 2 // 5_000 * 5_000
    person = str(250700000000 + messages // 2 % people)
    victims = iter(range(7, people, 11))

    async def identity(operations: Operations) -> uuid.UUID:
        found: uuid.UUID = await operations.run(
            lambda c: c.fetchval("SELECT id FROM webhook_dlq WHERE seq = $1", letter)
        )
        return found

    async def on_one(operations: Operations, act: Callable[[list[uuid.UUID]], Awaitable[Any]]) -> None:
        await act(await operations.choose(Letters(ids=(await identity(operations),))))

    async def show(operations: Operations) -> None:
        await operations.dead_letters(Letters(ids=(await identity(operations),)))

    async def edit(operations: Operations) -> None:
        await operations.edit(await identity(operations), {"type": "text"}, actor="bench")

    async def find(operations: Operations) -> None:
        await search(operations, ArchiveFiles(str(home / "archive")), person=person, message_id=None)

    def letters(**which: Any) -> Work:
        return lambda operations: operations.dead_letters(Letters(limit=50, **which))

    def eraser(operations: Operations) -> Eraser:
        return Eraser(operations, actor="bench", within=5)

    week_ago = datetime.now(UTC) - timedelta(days=7)
    return [
        Command("check", lambda o: o.check()),
        Command("send", lambda o: o.became_of(_NUMBER, "wamid.1")),
        Command("dlq list", letters()),
        Command("dlq list --service wallet", letters(service="wallet")),
        Command("dlq list --status failed", letters(status="failed")),
        Command("dlq list --status pending", letters(status="pending")),
        Command("dlq list --resolution exhausted", letters(resolution="exhausted")),
        Command("dlq list --session KEY", letters(session=f"{_NUMBER}:{person}")),
        Command("dlq list --older-than 7d", letters(created_before=week_ago)),
        Command("dlq show ID", show),
        Command("dlq edit ID", edit),
        Command("dlq retry ID", lambda o: on_one(o, lambda ids: o.retry(ids, actor="bench"))),
        Command("dlq retry --all --status pending --dry-run", lambda o: o.choose(Letters(status="pending"))),
        Command("dlq discard ID", lambda o: on_one(o, lambda ids: o.discard(ids, reason="", actor="bench"))),
        Command("dlq export --service jobs --status pending", letters(service="jobs", status="pending")),
        Command("events list", lambda o: o.events(every=False, reason=None, limit=50)),
        Command("events list --all", lambda o: o.events(every=True, reason=None, limit=50)),
        Command("events list --reason X", lambda o: o.events(every=False, reason="no_sender", limit=50)),
        Command("events show ID", lambda o: o.event(event)),
        Command("events reparse ID", lambda o: o.reparse([event], None, dry_run=True, actor="bench")),
        Command("events reparse --all", lambda o: o.reparse(None, None, dry_run=True, actor="bench")),
        Command("jobs list", lambda o: o.jobs()),
        Command("jobs runs", lambda o: o.job_runs(None, 50)),
        Command("jobs runs NAME", lambda o: o.job_runs(_JOB, 50)),
        Command("jobs run NAME", lambda o: o.run_job(_JOB, actor="bench", within=0.05)),
        Command("jobs disable NAME", lambda o: o.switch_job(_JOB, False, actor="bench")),
        Command("jobs enable NAME", lambda o: o.switch_job(_JOB, True, actor="bench")),
        Command("jobs schedule", lambda o: o.schedule_job(_JOB, "1 1 * * 1", actor="bench")),
        Command("settings list", lambda o: o.settings()),
        Command("settings set", lambda o: o.change_setting("retention_days", 30, actor="bench")),
        Command("rls-audit", lambda o: o.rls_audit()),
        Command("audit list", lambda o: o.audit_log(None, None, None, 50)),
        Command("audit list --table T", lambda o: o.audit_log("postroom_jobs", None, None, 50)),
        Command("audit list --id ID", lambda o: o.audit_log(None, "1", None, 50)),
        Command("audit list --since 7d", lambda o: o.audit_log(None, None, week_ago, 50)),
        Command("audit watch T", lambda o: o.watch("user_sessions", ["state"]), OWNER),
        Command("audit unwatch T", lambda o: o.unwatch("user_sessions"), OWNER),
        Command("archive list", lambda o: o.archives()),
        Command("archive search --wa-id N", find),
        Command("erase --dry-run", lambda o: eraser(o).look(person), OWNER),
        Command("erase", lambda o: eraser(o).erase(str(250700000000 + next(victims))), OWNER),
    ]


async def fill(bridge: Bridge, dsn: str, settings: QuerySettings, progress: Callable[[str], None]) -> None:
    """A database as it is after a month: everything in it has ended, but for some dead letters."""
    now = datetime.now(UTC)
    step = timedelta(days=_DAYS) / settings.messages

    async def work() -> None:
        connection = await asyncpg.connect(dsn)
        try:
            await connection.execute(_WEEKS, now)
            await connection.execute(_PEOPLE, settings.people, now, timeout=_LONG)
            for start in range(0, settings.messages, _AT_ONCE):
                await connection.execute(
                    _MESSAGES,
                    now - timedelta(days=_DAYS) + start * step,
                    min(_AT_ONCE, settings.messages - start),
                    step,
                    settings.people,
                    timeout=_LONG,
                )
            # As autovacuum leaves it.
            await connection.execute("VACUUM (ANALYZE)", timeout=_LONG)
            await connection.execute(
                "ANALYZE wa_events, whatsapp_messages_items, message_outcomes", timeout=_LONG
            )
        finally:
            await connection.close()

    await bridge.run(work)
    progress(f"{settings.messages:,} messages of {settings.people:,} people")


def _names() -> dict[str, str]:
    """The named statements by their texts."""
    folder = files("router.postgres") / "queries"
    named: dict[str, str] = {}
    for file in sorted(
        one.name.removesuffix(".sql") for one in folder.iterdir() if one.name.endswith(".sql")
    ):
        named.update({text: f"{file}.{name}" for name, text in statements(file).items()})
    return named


class Watch:
    """Listens to one connection: which named queries it makes, how long each takes, and by which plans."""

    def __init__(self, command: str, found: dict[tuple[str, str], Query], *, timed: bool) -> None:
        self._command = command
        self._found = found
        self._timed = timed
        self._named = _names()
        self._inner: list[str] = []
        self.plans: dict[str, list[str]] = {}

    def plan(self, _connection: Any, message: Any) -> None:
        """Told at the end of each statement, of those inside of functions first. Its text says which."""
        said = str(message.message)
        if not said.startswith("duration:"):
            return
        plan = said.partition("plan:\n")[2]
        text = plan.removeprefix("Query Text: ")
        name = next((name for one, name in self._named.items() if text.startswith(f"{one}\n")), None)
        if name is None:
            self._inner.append(plan)
            return
        self.plans.setdefault(name, [*(inner[:_PLAN_CHARACTERS] for inner in self._inner[-2:]), plan])
        self._inner = []

    def query(self, said: Any) -> None:
        name = self._named.get(said.query)
        if name is not None:
            query = self._found.setdefault((self._command, name), Query(self._command, name))
            if self._timed:
                query.seconds.append(said.elapsed)

    def attach_plans(self) -> None:
        """To the queries that the command made; what functions make inside is not the command's."""
        for (command, name), query in self._found.items():
            if command == self._command and name in self.plans:
                query.plan = self.plans[name]


async def _do(
    bridge: Bridge,
    dsn: str,
    command: Command,
    config: Config,
    found: dict[tuple[str, str], Query],
    *,
    timed: bool,
) -> float:
    """Returns how long the command took, in seconds."""
    watch = Watch(command.name, found, timed=timed)
    asked = dsn if timed else f"{dsn}{'&' if '?' in dsn else '?'}options={quote(_EXPLAINED)}"

    async def opened() -> asyncpg.Connection:
        connection = await connect(asked, name="operator", role=command.role)
        connection.add_query_logger(watch.query)
        connection.add_log_listener(watch.plan)
        return connection

    connection = await bridge.run(opened)
    began = trio.current_time()
    try:
        await command.work(Operations(config, bridge, lambda: dsn, connection))
    finally:
        with trio.CancelScope(shield=True):
            await bridge.run(connection.close)
    watch.attach_plans()
    return trio.current_time() - began


async def measured(settings: QuerySettings, home: Path, progress: Callable[[str], None]) -> list[Query]:
    """Every query of every command, in the order in which they are made."""
    async with migrated(home) as (bridge, dsn):
        await fill(bridge, dsn, settings, progress)
        config = Config.for_embedding(app_secret="s", verify_token="v", data_dir=home, database_url=dsn)
        found: dict[tuple[str, str], Query] = {}
        for command in commands(home, settings.messages, settings.people):
            took = await _do(bridge, dsn, command, config, found, timed=False)
            for _ in range(settings.repeats if took < _LONG_COMMAND else 1):
                await _do(bridge, dsn, command, config, found, timed=True)
            mine = [one for one in found.values() if one.command == command.name]
            progress(f"{command.name}: {max((one.milliseconds for one in mine), default=0):,.1f} ms")
        return list(found.values())


def share(queries: Sequence[Query]) -> float | None:
    """How many of them are fast enough."""
    if not queries:
        return None
    return sum(one.milliseconds < UNDER_MS for one in queries) / len(queries)
