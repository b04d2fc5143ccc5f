"""Erasure on a real Postgres: one person out of tables, spool and archives; others are as they were, and all
is counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
from contracts.journal_contract import NUMBER, done
from journal_kit import appended, assert_conserved, raw
from occurrences import in_archives, in_files, occurrences
from postgres_kit import Database, ManualClock, database, database_dsn, server

from actors.messages import Bucket, DeadLetter, Delivery, Duplicates, Item, Place, Session
from router.archive.files import ArchiveFiles
from router.archiving import Archiver
from router.channels.tombstones import Tombstones
from router.channels.whatsapp import Splitter
from router.config import Config
from router.erasing import CannotErase, Eraser, Erasure
from router.operations import Operations
from router.postgres.archives import PostgresArchives
from router.postgres.connections import OWNER, connect
from router.postgres.journal import PostgresJournal
from router.retrieval import restore
from router.simulator import payloads
from router.simulator.payloads import Head, Json
from router.spool.directory import SpoolDirectory

__all__ = ["database", "database_dsn", "server"]

pytestmark = pytest.mark.postgres

PERSON, USER_ID, OTHER = "250788111222", "RW.13491208655302741918", "250788333444"
NAME, SAYS, ANSWER, STATE = "Grace Uwase", "the PIN is 4711", "your wallet has 99 francs", "Kimironko"
PERSONAL = (PERSON, USER_ID, NAME, SAYS, ANSWER, STATE)
WEEK = timedelta(days=7)
STEPS = ("bury", "empty spool", "erase items", "write archive", "count archive", "replace archive", "forget")


class World:
    """A journal, archives and a spool, with a person and others in them."""

    def __init__(self, database: Database, home: Path) -> None:
        self.database = database
        self.home = home
        self.clock = ManualClock(2026, 3, 4)
        self.files = ArchiveFiles(str(home / "archive"))
        self.tombstones = Tombstones()
        self.rng = Random(5)
        self.config = Config.for_embedding(
            app_secret="s", verify_token="v", data_dir=home, database_url=database.dsn
        )
        self.stop_before: str | None = None
        self.epoch = 0
        self.journal: PostgresJournal
        self.archives: PostgresArchives
        self.splitter: Splitter

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[World]:
        self.archives = PostgresArchives(self.database.bridge, lambda: self.database.dsn, clock=self.clock)
        async with self.database.journal(clock=self.clock) as self.journal:
            self.epoch = await self.database.take_epoch()
            self.splitter = Splitter(
                "default",
                dedup_key=await self.journal.dedup_key(),
                is_ours=lambda number: True,
                tombstones=self.tombstones,
            )
            try:
                yield self
            finally:
                with trio.CancelScope(shield=True):
                    await self.archives.close()

    # What comes

    def head(self, sender: str | None, **more: Any) -> Head:
        name = sender or PERSON
        return Head(payloads.wamid(name, self.rng), sender, int(self.clock.now.timestamp()), **more)

    def body(self, *messages: Json, statuses: Any = (), contacts: Any = None) -> Delivery:
        known = [
            payloads.contact({PERSON: NAME}.get(who, "Ada"), who)
            for one in messages
            if (who := one.get("from"))
        ]
        change = payloads.change(
            NUMBER,
            "1555",
            messages=messages,
            contacts=known if contacts is None else contacts,
            statuses=statuses,
        )
        return self.split(payloads.body(payloads.entry("1", change)))

    def split(self, body: bytes) -> Delivery:
        return self.splitter.delivery(
            body, correlation_id="c-1", traceparent=None, settle=lambda stored: None
        )

    async def said(self, sender: str | None, text: str, **head: Any) -> Item:
        """A message that was journaled."""
        said = payloads.text_message(self.head(sender, **head), text)
        result = await appended(self.journal, self.body(said))
        [item] = await self.journal.read([result.first_seq])
        return item

    async def completed(self, item: Item, *answers: str, state: str | None = None, **changes: Any) -> None:
        session = None
        if state is not None:
            session = Session(
                key=item.session_key,
                phone_number_id=NUMBER,
                wa_id=item.wa_id,
                user_id=item.user_id,
                active_service="rides",
                state={"from": state},
                version=item.seq,
            )
        replies = tuple({"type": "text", "text": {"body": answer}} for answer in answers)
        completion = replace(done(item, session), **{"replies": replies, **changes})
        await self.journal.complete([completion], epoch=self.epoch, low_water=1, stragglers=[])

    async def letter(self, item: Item, status: str = "failed", place: Place = Place.DEAD_LETTER) -> None:
        resolution = {"failed": "exhausted", "pending": None}[status]
        retry_in = 0.0 if status == "pending" else None
        letter = DeadLetter(status=status, resolution=resolution, error=f"no {PERSON}", retry_in=retry_in)
        await self.completed(item, place=place, dead_letter=letter)

    async def week(self) -> None:
        """Everything that a person leaves behind in a week, beside somebody else's."""
        await self.completed(await self.said(PERSON, SAYS), ANSWER, state=STATE)
        await self.completed(await self.said(PERSON, SAYS, user_id=USER_ID), ANSWER)
        await self.completed(await self.said(None, SAYS, user_id=USER_ID), ANSWER, place=Place.HANDLED)
        await self.letter(await self.said(PERSON, SAYS))
        await self.letter(await self.said(PERSON, SAYS), "pending")
        await self.completed(await self.said(PERSON, SAYS, group_id="family"), ANSWER, state="of the group")
        sent = {
            "id": payloads.wamid(PERSON, self.rng, outbound=True),
            "status": "read",
            "recipient_id": PERSON,
        }
        await appended(self.journal, self.body(statuses=[{**sent, "timestamp": "1"}], contacts=[]))
        nobody = payloads.text_message(self.head(None), SAYS)
        await appended(self.journal, self.body(nobody), raw(f"no JSON of {PERSON}".encode()))
        await self.completed(await self.said(OTHER, "hello"), "hello to you", state="Remera")
        await self.letter(await self.said(OTHER, "hello again"))
        await self.completed(
            await self.said(OTHER, f"my sister has {PERSON}"), f"I wrote {PERSON} down", state=PERSON
        )

    async def archive(self) -> list[str]:
        archiver = Archiver(self.archives, self.files)
        return await archiver.archive_all(self.epoch, self.clock.now - timedelta(days=14))

    # What goes

    def on_step(self, step: str) -> None:
        if self.stop_before == step:
            raise Interrupted(step)

    async def erase(self, name: str = PERSON, *, within: float = 0.0, dry_run: bool = False) -> Erasure:
        bridge, dsn = self.database.bridge, self.database.dsn
        connection = await bridge.run(lambda: connect(dsn, name="operator", role=OWNER))
        try:
            operations = Operations(self.config, bridge, lambda: dsn, connection)
            eraser = Eraser(operations, actor="test", within=within, clock=self.clock, on_step=self.on_step)
            return await (eraser.look(name) if dry_run else eraser.erase(name))
        finally:
            with trio.CancelScope(shield=True):
                await bridge.run(connection.close)
                self.tombstones.load(*await self.journal.erasures())

    async def dump(self) -> bytes:
        """Every row of every table, as text."""
        tables = await self.database.fetch(
            "SELECT c.oid::regclass::text AS name FROM pg_class c "
            "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'r' "
            "AND n.nspname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1"
        )
        rows = [
            row[0]
            for table in tables
            for row in await self.database.fetch(f"SELECT t::text FROM {table['name']} t ORDER BY t::text")
        ]
        return "\n".join(rows).encode()

    async def left(self) -> set[str]:
        """What of the person is anywhere."""
        found = occurrences(await self.dump(), PERSONAL) | in_files(self.home / "spool", PERSONAL)
        return found | in_archives(self.home / "archive", PERSONAL)


