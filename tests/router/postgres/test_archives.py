"""Archives on a real Postgres: rows are in exactly one place at every step, and come back as they were."""

# ruff: noqa: ASYNC110 - tables send no events, so they are asked again

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import archiving_process
import pytest
import trio
from contracts.journal_contract import body, done, message
from journal_kit import appended, assert_conserved, raw
from postgres_kit import Database, ManualClock, database, database_dsn, server

from actors.errors import LeaseLost
from actors.messages import DeadLetter, Item, Place
from router.archive.columns import Digest
from router.archive.files import ArchiveError, ArchiveFiles
from router.archiving import Archiver
from router.postgres.archives import Archive, ArchiveConflict, PostgresArchives
from router.postgres.journal import PostgresJournal

__all__ = ["database", "database_dsn", "server"]

pytestmark = pytest.mark.postgres

MONDAY = datetime(2026, 3, 2, tzinfo=UTC)  # week 10
WEEK_END = MONDAY + timedelta(days=7)
LATER = MONDAY + timedelta(days=60)
TABLES = {
    "whatsapp_messages_items": "whatsapp_messages_y2026w10",
    "message_outcomes": "message_outcomes_y2026w10",
}
REPLY = {"type": "text", "text": {"body": "on its way"}}


class Interrupted(Exception):
    """At a step, as a process that is killed there; what it leaves is in the database and in the files."""


class World:
    """A journal with one week in it, and archives in a directory."""

    def __init__(self, database: Database, home: Path) -> None:
        self.database = database
        self.clock = ManualClock(2026, 3, 4)
        self.files = ArchiveFiles(str(home / "archive"))
        self.epoch = 0
        self.steps: list[str] = []
        self.stop_before: str | int | None = None
        self.journal: PostgresJournal
        self.archives: PostgresArchives

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[World]:
        self.archives = PostgresArchives(self.database.bridge, lambda: self.database.dsn, clock=self.clock)
        async with self.database.journal(clock=self.clock) as self.journal:
            self.epoch = await self.database.take_epoch()
            try:
                yield self
            finally:
                with trio.CancelScope(shield=True):
                    await self.archives.close()

    def step(self, name: str) -> None:
        if self.stop_before in (name, len(self.steps)):
            raise Interrupted(name)
        self.steps.append(name)

    async def archive(self, *, before: datetime = LATER, epoch: int | None = None) -> list[str]:
        """One run of the job."""
        self.steps = []
        archiver = Archiver(self.archives, self.files, on_step=self.step)
        return await archiver.archive_all(self.epoch if epoch is None else epoch, before)

    async def message(self, name: str, sender: str = "250788000001", **changes: Any) -> Item:
        """One that was delivered and answered."""
        result = await appended(self.journal, body(message(name, sender)))
        [item] = await self.journal.read([result.first_seq])
        await self.complete(item, **changes)
        return item

    async def complete(self, item: Item, **changes: Any) -> None:
        completion = replace(done(item), **{"replies": (REPLY,), **changes})
        await self.journal.complete([completion], epoch=self.epoch, low_water=1, stragglers=[])

    async def failed(self, name: str, **changes: Any) -> Item:
        letter = DeadLetter(status="failed", resolution="exhausted", error="down", retry_in=None)
        return await self.message(name, place=Place.DEAD_LETTER, dead_letter=letter, replies=(), **changes)

    async def week(self) -> None:
        """A week of everything that ends, and one message of the week after."""
        for n in range(5):
            await self.message(f"m{n}", f"25078800000{n}")
        await appended(self.journal, body({"from": "1", "type": "text"}), raw(b"no JSON"))
        await self.failed("lost")
        self.clock.now += timedelta(days=7)
        await self.message("after")

    async def rows(self, statement: str) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await self.database.fetch(statement)]

    async def where(self) -> tuple[bool, bool]:
        """Whether the week is in the database, and whether an archive is the only place."""
        there = [
            await self.database.value(
                "SELECT coalesce(to_regclass($1), to_regclass($1 || '_out')) IS NOT NULL", table
            )
            for table in TABLES.values()
        ]
        assert len(set(there)) == 1
        archived = await self.database.value(
            "SELECT count(*) FROM postroom_archives WHERE name = $1 AND state = 'archived'",
            TABLES["whatsapp_messages_items"],
        )
        if archived:
            for table, told in self.files.tables(TABLES["whatsapp_messages_items"]).items():
                for _ in self.files.rows(TABLES["whatsapp_messages_items"], table, told):
                    pass
        return there[0], bool(archived)


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    async with World(database, tmp_path).opened() as world:
        yield world


