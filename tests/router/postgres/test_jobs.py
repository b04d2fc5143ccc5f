"""Jobs on a real Postgres: their log, their switches, what they remove, what operators' SQL sees of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
import trio
from postgres_kit import Database, ManualClock, database, database_dsn, server
from tables import each

from actors.errors import LeaseLost
from router.housekeeping import Housekeeping
from router.postgres.archives import PostgresArchives
from router.postgres.jobs import Metric, PostgresJobs
from router.postgres.journal import PostgresJournal
from router.schedule import next_time

__all__ = ["database", "database_dsn", "server"]

pytestmark = pytest.mark.postgres

JOBS = (
    "process-dlq-entries",
    "session-cleanup",
    "create-wa-events-partitions",
    "archive-partitions",
    "dlq-report",
    "rls-audit",
    "attach-audit",
)
NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)


@asynccontextmanager
async def opened(database: Database, clock: ManualClock) -> AsyncIterator[PostgresJobs]:
    jobs = PostgresJobs(database.bridge, lambda: database.dsn, clock=clock)
    try:
        yield jobs
    finally:
        with trio.CancelScope(shield=True):
            await jobs.close()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(2026, 3, 2)


@pytest.fixture
async def jobs(database: Database, clock: ManualClock) -> AsyncIterator[PostgresJobs]:
    async with opened(database, clock) as jobs:
        yield jobs


async def switched(database: Database) -> dict[str, bool]:
    return dict(await database.fetch("SELECT jobname, active FROM cron.job"))


async def test_every_job_is_on_and_has_a_schedule_that_can_be_read(
    jobs: PostgresJobs, database: Database
) -> None:
    found = await jobs.jobs(await database.take_epoch())
    assert {job.name for job in found} == set(JOBS)
    assert all(job.active and job.followed_to == NOW and not job.requested for job in found)
    assert all(next_time(job.schedule, NOW) > NOW for job in found)


async def test_a_run_is_on_record(jobs: PostgresJobs, database: Database, clock: ManualClock) -> None:
    epoch = await database.take_epoch()
    await database.fetch("SELECT postroom_request_job($1, 'me', 'session-cleanup')", NOW)
    assert [job.name for job in await jobs.jobs(epoch) if job.requested] == ["session-cleanup"]
    run = await jobs.begin(epoch, "session-cleanup")
    clock.now += timedelta(seconds=5)
    assert not any(job.requested for job in await jobs.jobs(epoch))
    await jobs.end(epoch, run, failed=True, message="no\0room")
    [row] = await database.fetch(
        "SELECT status, return_message, start_time, end_time FROM cron.job_run_details "
        "WHERE jobname = 'session-cleanup'"
    )
    assert tuple(row) == ("failed", "no�room", NOW, NOW + timedelta(seconds=5))
    assert await database.value("SELECT last_run FROM cron.job WHERE jobname = 'session-cleanup'") == NOW
    assert await database.value("SELECT detail::text FROM audit_log WHERE action = 'job.run'") == "{}"


async def test_a_run_that_was_never_ended_was_interrupted(jobs: PostgresJobs, database: Database) -> None:
    await jobs.begin(await database.take_epoch(), "session-cleanup")
    second = await jobs.begin(await database.take_epoch(), "session-cleanup")
    rows = await database.fetch("SELECT runid, status, return_message FROM postroom_job_runs ORDER BY runid")
    assert [row["status"] for row in rows] == ["failed", "running"]
    assert rows[0]["return_message"].startswith("interrupted")
    assert rows[1]["runid"] == second


async def test_the_epoch_fences_every_write(jobs: PostgresJobs, database: Database) -> None:
    old = await database.take_epoch()
    run = await jobs.begin(old, "session-cleanup")
    await database.take_epoch()
    for late in (
        lambda: jobs.jobs(old),
        lambda: jobs.begin(old, "session-cleanup"),
        lambda: jobs.end(old, run, failed=False, message="late"),
        lambda: jobs.clean_sessions(old, NOW),
        lambda: jobs.clean_dead_letters(old, NOW),
        lambda: jobs.clean_statuses(old, NOW),
        lambda: jobs.clean_logs(old, runs_before=NOW, metrics_before=NOW),
        lambda: jobs.record(old, [Metric("rides", "late", 1.0)]),
    ):
        with pytest.raises(LeaseLost):
            await late()
    assert await database.value("SELECT status FROM postroom_job_runs") == "running"


# Switches


@each("name", ["process-dlq-entries", "dlq-processor"])
async def test_one_switch_has_two_names(database: Database, name: str) -> None:
    await database.fetch("UPDATE cron.job SET active = false WHERE jobname = $1", name)
    off = {name for name, active in (await switched(database)).items() if not active}
    assert off == {"process-dlq-entries", "dlq-processor"}
    await database.fetch("UPDATE cron.job SET active = true WHERE jobname = $1", name)
    assert all((await switched(database)).values())


async def test_who_was_switched_on_follows_its_schedule_from_then_on(
    jobs: PostgresJobs,
    database: Database,
    clock: ManualClock,
) -> None:
    epoch = await database.take_epoch()
    await jobs.jobs(epoch)
    await database.fetch("UPDATE cron.job SET active = false WHERE jobname = 'session-cleanup'")
    clock.now += timedelta(days=9)
    await database.fetch("UPDATE cron.job SET active = true WHERE jobname = 'session-cleanup'")
    followed = {job.name: job.followed_to for job in await jobs.jobs(epoch)}
    assert followed["session-cleanup"] == clock.now
    assert followed["dlq-report"] == NOW


@each("change", ["schedule = '* * * * *'", "jobname = 'x'", "command = 'x', active = false"])
async def test_nothing_else_of_the_view_can_be_changed(database: Database, change: str) -> None:
    with pytest.raises(asyncpg.RaiseError, match="postroom jobs schedule"):
        await database.fetch(f"UPDATE cron.job SET {change} WHERE jobname = 'session-cleanup'")
    assert all((await switched(database)).values())


async def test_a_switch_is_heard_of_at_once(database: Database) -> None:
    heard: list[str] = []
    async with database.connection() as listening:
        for channel in ("postroom_jobs", "postroom_dead_letters"):
            await database.bridge.run(
                lambda channel=channel: listening.add_listener(channel, lambda *said: heard.append(said[2]))
            )
        await database.fetch("UPDATE cron.job SET active = false WHERE jobname = 'dlq-processor'")
        await database.bridge.run(lambda: listening.fetchval("SELECT 1"))
        assert set(heard) == {"postroom_jobs", "postroom_dead_letters"}
        heard.clear()
        await database.fetch(
            "UPDATE cron.job SET active = false WHERE jobname = 'dlq-processor'"
        )  # it is off
        await database.bridge.run(lambda: listening.fetchval("SELECT 1"))
        assert heard == []


async def test_the_views_make_room_for_pg_cron(database: Database) -> None:
    assert await database.value("SELECT postroom_drop_cron_views()")
    assert await database.value("SELECT to_regnamespace('cron') IS NULL")
    assert not await database.value("SELECT postroom_drop_cron_views()")
    await database.fetch("CREATE SCHEMA cron")
    await database.fetch("CREATE TABLE cron.job (jobid bigint)")  # as the extension has it
    assert not await database.value("SELECT postroom_make_cron_views()")
    assert not await database.value("SELECT postroom_drop_cron_views()")


async def test_a_clock_that_leapt_ahead_and_came_back_stops_no_job(
    jobs: PostgresJobs, database: Database, clock: ManualClock
) -> None:
    epoch = await database.take_epoch()
    clock.now += timedelta(days=400)
    await jobs.begin(epoch, "session-cleanup")
    clock.now -= timedelta(days=400)
    followed = {job.name: job.followed_to for job in await jobs.jobs(epoch)}
    assert followed["session-cleanup"] == clock.now


async def test_a_process_of_the_version_before_logs_its_runs(database: Database, clock: ManualClock) -> None:
    epoch = await database.take_epoch()
    await database.fetch(_OPEN, NOW)
    await database.fetch("UPDATE cron.job SET active = false WHERE jobname = 'dlq-processor'")
    await database.fetch("UPDATE webhook_dlq SET status = 'failed' WHERE seq > 1")
    due = await database.fetch(
        "SELECT service, due FROM postroom_log_retry_run($1, $2, 0, 0, NULL, '{rides}')", epoch, NOW
    )
    assert due == []  # it is switched off
    assert await database.value("SELECT count(*) FROM dlq_processing_log") == 1


# Settings


@each("value", ["0", "3651", "-1", "1.5", '"7"', "null", "[7]", "1e99", "true"])
async def test_a_setting_is_a_whole_number_within_its_bounds(database: Database, value: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError, match="whole_number_within_its_bounds"):
        await database.fetch(
            "UPDATE system_settings SET value = $1::text::jsonb WHERE name = 'run_log_days'", value
        )


async def test_a_setting_is_read_anew(jobs: PostgresJobs, database: Database) -> None:
    before = await jobs.settings()
    await database.fetch("SELECT postroom_change_setting($1, 'me', 'run_log_days', 90)", NOW)
    assert await jobs.settings() == {**before, "run_log_days": 90}
    assert not await database.value("SELECT postroom_change_setting($1, 'me', 'nothing', 90)", NOW)


# Housekeeping

_SESSIONS = """
INSERT INTO user_sessions (session_key, phone_number_id, version, last_interaction, created_at)
SELECT 'key' || lpad(n::text, 6, '0'), '1', n, $1::timestamptz - n * interval '1 minute', $1
  FROM generate_series(1, $2::integer) n