class Interrupted(Exception):
    """At a step, as a process that is killed there."""


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    async with World(database, tmp_path).opened() as world:
        yield world


OTHERS = f"""
    SELECT i.seq, i.bucket, i.reason, i.message_id, i.session_key, o.outcome, o.service
      FROM whatsapp_messages_items i LEFT JOIN message_outcomes o USING (seq, received_at)
     WHERE i.session_key = '{NUMBER}:{OTHER}' ORDER BY i.seq
"""


async def test_the_person_is_gone_from_the_tables_and_others_are_as_they_were(world: World) -> None:
    await world.week()
    others = [tuple(row) for row in await world.database.fetch(OTHERS)]
    assert await world.left() == set(PERSONAL)
    looked = await world.erase(dry_run=True)
    assert await world.left() == set(PERSONAL)
    told = await world.erase()
    assert await world.left() == set()
    assert told == looked
    assert (told.names, told.items, told.letters, told.sessions) == (2, 9, 2, 1)
    assert [tuple(row) for row in await world.database.fetch(OTHERS)] == others
    assert (
        await world.database.value("SELECT count(*) FROM whatsapp_messages_items WHERE bucket = 'erased'")
        == 9
    )
    await assert_conserved(world.database)
    [text] = await world.database.fetch(
        "SELECT payload #>> '{text,body}' AS body FROM whatsapp_messages WHERE payload::text LIKE '%sister%' "
        "AND direction = 'inbound'"
    )
    assert text["body"] == "my sister has [erased]"
    [logged] = await world.database.fetch("SELECT * FROM audit_log WHERE action = 'erase'")
    assert json.loads(logged["detail"])["items"] == 9
    again = await world.erase()
    assert again == Erasure(names=1)