async def digest(world: World, statement: str) -> tuple[int, str]:
    found = Digest()
    found.add(await world.rows(statement))
    return found.rows, found.hex()


async def test_a_week_goes_into_an_archive_as_it_was(world: World) -> None:
    await world.week()
    before = {
        "items": await digest(world, "SELECT * FROM whatsapp_messages_y2026w10 ORDER BY seq"),
        "outcomes": await digest(world, "SELECT * FROM message_outcomes_y2026w10 ORDER BY seq"),
        "bodies": await digest(
            world, "SELECT * FROM wa_events WHERE received_at < '2026-03-09' ORDER BY event_id"
        ),
        "replies": await digest(
            world, "SELECT * FROM whatsapp_outbox WHERE created_at < '2026-03-09' ORDER BY id"
        ),
    }
    assert before["items"][0] == 8
    assert before["replies"][0] == 5
    name = "whatsapp_messages_y2026w10"
    assert await world.archive(before=WEEK_END) == [name]
    assert await world.where() == (False, True)
    assert world.files.names() == [name]
    written = world.files.tables(name)
    assert {table: (one.rows, one.digest) for table, one in written.items() if table != "subjects"} == before
    assert await world.database.value("SELECT count(*) FROM whatsapp_messages_items") == 1
    assert await world.database.value("SELECT count(*) FROM whatsapp_outbox") == 1
    await assert_conserved(world.database)
    assert await world.archive(before=WEEK_END) == []
    await world.journal.make_partitions()
    assert await world.where() == (False, True)


async def test_a_month_goes_after_its_weeks(world: World) -> None:
    await world.week()
    world.clock.now = LATER
    await world.journal.make_partitions()
    assert await world.archive(before=datetime(2026, 4, 2, tzinfo=UTC)) == [
        *(f"whatsapp_messages_y2026w{week}" for week in ("10", "11", "12", "13")),
    ]
    assert await world.archive(before=datetime(2026, 4, 6, tzinfo=UTC)) == [
        "whatsapp_messages_y2026w14", "wa_events_y2026m03",
    ]  # fmt: skip
    [events] = [one for name, one in world.files.tables("wa_events_y2026m03").items() if name == "events"]
    assert events.rows == 9
    await assert_conserved(world.database)
    assert await world.database.value("SELECT count(*) FROM wa_events") == 0


async def test_what_is_under_way_stays(world: World) -> None:
    result = await appended(world.journal, body(message("open")))
    assert await world.archive(before=WEEK_END) == []
    [item] = await world.journal.read([result.first_seq])
    letter = DeadLetter(status="pending", resolution=None, error="down", retry_in=0.0)
    await world.complete(item, place=Place.DEAD_LETTER, dead_letter=letter, replies=())
    assert await world.archive(before=WEEK_END) == []
    assert await world.archives.held(WEEK_END) == 1
    [replay] = await world.journal.claim_dead_letters(world.epoch, 10, ["rides"])
    assert await world.archive(before=WEEK_END) == []
    await world.complete(replay, replies=())
    await world.message("answered")
    await world.database.fetch("UPDATE whatsapp_outbox SET status = 'pending'")
    assert await world.archive(before=WEEK_END) == []
    await world.database.fetch("UPDATE whatsapp_outbox SET status = 'sent'")
    assert await world.archive(before=WEEK_END) == ["whatsapp_messages_y2026w10"]
    await assert_conserved(world.database)


STEPS = (
    "detach", 1, "begin writing", "write", "write items", "write outcomes", "write replies", "write bodies",
    "write manifest", "say written", "drop", "end",
)  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
async def test_interrupted_at_any_step_rows_are_in_one_place_and_the_next_run_goes_on(
    world: World, step: str | int
) -> None:
    await world.week()
    world.stop_before = step
    with pytest.raises(Interrupted):
        await world.archive()
    there, archived = await world.where()
    assert there != archived
    await assert_conserved(world.database)
    world.stop_before = None
    assert "whatsapp_messages_y2026w10" in [
        *await world.archive(),
        *(["whatsapp_messages_y2026w10"] if archived else []),
    ]
    assert await world.where() == (False, True)
    await assert_conserved(world.database)