"""
_LETTERS = """
INSERT INTO webhook_dlq (service, payload, error_message, status, resolution, created_at, updated_at, seq,
                         received_at, session_key, attempts, correlation_id)
SELECT s.service, '{}', 'x', s.status, s.resolution, $1::timestamptz - s.age, $1::timestamptz - s.age,
       row_number() OVER (), $1, 'key', 1, 'c'
  FROM (VALUES ('rides', 'reprocessed', 'reprocessed', interval '8 days'),
               ('rides', 'failed', 'discarded', interval '8 days'),
               ('rides', 'reprocessed', 'reprocessed', interval '6 days'),
               ('rides', 'failed', 'exhausted', interval '99 days'),
               ('jobs', 'failed', 'rejected', interval '2 days'),
               ('jobs', 'pending', 'deferred', interval '1 day')) AS s (service, status, resolution, age)
"""


@asynccontextmanager
async def housekeeping(
    database: Database, jobs: PostgresJobs, clock: ManualClock
) -> AsyncIterator[Housekeeping]:
    async with database.journal(clock=clock) as journal:
        archives = PostgresArchives(database.bridge, lambda: database.dsn, clock=clock)
        try:
            yield Housekeeping(
                jobs, journal, archives, "/nowhere", session_ttl=timedelta(hours=24), clock=clock
            )
        finally:
            with trio.CancelScope(shield=True):
                await archives.close()


async def test_what_has_had_its_time_is_removed(
    jobs: PostgresJobs,
    database: Database,
    clock: ManualClock,
) -> None:
    await database.fetch(_SESSIONS, NOW, 12_000)  # more than two pages
    await database.fetch(_LETTERS, NOW)
    await database.fetch(
        "INSERT INTO whatsapp_statuses "
        "SELECT n % 3, n, 'sent', 1, NULL, $1::timestamptz - n * interval '1 hour' "
        "FROM generate_series(1, 1000) n",
        NOW,
    )
    await database.fetch(
        "INSERT INTO dlq_processing_log (processed_at, status, entries_processed, entries_failed) "
        "SELECT $1::timestamptz - n * interval '1 day', 'completed', 0, 0 FROM generate_series(1, 40) n",
        NOW,
    )
    epoch = await database.take_epoch()
    await jobs.record(epoch, [Metric("rides", "old", 1.0)])
    await database.fetch("UPDATE service_metrics SET recorded_at = recorded_at - interval '31 days'")
    async with housekeeping(database, jobs, clock) as house:
        said = await house.work["session-cleanup"](epoch)
        again = await house.work["session-cleanup"](epoch)
    assert said == "removed 10560 sessions, 2 processed dead letters, 280 statuses, 10 runs, 1 metrics"
    assert again == "removed 0 sessions, 0 processed dead letters, 0 statuses, 0 runs, 0 metrics"
    assert await database.value("SELECT count(*) FROM user_sessions") == 1_440
    left = await database.fetch("SELECT resolution FROM webhook_dlq ORDER BY seq")
    assert [row[0] for row in left] == ["reprocessed", "exhausted", "rejected", "deferred"]
    counted = dict(
        await database.fetch(
            "SELECT metric, value FROM service_metrics WHERE service = 'session-cleanup' ORDER BY id LIMIT 5"
        )
    )
    assert counted["sessions_removed"] == 10_560
    assert counted["processed_dead_letters_removed"] == 2


async def test_settings_say_how_long_things_are_kept(
    jobs: PostgresJobs,
    database: Database,
    clock: ManualClock,
) -> None:
    await database.fetch(_LETTERS, NOW)
    await database.fetch("SELECT postroom_change_setting($1, 'me', 'processed_dead_letters_days', 5)", NOW)
    async with housekeeping(database, jobs, clock) as house:
        assert "3 processed dead letters" in await house.work["session-cleanup"](await database.take_epoch())


async def test_the_report_says_what_became_of_dead_letters(
    jobs: PostgresJobs,
    database: Database,
    clock: ManualClock,
) -> None:
    epoch = await database.take_epoch()
    async with housekeeping(database, jobs, clock) as house:
        assert await house.work["dlq-report"](epoch) == "no dead letters in seven days"
        await database.fetch(_LETTERS, NOW)
        assert await house.work["dlq-report"](epoch) == (
            "jobs: 2 created, 0 reprocessed, 0 discarded, 1 failed, 1 still open; "
            "rides: 1 created, 1 reprocessed, 0 discarded, 0 failed, 0 still open"
        )
    stored: dict[Any, Any] = {
        (row["service"], row["metric"]): row["value"]
        for row in await database.fetch("SELECT * FROM service_metrics")
    }
    assert stored["jobs", "dead_letters_of_the_week_created"] == 2
    assert stored["rides", "dead_letters_of_the_week_reprocessed"] == 1


async def test_partitions_are_made_ahead(
    jobs: PostgresJobs,
    database: Database,
    clock: ManualClock,
) -> None:
    epoch = await database.take_epoch()
    async with housekeeping(database, jobs, clock) as house:
        assert await house.work["create-wa-events-partitions"](epoch) == "made 0"
        clock.now += timedelta(days=15)
        assert await house.work["create-wa-events-partitions"](epoch) == "made 4"


# The retrier's switch

_OPEN = """
INSERT INTO webhook_dlq (service, payload, error_message, status, resolution, next_retry_at, created_at,
                         updated_at, seq, received_at, session_key, attempts, correlation_id,
                         retry_requested_at)