async def test_any_name_will_do(world: World) -> None:
    await world.week()
    await world.erase(USER_ID)
    assert await world.left() == set()
    await assert_conserved(world.database)


async def test_one_who_is_not_known_is_still_kept_out(world: World) -> None:
    await world.completed(await world.said(OTHER, "hello"))
    assert await world.erase() == Erasure(names=1)
    assert world.tombstones.cover(PERSON, world.clock.now.timestamp() - 1)


async def test_a_redelivery_does_not_bring_anything_back(world: World) -> None:
    said = payloads.text_message(world.head(PERSON), SAYS)
    old = world.body(said)
    await appended(world.journal, old)
    [item] = await world.journal.read([1])
    await world.completed(item)
    world.clock.now += timedelta(minutes=1)
    await world.erase()
    again = world.split(old.body)
    assert [one.bucket for one in again.items] == [Bucket.ERASED]
    assert isinstance(await world.journal.append([again], duplicates=0), Duplicates)
    for ledger in ("dedup_ledger_0", "dedup_ledger_1"):  # as long after it: the ledger has forgotten
        await world.database.fetch(f"TRUNCATE {ledger}")
    assert not await world.left()
    await appended(world.journal, world.split(old.body))
    assert await world.left() == set()
    assert await world.database.value("SELECT erased FROM journal_head") == 2
    await assert_conserved(world.database)
    assert not (await world.journal.undelivered()).items
    world.clock.now += timedelta(seconds=1)
    back = await world.said(PERSON, "I am back")
    assert (back.session_key, back.message["text"]) == (f"{NUMBER}:{PERSON}", {"body": "I am back"})


async def test_what_is_under_way_is_waited_for(world: World) -> None:
    item = await world.said(PERSON, SAYS)
    with pytest.raises(CannotErase, match=r"1 message\(s\) of the person are under way"):
        await world.erase()
    async with trio.open_nursery() as nursery:

        async def finish() -> None:
            await trio.sleep(0.3)
            await world.completed(item, ANSWER, state=STATE)

        nursery.start_soon(finish)
        assert (await world.erase(within=20)).items == 1
    assert await world.left() == set()
    await assert_conserved(world.database)


