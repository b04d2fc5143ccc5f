"""What a router leaves behind that runs for more than a year, by injected time: each job on its schedule."""

from __future__ import annotations

from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from contracts.journal_contract import body, done, message
from journal_kit import appended, assert_conserved
from postgres_kit import Database, ManualClock, database_dsn, server

from actors.messages import DeadLetter, Place, Reply
from router.archive.columns import Digest
from router.archive.files import ArchiveFiles
from router.housekeeping import Housekeeping
from router.postgres.archives import PostgresArchives
from router.postgres.bridge import open_bridge
from router.postgres.jobs import PostgresJobs
from router.schedule import next_time

__all__ = ["database_dsn", "server"]

pytestmark = pytest.mark.postgres

REPLY = Reply(text="on its way").as_message()


class Years:
    """A day is: messages, and then every job that became due since the day before."""

    def __init__(self, database: Database, home: Path, a_day: int) -> None:
        self.database = database
        self.home = home
        self.a_day = a_day
        self.clock = ManualClock(2026, 11, 26)  # over two ends of a year, one of them in week 53
        self.homeless: list[datetime] = []
        self.runs: dict[str, int] = {}
        self.digests: dict[str, tuple[int, str]] = {}
        self.sent = 0

    async def open(self, stack: AsyncExitStack) -> None:
        self.journal = await stack.enter_async_context(
            self.database.journal(clock=self.clock, on_homeless=self.homeless.append)
        )
        self.jobs = PostgresJobs(self.database.bridge, lambda: self.database.dsn, clock=self.clock)
        stack.push_async_callback(self.jobs.close)
        archives = PostgresArchives(self.database.bridge, lambda: self.database.dsn, clock=self.clock)
        stack.push_async_callback(archives.close)
        self.files = ArchiveFiles(str(self.home / "archive"))
        self.house = Housekeeping(
            self.jobs,
            self.journal,
            archives,
            self.files.location,
            session_ttl=timedelta(hours=24),
            clock=self.clock,
        )
        self.epoch = await self.database.take_epoch()

    async def day(self) -> None:
        await self.messages()
        self.clock.now += timedelta(days=1)
        for job in await self.jobs.jobs(self.epoch):
            work = self.house.work.get(job.name)
            if work is not None and next_time(job.schedule, job.followed_to) <= self.clock.now:
                run = await self.jobs.begin(self.epoch, job.name)
                await self.jobs.end(self.epoch, run, failed=False, message=await work(self.epoch))
                self.runs[job.name] = self.runs.get(job.name, 0) + 1
        await self.journal.rotate_ledger()
        await self.partitions_are_ahead()

    async def messages(self) -> None:
        """Of as many persons as messages; one of them is a dead letter that is retried at once."""
        texts = [
            message(f"{self.sent + n}", f"2507880{n:05}") | {"text": {"body": "x" * 200}}
            for n in range(self.a_day)
        ]
        self.sent += self.a_day
        result = await appended(self.journal, *(body(text) for text in texts))
        items = await self.journal.read(range(result.first_seq, result.first_seq + self.a_day))
        letter = DeadLetter(status="pending", resolution=None, error="down", retry_in=0.0)
        ends = [done(items[0], place=Place.DEAD_LETTER, dead_letter=letter)]
        ends += [done(item, replies=1) for item in items[1:]]
        mark = result.first_seq + self.a_day
        await self.journal.complete(ends, epoch=self.epoch, low_water=mark, stragglers=[])
        [replay] = await self.journal.claim_dead_letters(self.epoch, 10, ["rides"])
        await self.journal.complete([done(replay)], epoch=self.epoch, low_water=mark, stragglers=[])
        await self.journal.log_retry_run(
            self.epoch, took=0.1, processed=1, failed=0, error=None, services=["rides"]
        )

    async def partitions_are_ahead(self) -> None:
        """At least two, before they are needed."""
        for parent, ahead in (
            ("wa_events", timedelta(days=62)),
            ("whatsapp_messages_items", timedelta(days=14)),
            ("message_outcomes", timedelta(days=14)),
        ):
            covered = await self.database.value(
                "SELECT bool_and(p.from_at IS NOT NULL) FROM unnest($2::timestamptz[]) AS m (moment) "
                "LEFT JOIN postroom_partitions($1) p ON p.from_at <= m.moment AND p.until_at > m.moment",
                parent,
                [self.clock.now, self.clock.now + ahead / 2, self.clock.now + ahead],
            )
            assert covered, (parent, self.clock.now)

    async def remember(self) -> None:
        """The digests of the weeks that are there."""
        for row in await self.database.fetch(
            "SELECT name FROM postroom_partitions('whatsapp_messages_items')"
        ):
            found = Digest()
            rows = await self.database.fetch(f'SELECT * FROM "{row["name"]}" ORDER BY seq')
            found.add(tuple(one) for one in rows)
            self.digests[row["name"]] = (found.rows, found.hex())

    async def size(self) -> int:
        """Of everything but what is kept for good: the audit log."""
        await self.database.fetch("VACUUM")
        size: int = await self.database.value(
            "SELECT pg_database_size(current_database()) - pg_total_relation_size('audit_log')"
        )
        return size


async def live(dsn: str, home: Path, days: int, a_day: int) -> dict[str, Any]:
    async with open_bridge() as bridge, AsyncExitStack() as stack:
        database = Database(bridge, dsn)
        years = Years(database, home, a_day)
        await years.open(stack)
        sizes = {}
        for day in range(1, days + 1):
            await years.day()
            if day % 5 == 0:
                await years.remember()
                # What autovacuum does in five days; here they last a second, and it comes once a minute.
                await database.fetch("VACUUM")
            if day in (60, days):
                sizes[day] = await years.size()
                await assert_conserved(database)
        assert years.homeless == []
        # Schedules are followed from the end of the first day on.
        assert years.runs["session-cleanup"] == years.runs["archive-partitions"] == days - 1
        before = years.clock.now - timedelta(days=30)
        late = await database.fetch(
            "SELECT name FROM postroom_partitions('whatsapp_messages_items') WHERE until_at <= $1", before
        )
        assert late == []
        states = await database.fetch("SELECT name, kind, state FROM postroom_archives ORDER BY from_at")
        assert {row["state"] for row in states} == {"archived"}
        weeks = [row["name"] for row in states if row["kind"] == "messages"]
        for name in weeks:
            told = years.files.tables(name)["items"]
            assert (told.rows, told.digest) == years.digests[name]
        assert len(weeks) == len(set(weeks)) >= (days - 37) // 7
        counted = sum(years.files.tables(name)["items"].rows for name in weeks)
        left = await database.value("SELECT count(*) FROM whatsapp_messages_items")
        assert counted + left == years.sent
        return {"sizes": sizes, "weeks": weeks, "months": len(states) - len(weeks)}


def test_seventy_days(database_dsn: str, tmp_path: Path) -> None:
    told = trio.run(live, database_dsn, tmp_path, 70, 20)
    assert len(told["weeks"]) >= 4


@pytest.mark.acceptance
def test_four_hundred_days(database_dsn: str, tmp_path: Path) -> None:
    told = trio.run(live, database_dsn, tmp_path, 400, 200)
    assert told["months"] >= 11
    sizes = told["sizes"]
    assert sizes[400] <= 1.1 * sizes[60], sizes