SELECT 'rides', '{}', 'x', 'pending', l.resolution, $1::timestamptz, $1, $1, l.seq, $1, '1:' || l.seq, 1, 'c',
       CASE WHEN l.asked THEN $1 END
  FROM (VALUES (1, NULL, false), (2, 'deferred', false), (3, NULL, true)) AS l (seq, resolution, asked)
"""


@asynccontextmanager
async def retrier(database: Database, clock: ManualClock) -> AsyncIterator[Retrying]:
    async with database.journal(clock=clock) as journal:
        yield Retrying(journal, await database.take_epoch())


class Retrying:
    """What the retrier asks of the journal."""

    def __init__(self, journal: PostgresJournal, epoch: int) -> None:
        self._journal = journal
        self._epoch = epoch

    async def claim(self) -> list[int]:
        return [item.seq for item in await self._journal.claim_dead_letters(self._epoch, 10, ["rides"])]

    async def end(self) -> dict[str, float]:
        return dict(
            await self._journal.log_retry_run(
                self._epoch, took=0.0, processed=0, failed=0, error=None, services=["rides"]
            )
        )


async def test_switched_off_only_what_was_asked_for_or_has_not_failed_goes(
    database: Database, clock: ManualClock
) -> None:
    await database.fetch(_OPEN, NOW)
    await database.fetch("UPDATE cron.job SET active = false WHERE jobname = 'dlq-processor'")
    async with retrier(database, clock) as retrying:
        assert await retrying.end() == {"rides": 0.0}
        assert await retrying.claim() == [2, 3]
        assert await retrying.end() == {}  # nothing that would go by itself
        await database.fetch("UPDATE cron.job SET active = true WHERE jobname = 'dlq-processor'")
        assert await retrying.end() == {"rides": 0.0}
        assert await retrying.claim() == [1]


async def test_switched_off_a_run_that_was_asked_for_takes_all_that_is_due(
    database: Database, clock: ManualClock
) -> None:
    await database.fetch(_OPEN, NOW)
    await database.fetch("UPDATE cron.job SET active = false WHERE jobname = 'process-dlq-entries'")
    async with retrier(database, clock) as retrying:
        await database.fetch("SELECT postroom_request_job($1, 'me', 'dlq-processor')", NOW)
        clock.now += timedelta(seconds=1)
        assert await retrying.claim() == [1, 2, 3]
        await retrying.end()
        await database.fetch("UPDATE webhook_dlq SET status = 'pending', retry_requested_at = NULL")
        assert await retrying.claim() == [2]  # the request was for one run


# What operators ask today, with statements of our own that read the same columns

OPERATORS = (
    "SELECT status, avg(retry_count) FROM webhook_dlq GROUP BY status",
    "SELECT jobid, schedule, command, nodename, nodeport, database, username, active, jobname, last_run "
    "FROM cron.job WHERE jobname IN ('process-dlq-entries', 'session-cleanup')",
    "SELECT jobid, runid, job_pid, database, username, command, status, return_message, start_time, "
    "end_time, jobname FROM cron.job_run_details ORDER BY start_time DESC LIMIT 10",
    "SELECT processed_at, status FROM dlq_processing_log ORDER BY processed_at DESC LIMIT 5",
    "SELECT count(*) FROM wa_dead_letter_queue WHERE processed = false",
    "SELECT count(*) FROM user_sessions WHERE active_service IS NOT NULL AND last_interaction < now()",
    "SELECT relname, reloptions FROM pg_class WHERE relname LIKE 'wa_events%'",
    "SELECT create_wa_events_partition()",
    "SELECT round(100.0 * sum(CASE WHEN processed THEN 1 ELSE 0 END) / count(*), 2) "
    "FROM processed_webhook_messages WHERE created_at > now() - interval '1 hour' HAVING count(*) > 0",
    "SELECT error_message, count(*) FROM webhook_dlq GROUP BY error_message",
    "SELECT tablename, pg_total_relation_size('public.' || tablename) FROM pg_tables "
    "WHERE schemaname = 'public'",
    "UPDATE cron.job SET active = false WHERE jobname IN ('process-dlq-entries', 'session-cleanup')",
)


async def test_what_operators_ask_is_answered(
    jobs: PostgresJobs, database: Database, clock: ManualClock
) -> None:
    async with retrier(database, clock) as retrying:
        await retrying.end()
    epoch = await database.take_epoch()
    await jobs.end(epoch, await jobs.begin(epoch, "session-cleanup"), failed=False, message="x")
    for statement in OPERATORS:
        await database.fetch(statement)
    runs = await database.fetch("SELECT jobname, status, runid FROM cron.job_run_details")
    assert {(row["jobname"], row["status"]) for row in runs} == {
        ("process-dlq-entries", "succeeded"),
        ("dlq-processor", "succeeded"),
        ("session-cleanup", "succeeded"),
    }
    active = {name for name, on in (await switched(database)).items() if on}
    assert active == {
        "create-wa-events-partitions",
        "archive-partitions",
        "dlq-report",
        "rls-audit",
        "attach-audit",
    }