async def test_a_letter_that_is_being_delivered_is_waited_for(world: World) -> None:
    await world.letter(await world.said(PERSON, SAYS), "pending")
    [claimed] = await world.journal.claim_dead_letters(world.epoch, 10, ["rides"])
    with pytest.raises(CannotErase, match="under way"):
        await world.erase()
    await world.completed(claimed)
    await world.erase()
    assert await world.left() == set()
    await assert_conserved(world.database)


async def archived(world: World) -> None:
    """Three weeks of which two are in archives, and a body of the spool."""
    for _ in range(3):
        await world.week()
        world.clock.now += WEEK
        await world.journal.make_partitions()
    for one in await world.journal.claim_dead_letters(world.epoch, 100, ["rides"]):
        await world.completed(one)
    assert len(await world.archive()) == 1
    world.clock.now += WEEK
    await world.letter(await world.said(PERSON, SAYS), "pending")
    # Of a week that is in an archive, which says that it failed: it is delivered now.
    await world.database.fetch(
        "SELECT postroom_retry_dead_letters($1, 'test', ARRAY(SELECT id FROM webhook_dlq "
        "WHERE phone_number = $2 AND status = 'failed' ORDER BY seq LIMIT 1))",
        world.clock.now,
        PERSON,
    )
    [late] = await world.journal.claim_dead_letters(world.epoch, 1, ["rides"])
    await world.completed(late)


async def spool(world: World) -> None:
    directory = SpoolDirectory(world.home / "spool", max_bytes=10**8, report=lambda event, details: None)
    await directory.open()
    await directory.append([world.body(payloads.text_message(world.head(PERSON), SAYS))])
    await directory.append([world.body(payloads.text_message(world.head(OTHER), "spooled"))])
    directory.close()
    for folder, text in (("damaged", SAYS + PERSON), ("refused", json.dumps({"from": PERSON, "is": SAYS}))):
        (world.home / "spool" / folder).mkdir()
        (world.home / "spool" / folder / "1").write_text(text)
    (world.home / "spool" / "refused" / "2").write_text(f'{{"from": "{OTHER}", "is": "\\u003cb\\u003e"}}')


async def test_archives_and_spool_are_cleaned_too_and_nothing_else_is_touched(world: World) -> None:
    await archived(world)
    await spool(world)
    world.clock.now += timedelta(seconds=1)
    assert await world.left() == set(PERSONAL)
    looked = await world.erase(dry_run=True)
    [name] = looked.archives
    before = {table: list(rows(world, name, table)) for table in world.files.tables(name)}
    told = await world.erase()
    assert await world.left() == set()
    assert replace(told, bodies=looked.bodies) == looked
    assert (told.spooled, told.set_aside) == (1, 2)
    assert OTHER in (world.home / "spool" / "refused" / "2").read_text()
    await assert_conserved(world.database)
    after = {table: list(rows(world, name, table)) for table in before}
    items = {row[0]: row for row in after["items"]}
    assert [items[row[0]] for row in before["items"] if row[8] == f"{NUMBER}:{OTHER}"] == [
        row for row in before["items"] if row[8] == f"{NUMBER}:{OTHER}"
    ]
    assert len(after["items"]) == len(before["items"])
    assert len(after["outcomes"]) == len([row for row in items.values() if row[10] is None])
    assert {row[0] for row in after["subjects"]} == {OTHER}
    assert sorted(path.name for path in (world.home / "archive" / name).iterdir()) == sorted(
        ["manifest.json", *(told.file for told in world.files.tables(name).values())]
    )
    spooled = await world.database.fetch(
        "SELECT place FROM whatsapp_messages WHERE payload #>> '{text,body}' = 'spooled'"
    )
    assert [row["place"] for row in spooled] == ["journaled"]


def rows(world: World, name: str, table: str) -> list[Any]:
    return [row for page in world.files.rows(name, table, world.files.tables(name)[table]) for row in page]


async def test_interrupted_at_any_step_it_is_done_again(world: World) -> None:
    await archived(world)
    await spool(world)
    world.clock.now += timedelta(seconds=1)
    for step in STEPS:
        world.stop_before = step
        with pytest.raises(Interrupted):
            await world.erase()
        assert step == "forget" or await world.left()
        await assert_conserved(world.database)
    world.stop_before = None
    await world.erase()
    assert await world.left() == set()
    await assert_conserved(world.database)