@pytest.mark.parametrize("step", STEPS)
async def test_killed_at_any_step_rows_are_in_one_place_and_the_next_run_goes_on(
    world: World, step: str | int
) -> None:
    await world.week()
    killed = await trio.run_process(
        [
            *(sys.executable, str(Path(archiving_process.__file__)), world.database.dsn),
            *(world.files.location, f"{world.epoch}", f"{step}", LATER.isoformat()),
        ],
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    there, archived = await world.where()
    assert there != archived
    await assert_conserved(world.database)
    await world.archive()
    assert await world.where() == (False, True)
    await assert_conserved(world.database)


@pytest.mark.parametrize("step", STEPS)
async def test_a_replay_meanwhile_is_counted(world: World, step: str | int) -> None:
    await world.week()
    world.stop_before = step
    with pytest.raises(Interrupted):
        await world.archive()
    [letter] = await world.database.fetch("SELECT id FROM webhook_dlq")
    await world.database.fetch(
        "SELECT postroom_retry_dead_letters($1, 'me', $2)", world.clock.now, [letter["id"]]
    )
    [replay] = await world.journal.claim_dead_letters(world.epoch, 10, ["rides"])
    await world.complete(replay, replies=())
    await assert_conserved(world.database)
    with suppress(Interrupted):
        world.stop_before = "begin writing"
        await world.archive()
    await assert_conserved(world.database)
    assert set(await rls_findings(world)) == set()
    world.stop_before = None
    await world.archive()
    assert await world.where() == (False, True)
    await assert_conserved(world.database)
    assert await world.database.value("SELECT dead_letter + delivered FROM delivery_tallies") == 7


async def test_a_dead_letter_takes_its_key_along(world: World) -> None:
    item = await world.failed("lost")
    await world.archive()
    assert await world.where() == (False, True)
    await assert_conserved(world.database)
    [letter] = await world.database.fetch("SELECT id FROM webhook_dlq")
    ask = "SELECT postroom_retry_dead_letters($1, 'me', $2)"
    assert await world.database.value(ask, world.clock.now, [letter["id"]]) == 1
    [replay] = await world.journal.claim_dead_letters(world.epoch, 10, ["rides"])
    assert (replay.key, replay.message, replay.phone_number_id) == (
        item.key,
        item.message,
        item.phone_number_id,
    )
    await world.complete(replay, replies=())
    await assert_conserved(world.database)
    assert await world.database.value("SELECT delivered FROM delivery_tallies") == 1
    assert (
        await world.database.value(
            "SELECT (tallies ->> 'outcomes_delivered')::int FROM postroom_archives WHERE kind = 'messages' "
            "AND name = 'whatsapp_messages_y2026w10'"
        )
        == 1
    )


async def test_discarded_later_it_is_counted_so(world: World) -> None:
    await world.failed("lost")
    await world.archive()
    ids = [row["id"] for row in await world.database.fetch("SELECT id FROM webhook_dlq")]
    gone = await world.database.value(
        "SELECT postroom_discard_dead_letters($1, 'me', $2, 'old')", world.clock.now, ids
    )
    assert gone == 1
    await assert_conserved(world.database)


async def test_late_writes_of_an_epoch_that_is_over_are_refused(world: World) -> None:
    await world.week()
    world.stop_before = "drop"
    with pytest.raises(Interrupted):
        await world.archive()
    old, world.epoch = world.epoch, await world.database.take_epoch()
    world.stop_before = None
    with pytest.raises(LeaseLost):
        await world.archive(epoch=old)
    archive = "whatsapp_messages_y2026w10"
    begun = Archive(archive, "messages", (), MONDAY, WEEK_END, "writing", None)
    for late in (
        lambda: world.archives.next(old, LATER),
        lambda: world.archives.detach(old, archive),
        lambda: world.archives.begin_writing(old, begun),
        lambda: world.archives.written(old, archive, "x", {}),
        lambda: world.archives.drop(old, archive),
    ):
        with pytest.raises(LeaseLost):
            await late()
    assert await world.where() == (True, False)
    await world.archive()
    assert await world.where() == (False, True)


async def test_a_file_that_is_not_what_was_written_takes_no_row(world: World) -> None:
    await world.week()

    class Rotten(ArchiveFiles):
        def _sync(self, path: str) -> None:
            if "/outcomes-" in path:
                place = Path(path)
                place.write_bytes(place.read_bytes()[:-100] + b"\0" * 100)

    whole, world.files = world.files, Rotten(world.files.location)
    with pytest.raises(ArchiveError, match="whatsapp_messages_y2026w10"):
        await world.archive()
    assert await world.where() == (True, False)
    assert whole.names() == []
    await assert_conserved(world.database)
    world.files = whole
    await world.archive()
    assert await world.where() == (False, True)


async def test_rows_that_are_not_as_many_as_were_written_stay(world: World) -> None:
    await world.week()
    world.stop_before = "drop"
    with pytest.raises(Interrupted):
        await world.archive()
    world.stop_before = None
    await world.database.fetch("DELETE FROM message_outcomes_y2026w10_out WHERE seq = 1")
    with pytest.raises(ArchiveConflict, match="message_outcomes_y2026w10_out has 5 rows, its archive 6"):
        await world.archive()
    assert await world.where() == (True, False)


async def test_who_writes_does_not_wait_for_a_partition_that_goes(world: World) -> None:
    """Somebody reads the old week for a long time."""
    await world.week()
    async with world.database.connection() as reader:
        transaction = reader.transaction(isolation="repeatable_read")
        await world.database.bridge.run(transaction.start)
        await world.database.bridge.run(lambda: reader.fetch("SELECT * FROM whatsapp_messages_items"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.archive)
            with trio.fail_after(20):
                while not await world.database.value(
                    "SELECT count(*) FROM pg_inherits WHERE inhdetachpending"
                ):
                    await trio.sleep(0.05)
            began = trio.current_time()
            await world.message("meanwhile")
            assert trio.current_time() - began < 5
            await assert_conserved(world.database)
            await world.database.bridge.run(transaction.rollback)
    assert await world.where() == (False, True)
    await assert_conserved(world.database)


async def rls_findings(world: World) -> list[str]:
    rows = await world.database.fetch("SELECT table_name FROM postroom_rls_audit()")
    return [row["table_name"] for row in rows]


async def test_a_week_that_is_made_again_does_not_hide_the_one_that_was_archived(world: World) -> None:
    """As after a clock that leapt back."""
    await world.week()
    await world.archive(before=WEEK_END)
    now, world.clock.now = world.clock.now, MONDAY + timedelta(days=1)
    await world.message("again")
    await assert_conserved(world.database)
    world.clock.now = now
    assert await world.archive(before=WEEK_END) == ["whatsapp_messages_y2026w10.2"]
    assert world.files.names() == ["whatsapp_messages_y2026w10", "whatsapp_messages_y2026w10.2"]
    await assert_conserved(world.database)


async def test_a_flush_of_that_week_finds_a_home_while_it_is_written(world: World) -> None:
    await world.week()
    world.stop_before = "write items"
    with pytest.raises(Interrupted):
        await world.archive(before=WEEK_END)
    now, world.clock.now = world.clock.now, MONDAY + timedelta(days=1)
    await world.message("leapt")
    world.clock.now, world.stop_before = now, None
    await assert_conserved(world.database)
    # Its reply belongs to the week that is being written, too.
    assert await world.archive(before=WEEK_END) == [
        "whatsapp_messages_y2026w10", "whatsapp_messages_y2026w10.2",
    ]  # fmt: skip
    await assert_conserved(world.database)


async def test_replies_that_come_after_they_were_written_are_written_again(world: World) -> None:
    await world.week()
    world.stop_before = "drop"
    with pytest.raises(Interrupted):
        await world.archive(before=WEEK_END)
    now, world.clock.now = world.clock.now, MONDAY + timedelta(days=1)
    await world.message("leapt")
    world.clock.now, world.stop_before = now, None
    with pytest.raises(ArchiveConflict, match="whatsapp_outbox has 6 rows, its archive 5"):
        await world.archive(before=WEEK_END)
    assert await world.archive(before=WEEK_END) == [
        "whatsapp_messages_y2026w10", "whatsapp_messages_y2026w10.2",
    ]  # fmt: skip
    assert world.files.tables("whatsapp_messages_y2026w10")["replies"].rows == 6
    await assert_conserved(world.database)


async def test_a_discard_that_commits_meanwhile_is_seen(world: World) -> None:
    await world.week()
    ids = [row["id"] for row in await world.database.fetch("SELECT id FROM webhook_dlq")]
    async with world.database.connection() as operator:
        transaction = operator.transaction()
        await world.database.bridge.run(transaction.start)
        await world.database.bridge.run(
            lambda: operator.execute(
                "SELECT postroom_discard_dead_letters($1, 'me', $2, 'old')", world.clock.now, ids
            )
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.archive)
            with trio.fail_after(20):
                while not await world.database.value("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                    await trio.sleep(0.02)
            await world.database.bridge.run(transaction.commit)
    assert await world.where() == (False, True)
    assert await world.database.value("SELECT item_outcome FROM webhook_dlq") == "discarded"
    await assert_conserved(world.database)