async def test_an_old_copy_of_an_archive_is_restored_without_the_person(world: World) -> None:
    await archived(world)
    shutil.copytree(world.home / "archive", world.home / "backup")
    await world.erase()
    copy = ArchiveFiles(str(world.home / "backup"))
    [name] = copy.names()
    whole = {table: told.rows for table, told in copy.tables(name).items()}
    bridge, dsn = world.database.bridge, world.database.dsn
    connection = await bridge.run(lambda: connect(dsn, name="operator", role=None))
    try:
        operations = Operations(world.config, bridge, lambda: dsn, connection)
        restored = await restore(operations, copy, name, "restored")
    finally:
        await bridge.run(connection.close)
    assert occurrences(await world.dump(), PERSONAL) == set()
    assert restored[f"restored.{name}"] == whole["items"]
    week = name.rpartition("_")[2]
    assert restored[f"restored.message_outcomes_{week}"] == whole["outcomes"] - 6
    assert (
        await world.database.value(f'SELECT count(*) FROM restored."{name}" WHERE bucket = $1', "erased") == 9
    )


async def test_an_old_copy_has_what_somebody_wrote_who_came_back(world: World) -> None:
    await world.erase(PERSON)
    world.clock.now += timedelta(hours=1)
    await world.completed(await world.said(PERSON, "I am back"))
    await world.completed(await world.said(OTHER, "hello"))
    world.clock.now += 6 * WEEK
    await world.archive()
    shutil.copytree(world.home / "archive", world.home / "backup")
    await world.erase(OTHER)
    copy = ArchiveFiles(str(world.home / "backup"))
    bridge, dsn = world.database.bridge, world.database.dsn
    connection = await bridge.run(lambda: connect(dsn, name="operator", role=None))
    try:
        operations = Operations(world.config, bridge, lambda: dsn, connection)
        await restore(operations, copy, "whatsapp_messages_y2026w10", "restored")
    finally:
        await bridge.run(connection.close)
    restored = await world.database.fetch(
        "SELECT convert_from(body, 'UTF8') AS body FROM restored.wa_events_y2026w10"
    )
    assert len(restored) == 2
    texts = " ".join(row["body"] for row in restored)
    assert PERSON in texts
    assert OTHER not in texts
    with pytest.raises(CannotErase, match="restored from an archive"):
        await world.erase(PERSON)


async def test_stopped_before_old_files_are_tidied_away_the_next_run_does_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await archived(world)
    tidy = ArchiveFiles.tidy

    def stop(files: ArchiveFiles, name: str) -> None:
        monkeypatch.setattr(ArchiveFiles, "tidy", tidy)
        if len(list((world.home / "archive" / name).iterdir())) > len(files.tables(name)) + 1:
            raise Interrupted(name)
        monkeypatch.setattr(ArchiveFiles, "tidy", stop)

    monkeypatch.setattr(ArchiveFiles, "tidy", stop)
    with pytest.raises(Interrupted):
        await world.erase()
    assert in_archives(world.home / "archive", PERSONAL)
    await world.erase()
    assert await world.left() == set()


async def test_a_message_of_somebody_else_that_mentions_them_is_waited_for(world: World) -> None:
    item = await world.said(OTHER, f"call {PERSON}")
    with pytest.raises(CannotErase, match="under way"):
        await world.erase()
    await world.letter(item)
    await world.erase()
    assert await world.left() == set()
    await assert_conserved(world.database)


async def test_what_others_change_meanwhile_is_not_lost(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.letter(await world.said(OTHER, f"call {PERSON}"))
    redact = Eraser._redact
    edited: list[int] = []

    async def after_an_edit(eraser: Eraser, rest: Any) -> bool:
        if not edited:
            edited.append(1)
            await world.database.fetch(
                "UPDATE webhook_dlq SET payload = $1, revision = 1", '{"type": "edited"}'
            )
        return await redact(eraser, rest)

    monkeypatch.setattr(Eraser, "_redact", after_an_edit)
    await world.erase(within=5)
    [letter] = await world.database.fetch("SELECT payload, error_message FROM webhook_dlq")
    assert (json.loads(letter["payload"]), letter["error_message"]) == ({"type": "edited"}, "no [erased]")
    assert await world.left() == set()


async def test_a_state_that_was_written_back_is_cleaned_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.completed(await world.said(OTHER, "hello"), state=f"after {PERSON}")
    clean = Eraser._clean_sessions

    async def after_a_late_write(eraser: Eraser, *arguments: Any) -> None:
        await world.database.fetch(
            "UPDATE user_sessions SET state = $1", json.dumps({"from": f"after {PERSON}"})
        )
        await clean(eraser, *arguments)

    monkeypatch.setattr(Eraser, "_clean_sessions", after_a_late_write)
    await world.erase(within=5)
    assert await world.left() == set()


async def test_bodies_that_only_look_like_it_do_not_keep_it_from_ending(world: World) -> None:
    await world.week()
    came = 0

    async def more() -> None:
        nonlocal came
        while True:
            text = payloads.text_message(world.head(OTHER), "HERE")
            body = payloads.body(payloads.entry("1", payloads.change(NUMBER, "1", messages=[text])))
            await appended(world.journal, world.split(body.replace(b"HERE", b"\\u0040")))
            came += 1
            await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(more)
        await world.erase(within=20)
        nursery.cancel_scope.cancel()
    assert came > 3
    assert await world.left() == set()


async def test_where_an_archived_item_went_is_known_after_its_letter_is_gone(world: World) -> None:
    await world.letter(await world.said(PERSON, SAYS))
    world.clock.now += 6 * WEEK
    await world.archive()
    await world.database.fetch(
        "SELECT postroom_retry_dead_letters($1, 'test', ARRAY(SELECT id FROM webhook_dlq))", world.clock.now
    )
    [late] = await world.journal.claim_dead_letters(world.epoch, 1, ["rides"])
    await world.completed(late)
    tallies = "SELECT delivered, dead_letter FROM delivery_tallies"
    assert [tuple(row) for row in await world.database.fetch(tallies)] == [(1, 0)]
    [cleaned] = await world.database.fetch(
        "SELECT removed FROM postroom_clean_dead_letters($1, $2, 0, 100)",
        world.epoch,
        world.clock.now + timedelta(days=1),
    )
    assert cleaned["removed"] == 1
    await assert_conserved(world.database)
    await world.erase()
    assert [tuple(row) for row in await world.database.fetch(tallies)] == [(0, 0)]
    await assert_conserved(world.database)
    assert await world.left() == set()


async def test_nothing_is_erased_while_an_archive_is_half_made(world: World) -> None:
    await world.week()
    for one in await world.journal.claim_dead_letters(world.epoch, 100, ["rides"]):
        await world.completed(one)
    world.clock.now += 6 * WEEK

    def stop(step: str) -> None:
        if step == "drop":
            raise Interrupted(step)

    with pytest.raises(Interrupted):
        await Archiver(world.archives, world.files, on_step=stop).archive_all(world.epoch, world.clock.now)
    with pytest.raises(CannotErase, match="is being made; erase again"):
        await world.erase()
    await world.archive()
    await world.erase()
    assert await world.left() == set()
    await assert_conserved(world.database)


async def test_no_archive_is_begun_while_somebody_is_erased(world: World) -> None:
    await world.week()
    for one in await world.journal.claim_dead_letters(world.epoch, 100, ["rides"]):
        await world.completed(one)
    world.clock.now += 6 * WEEK
    async with world.database.connection() as connection:
        await world.database.bridge.run(lambda: connection.execute("SELECT pg_advisory_lock(7305, 6)"))
        assert await world.archive() == []
    assert "whatsapp_messages_y2026w10" in await world.archive()
