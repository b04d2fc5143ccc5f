"""What only the real journal can show: commits in doubt, writers beside each other, rotation, partitions,
views, dead letters. What every journal promises is in tests/contracts.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
import trio
from contracts.journal_contract import NUMBER, body, done, message
from journal_kit import appended, assert_conserved, raw
from postgres_kit import Database, ManualClock, database, database_dsn, server

from actors.errors import JournalRefused, JournalUnavailable, LeaseLost
from actors.messages import Appended, Completion, DeadLetter, Delivery, Duplicates, Item, Place, Session
from router.json_text import storable
from router.postgres import journal as journal_module
from router.postgres.journal import PostgresJournal
from router.postgres.statements import statements

__all__ = ["database", "database_dsn", "server"]

pytestmark = pytest.mark.postgres

_DEAD_LETTERS = statements("dead_letters")


def hostile(*messages: bytes) -> Delivery:
    """A body whose messages are these bytes."""
    value = b'{"metadata":{"phone_number_id":"%s"},"messages":[%s]}' % (NUMBER.encode(), b",".join(messages))
    return raw(
        b'{"object":"whatsapp_business_account","entry":[{"changes":[{"field":"messages","value":%s}]}]}'
        % value
    )


async def stored(journal: PostgresJournal, name: str, sender: str = "1", **fields: Any) -> Item:
    """One journaled text message, with these fields beside the usual ones."""
    result = await appended(journal, body({**message(name, sender), **fields}))
    [item] = await journal.read([result.first_seq])
    return item


async def complete(journal: PostgresJournal, epoch: int, *completions: Completion) -> None:
    await journal.complete(completions, epoch=epoch, low_water=1, stragglers=[])


@pytest.fixture
async def journal(database: Database) -> AsyncIterator[PostgresJournal]:
    async with database.journal() as journal:
        yield journal


class TestRefusedByTheLedger:
    async def test_what_was_written_before_the_refusal_is_undone(
        self, database: Database, journal: PostgresJournal
    ) -> None:
        first = await appended(journal, body(message("a")))
        flush = await database.value("SELECT flush FROM journal_writers")
        result = await journal.append([body(message("b"), message("a", "2"), message("c"))], duplicates=4)
        assert result == Duplicates([1], [first.first_seq])
        assert await database.value("SELECT array_agg(seq) FROM dedup_ledger_0") == [first.first_seq]
        assert await database.value("SELECT flush FROM journal_writers") == flush
        assert (await appended(journal, body(message("b"), message("c")))).first_seq == first.first_seq + 1
        await assert_conserved(database)

    async def test_an_item_twice_in_one_flush_is_no_duplicate_that_can_be_cut(
        self, database: Database, journal: PostgresJournal
    ) -> None:
        """The ingress cuts what one flush holds twice; nothing is stored of what forgets to."""
        with pytest.raises(JournalRefused):
            await journal.append([body(message("a")), body(message("a"))], duplicates=0)
        assert await database.value("SELECT count(*) FROM wa_events") == 0
        assert (await appended(journal, body(message("a")))).first_seq == 1


class TestInDoubt:
    """A connection that dies during COMMIT; `cut` makes it die before or after the server has worked."""

    @contextmanager
    def cut(self, journal: PostgresJournal, *, committed: bool) -> Iterator[list[str]]:
        line = journal._append_line
        real_use, calls = line.use, []

        class Dying:
            def __init__(self, connection: asyncpg.Connection) -> None:
                self._connection = connection

            async def fetchval(self, *arguments: Any) -> Any:
                calls.append("resolve")
                return await self._connection.fetchval(*arguments)

            async def fetchrow(self, *arguments: Any) -> Any:
                calls.append("append")
                if calls.count("append") > 1:
                    return await self._connection.fetchrow(*arguments)
                if committed:
                    await self._connection.fetchrow(*arguments)
                raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")

        @asynccontextmanager
        async def use() -> AsyncIterator[Dying]:
            async with real_use() as connection:
                yield Dying(connection)

        line.use = use  # type: ignore[method-assign,assignment]
        yield calls
        line.use = real_use  # type: ignore[method-assign]

    async def test_committed(self, journal: PostgresJournal, database: Database) -> None:
        with self.cut(journal, committed=True) as calls:
            assert await journal.append([body(message("a"))], duplicates=1) is None
        assert calls == ["append", "resolve"]
        assert len((await journal.undelivered()).items) == 1
        assert await database.value("SELECT duplicates FROM journal_head") == 1
        assert isinstance(await journal.append([body(message("a"))], duplicates=0), Duplicates)
        await assert_conserved(database)

    async def test_not_committed(self, journal: PostgresJournal, database: Database) -> None:
        with self.cut(journal, committed=False) as calls:
            result = await appended(journal, body(message("a")))
        assert calls == ["append", "resolve", "append"]
        assert result.first_seq == 1
        assert len((await journal.undelivered()).items) == 1
        await assert_conserved(database)

    async def test_a_resolved_number_is_used_up(self, journal: PostgresJournal, database: Database) -> None:
        await appended(journal, body(message("a")))
        resolve = "SELECT postroom_resolve_flush((SELECT writer FROM journal_writers), $1)"
        assert await database.value(resolve, 1) is True
        assert await database.value(resolve, 2) is False
        assert await database.value(resolve, 2) is True
        # Flush 2 was given up and cannot be committed any more; the journal takes the next number.
        assert (await appended(journal, body(message("b")))).first_seq == 2
        assert await database.value("SELECT flush FROM journal_writers") == 3

    async def test_a_lost_connection_is_replaced(self, journal: PostgresJournal, database: Database) -> None:
        await appended(journal, body(message("a")))
        await database.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert (await appended(journal, body(message("b")))).first_seq == 2
        assert len((await journal.undelivered()).items) == 2

    async def test_a_refused_flush_is_unavailable_at_once(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        await database.fetch("ALTER TABLE wa_events RENAME TO moved")
        with pytest.raises(JournalUnavailable) as raised:
            await journal.append([body(message("a secret text"))], duplicates=0)
        assert "secret" not in str(raised.value)
        await database.fetch("ALTER TABLE moved RENAME TO wa_events")
        assert (await appended(journal, body(message("a")))).first_seq == 1

    async def test_data_that_the_database_refuses_is_told_from_a_database_that_is_away(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        await database.fetch("ALTER TABLE whatsapp_messages_items ADD CHECK (message_id <> 'wamid.secret')")
        with pytest.raises(JournalRefused) as raised:
            await journal.append([body(message("a")), body(message("secret"))], duplicates=0)
        assert "secret" not in str(raised.value)
        assert (await appended(journal, body(message("a")))).first_seq == 1


class TestTwoWriters:
    async def test_seqs_are_gapless_and_in_commit_order(self, database: Database) -> None:
        firsts: dict[int, int] = {}

        async def write(journal: PostgresJournal, name: str) -> None:
            for number in range(25):
                messages = [message(f"{name}.{number}.{n}", name) for n in range(1 + number % 3)]
                firsts[(await appended(journal, body(*messages))).first_seq] = len(messages)

        snapshots = []
        async with database.journal() as one, database.journal() as two, database.connection() as reader:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write, one, "1")
                nursery.start_soon(write, two, "2")
                while len(firsts) < 50:
                    snapshots.append(
                        await database.bridge.run(
                            lambda: reader.fetchrow(
                                "SELECT (SELECT next_seq - 1 FROM journal_head) AS newest,"
                                " count(*) AS items, coalesce(max(seq), 0) AS last"
                                " FROM whatsapp_messages_items"
                            )
                        )
                    )
            assert len(await one.read(range(1, 200))) == sum(firsts.values())
        expected = 1
        for first, count in sorted(firsts.items()):
            assert first == expected
            expected += count
        # Whatever is visible has nothing invisible before it: what is read on from a seq misses nothing.
        assert all(row["newest"] == row["items"] == row["last"] for row in snapshots)
        await assert_conserved(database)

    async def test_one_hears_of_the_other(self, database: Database) -> None:
        heard = trio.Event()
        async with database.connection() as listener:
            await database.bridge.run(
                lambda: listener.add_listener(
                    "postroom_journal", lambda *_: database.bridge.call_soon(heard.set)
                )
            )
            async with database.journal(notify=True) as other:
                await appended(other, body(message("a")))
            await heard.wait()

    async def test_of_two_with_the_same_message_one_writes(self, database: Database) -> None:
        results: list[object] = []

        async def write(journal: PostgresJournal) -> None:
            results.append(await journal.append([body(message("a"))], duplicates=0))

        async with database.journal() as one, database.journal() as two, trio.open_nursery() as nursery:
            nursery.start_soon(write, one)
            nursery.start_soon(write, two)
        assert sorted(type(result).__name__ for result in results) == ["Appended", "Duplicates"]


class TestLedger:
    async def test_it_forgets_after_two_rotations_and_not_before(self, database: Database) -> None:
        start = datetime.now(UTC)
        clock = ManualClock(2026, 1, 1)
        clock.now = start
        async with database.journal(clock=clock) as journal:
            await appended(journal, body(message("a")))
            clock.now = start + timedelta(days=7, hours=23)
            await journal.keep_house()
            assert await database.value("SELECT current FROM dedup_generation") == 0
            clock.now = start + timedelta(days=8, hours=1)
            await journal.keep_house()
            await journal.keep_house()
            assert await database.value("SELECT current FROM dedup_generation") == 1
            found = await journal.append([body(message("b"), message("a"))], duplicates=0)
            assert found == Duplicates([1], [1])
            await appended(journal, body(message("b")))
            clock.now = start + timedelta(days=16, hours=2)
            await journal.keep_house()
            again = await journal.append([body(message("b"), message("a"))], duplicates=0)
            assert again == Duplicates([0], [2])
            assert (await appended(journal, body(message("a")))).first_seq == 3
        await assert_conserved(database)


async def partitions(database: Database, parent: str) -> dict[str, str]:
    rows = await database.fetch(
        "SELECT c.relname AS name, pg_get_expr(c.relpartbound, c.oid) AS bound FROM pg_inherits i"
        " JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = $1::text::regclass ORDER BY 1",
        parent,
    )
    return {row["name"]: row["bound"] for row in rows}


class TestPartitions:
    async def test_made_ahead_over_the_end_of_an_iso_year(self, database: Database) -> None:
        clock = ManualClock(2026, 12, 28)
        async with database.journal(clock=clock) as journal:
            weeks = await partitions(database, "whatsapp_messages_items")
            assert list(weeks) == [
                f"whatsapp_messages_y{week}"
                for week in ("2026w52", "2026w53", "2027w01", "2027w02", "2027w03", "2027w04")
            ]
            assert weeks["whatsapp_messages_y2026w53"] == (
                "FOR VALUES FROM ('2026-12-28 00:00:00+00') TO ('2027-01-04 00:00:00+00')"
            )
            outcomes = await partitions(database, "message_outcomes")
            assert [name.removeprefix("message_outcomes") for name in outcomes] == [
                name.removeprefix("whatsapp_messages") for name in weeks
            ]
            assert list(await partitions(database, "wa_events")) == [
                f"wa_events_y{month}" for month in ("2026m12", "2027m01", "2027m02", "2027m03", "2027m04")
            ]
            for year, month, day in ((2026, 12, 28), (2027, 1, 1), (2027, 1, 3), (2027, 1, 4)):
                clock.now = datetime(year, month, day, 23, 59, 59, tzinfo=UTC)
                await appended(journal, body(message(f"{day}")))
            clock.now = datetime(2027, 1, 1, tzinfo=UTC)
            await journal.keep_house()
        tables = await database.fetch(
            "SELECT tableoid::regclass::text FROM whatsapp_messages_items ORDER BY seq"
        )
        assert [row[0][-8:] for row in tables] == ["y2026w53"] * 3 + ["y2027w01"]
        tables = await database.fetch("SELECT tableoid::regclass::text FROM wa_events ORDER BY event_id")
        assert [row[0][-8:] for row in tables] == ["y2026m12"] + ["y2027m01"] * 3

    async def test_what_is_there_is_left_alone(self, database: Database) -> None:
        make = "SELECT postroom_make_partitions($1, $2)"
        moment = datetime(2026, 6, 10, tzinfo=UTC)
        assert await database.value(make, moment, 4) == 15
        assert await database.value(make, moment, 4) == 0
        assert await database.value(make, moment + timedelta(days=7), 4) == 2
        assert await database.value(make, moment + timedelta(days=31), 4) == 7

    async def test_by_hand(self, database: Database) -> None:
        assert (
            await database.value("SELECT create_wa_events_partition()") >= 15
        )  # more as a week or month begins
        assert await database.value("SELECT create_wa_events_partition()") == 0

    async def test_two_at_once(self, database: Database) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(database.fetch, "SELECT create_wa_events_partition()")
        assert len(await partitions(database, "wa_events")) in (5, 6)

    async def test_a_flush_without_one_gets_it_and_is_reported(self, database: Database) -> None:
        clock = ManualClock(2026, 6, 10)
        homeless: list[datetime] = []
        async with (
            database.journal(clock=clock, on_homeless=homeless.append) as journal,
            database.journal(clock=clock, on_homeless=homeless.append) as other,
        ):
            assert (await appended(journal, body(message("a")))).first_seq == 1
            assert homeless == []
            clock.now += timedelta(days=400)
            results: list[Appended] = []

            async def append(to: PostgresJournal, name: str) -> None:
                results.append(await appended(to, body(message(name))))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(append, journal, "b")
                nursery.start_soon(append, other, "c")
            assert sorted(result.first_seq for result in results) == [2, 3]
            assert set(homeless) == {clock.now}
            await appended(journal, body(message("d")))
        assert await database.value("SELECT count(*) FROM whatsapp_messages_y2027w28") == 3
        await assert_conserved(database)


class TestViews:
    async def test_hostile_bytes_are_shown_as_far_as_jsonb_can(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        flush = hostile(
            rb'{"id":"plain","from":"1","type":"text","text":{"body":"h\u00e9llo \ud83d\ude97"}}',
            rb'{"id":"nul","from":"1","type":"text","text":{"body":"a\u0000b"}}',
            rb'{"id":"half","from":"1","type":"text","text":{"body":"a\ud800b"}}',
            rb'{"id":"twice","id":"last","from":"1","type":"text","text":{"body":"x"}}',
            rb'{"id":"big","from":"1","type":"text","text":{"body":"x"},"n":1e400}',
        )
        result = await journal.append(
            [flush, hostile(rb'{"id":"alone","from":"1","text":{"body":"\udfff"}}'), raw(b"\xff{"), raw(b"")],
            duplicates=0,
        )
        assert isinstance(result, Appended)
        rows = await database.fetch("SELECT * FROM whatsapp_messages ORDER BY seq")
        assert [row["message_id"] for row in rows] == ["plain", "nul", "half", "last", "big", "alone"]
        assert {row["place"] for row in rows} == {"journaled"}
        bodies = [json.loads(row["payload"])["text"]["body"] for row in rows]
        assert bodies[1:3] == ["a\ufffdb", "a\ufffdb"]
        assert bodies[5] == "\ufffd"
        stored_bytes = await database.value("SELECT body FROM wa_events WHERE event_id = 1")
        assert stored_bytes == flush.body
        items = await journal.read(range(1, 9))
        assert [item.message["text"]["body"] for item in items[:3]] == ["héllo 🚗", "a\0b", "a\ud800b"]
        found = await database.fetch(
            "SELECT message_id, processed FROM processed_webhook_messages ORDER BY seq"
        )
        assert [row["processed"] for row in found] == [False] * 6
        await assert_conserved(database)

    @pytest.mark.parametrize("field", ["id", "from", "type"])
    async def test_hostile_texts_in_columns_do_not_fail_the_flush(
        self, journal: PostgresJournal, database: Database, field: str
    ) -> None:
        for text in (rb"a\u0000b", rb"a\ud800b", rb"a\udc00\ud800b"):
            fields = {b"id": b"ok" + text[2:5], b"from": b"1", b"type": b"text"} | {field.encode(): text}
            json_text = b",".join(b'"%s":"%s"' % pair for pair in fields.items())
            await appended(journal, hostile(b"{%s}" % json_text), body(message(repr(text))))
        assert await database.value("SELECT count(*) FROM whatsapp_messages_items") == 6
        await database.fetch("SELECT * FROM whatsapp_messages")
        await assert_conserved(database)

    async def test_what_became_of_a_message(self, journal: PostgresJournal, database: Database) -> None:
        epoch = await database.take_epoch()
        item, other = await stored(journal, "a"), await stored(journal, "b")
        await complete(journal, epoch, done(item, replies=1), done(other, place=Place.HANDLED, service=None))
        rows = await database.fetch("SELECT * FROM whatsapp_messages ORDER BY seq, direction")
        assert [(row["direction"], row["place"], row["service"]) for row in rows] == [
            ("inbound", "delivered", "rides"),
            ("outbound", "unsent", "rides"),
            ("inbound", "handled", None),
        ]
        assert {row["session_key"] for row in rows} == {item.session_key}
        found = await database.fetch("SELECT processed, place FROM processed_webhook_messages ORDER BY seq")
        assert [tuple(row) for row in found] == [(True, "delivered"), (True, "handled")]


class TestStatuses:
    async def status(self, journal: PostgresJournal, *names: str, stamp: int = 1_893_456_000) -> None:
        statuses = tuple(
            {"id": "wamid.out", "status": name, "timestamp": str(stamp), "recipient_id": "1"}
            for name in names
        )
        await appended(journal, body(statuses=statuses))

    async def test_they_only_move_forward(self, journal: PostgresJournal, database: Database) -> None:
        seen = []
        for names in (("sent",), ("read", "delivered"), ("delivered",), ("sent",)):
            await self.status(journal, *names, stamp=1_893_456_000 + len(seen))
            seen.append(await database.value("SELECT status FROM whatsapp_statuses"))
        assert seen == ["sent", "read", "read", "read"]
        assert await database.value("SELECT status_at FROM whatsapp_statuses") == datetime.fromtimestamp(
            1_893_456_001, UTC
        )
        assert await database.value("SELECT handled FROM journal_head") == 5
        await assert_conserved(database)


PENDING = DeadLetter(status="pending", resolution=None, error="down", retry_in=60.0)
DUE = replace(PENDING, retry_in=0.0)
DEFERRED = replace(DUE, resolution="deferred", counted=False, keeps_order=True)
NOBODY = replace(PENDING, resolution="no_service", retry_in=None, counted=False)
REJECTED = DeadLetter(status="failed", resolution="rejected", error="no", retry_in=None)


class TestDeadLetters:
    async def letter(
        self,
        journal: PostgresJournal,
        epoch: int,
        name: str = "a",
        letter: DeadLetter = PENDING,
        *,
        sender: str = "1",
        service: str = "rides",
        **fields: Any,
    ) -> Item:
        """A message that became a dead letter."""
        item = await stored(journal, name, sender, **fields)
        place = {"rejected": Place.REJECTED, "deferred": Place.DEFERRED}.get(
            letter.resolution or "", Place.DEAD_LETTER
        )
        await complete(journal, epoch, done(item, service=service, place=place, dead_letter=letter))
        return item

    async def act(self, database: Database, name: str, *arguments: Any, seq: int | None = None) -> Any:
        """`retry` or `discard` all letters, or the one with this seq, as this operator."""
        ids = await self.ids(database, seq)
        return await database.value(_DEAD_LETTERS[name], datetime.now(UTC), "cli:ada", ids, *arguments)

    async def ask(self, database: Database, seq: int | None = None) -> int:
        asked: int = await self.act(database, "retry", seq=seq)
        return asked

    async def edit(self, database: Database, item: Item, edited: Mapping[str, Any]) -> int | None:
        [identity] = await self.ids(database, item.seq)
        revision: int | None = await database.value(
            _DEAD_LETTERS["edit"], datetime.now(UTC), "cli:ada", identity, storable(edited)
        )
        return revision

    async def ids(self, database: Database, seq: int | None = None) -> list[uuid.UUID]:
        found = await database.fetch(
            "SELECT id FROM webhook_dlq WHERE $1::bigint IS NULL OR seq = $1 ORDER BY seq", seq
        )
        return [row["id"] for row in found]

    async def claim(self, journal: PostgresJournal, epoch: int, **options: bool) -> list[Item]:
        return await journal.claim_dead_letters(epoch, 10, ["rides"], **options)

    async def next_due(self, journal: PostgresJournal, epoch: int) -> float | None:
        due = await journal.log_retry_run(
            epoch, took=0.0, processed=0, failed=0, error=None, services=["rides"]
        )
        return min(due.values(), default=None)

    async def claimed(self, journal: PostgresJournal, item: Item, epoch: int) -> Item:
        [replay] = await self.claim(journal, epoch)
        assert (replay.seq, replay.domain) == (item.seq, "rides")
        return replay

    async def tallies(self, database: Database) -> dict[str, int]:
        """Those that are not zero; they agree with the tables."""
        await assert_conserved(database)
        [row] = await database.fetch(
            "SELECT delivered, rejected, dead_letter, deferred, discarded FROM delivery_tallies"
        )
        return {name: count for name, count in row.items() if count}

    @pytest.mark.parametrize(
        ("letter", "place"),
        [(None, "delivered"), (REJECTED, "rejected"), (PENDING, "dead_letter"), (DEFERRED, "deferred")],
    )
    async def test_what_was_deferred_is_somewhere_else_when_it_was_tried(
        self, journal: PostgresJournal, database: Database, letter: DeadLetter | None, place: str
    ) -> None:
        epoch = await database.take_epoch()
        item = await self.letter(journal, epoch, letter=DEFERRED)
        assert await self.tallies(database) == {"deferred": 1}
        replay = await self.claimed(journal, item, epoch)
        await complete(journal, epoch, done(replay, place=Place(place), dead_letter=letter))
        assert await self.tallies(database) == {place: 1}

    async def test_a_letter_that_somebody_made_pending_by_hand_is_never_due(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        epoch = await database.take_epoch()
        await self.letter(journal, epoch, letter=REJECTED)
        await database.fetch("UPDATE webhook_dlq SET status = 'pending', resolution = NULL")
        assert await self.next_due(journal, epoch) is None
        assert await self.claim(journal, epoch) == []

    async def test_what_was_deferred_can_expire_or_be_discarded(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        epoch = await database.take_epoch()
        first, _ = [await self.letter(journal, epoch, name, DEFERRED) for name in "ab"]
        assert await self.act(database, "discard", "gone", seq=first.seq) == 1
        assert await self.tallies(database) == {"deferred": 1, "discarded": 1}
        assert await journal.expire_dead_letters(epoch, timedelta(seconds=-1)) == 1
        assert await self.tallies(database) == {"dead_letter": 1, "discarded": 1}
        assert await journal.held_pairs() == []

    async def test_a_replay_that_is_delivered(self, journal: PostgresJournal, database: Database) -> None:
        epoch = await database.take_epoch()
        item = await self.letter(journal, epoch)
        assert await self.claim(journal, epoch) == []
        assert await self.ask(database) == 1
        replay = await self.claimed(journal, item, epoch)
        assert await self.claim(journal, epoch) == []
        assert await self.ask(database) == 0
        session = Session(key=item.session_key, phone_number_id=NUMBER, version=5, state={"n": 1})
        for _ in range(2):
            await complete(journal, epoch, done(replay, session, replies=2))
            [letter] = await database.fetch("SELECT * FROM webhook_dlq")
            assert (letter["status"], letter["resolution"]) == ("reprocessed", "reprocessed")
            assert (letter["attempts"], letter["retry_count"]) == (2, 1)
            assert await database.value("SELECT count(*) FROM whatsapp_outbox") == 2
            assert await database.value("SELECT outcome FROM message_outcomes") == "delivered"
            assert (await journal.load_sessions([item.session_key]))[item.session_key][0].version == 5
            assert await self.tallies(database) == {"delivered": 1}
        assert await self.ask(database) == 0

    async def test_a_replay_does_not_overwrite_a_newer_session(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        epoch = await database.take_epoch()
        item = await self.letter(journal, epoch)
        session = Session(key=item.session_key, phone_number_id=NUMBER, version=5, active_service="jobs")
        await complete(journal, epoch, done(await stored(journal, "b"), session))
        await self.ask(database)
        replay = await self.claimed(journal, item, epoch)
        await complete(journal, epoch, done(replay, replace(session, version=5, active_service="rides")))
        found, _ = (await journal.load_sessions([item.session_key]))[item.session_key]
        assert found.active_service == "jobs"

    async def test_a_replay_that_fails_for_good(self, journal: PostgresJournal, database: Database) -> None:
        epoch = await database.take_epoch()
        item = await self.letter(journal, epoch)
        await self.ask(database)
        replay = await self.claimed(journal, item, epoch)
        refused = DeadLetter(status="failed", resolution="rejected", error="no\0", retry_in=None)
        await complete(journal, epoch, done(replay, place=Place.REJECTED, dead_letter=refused))
        [letter] = await database.fetch("SELECT * FROM webhook_dlq")
        assert (letter["status"], letter["resolution"], letter["error_message"]) == (
            "failed",
            "rejected",
            "no\ufffd",
        )
        assert await database.value("SELECT outcome FROM message_outcomes") == "rejected"
        assert await self.tallies(database) == {"rejected": 1}
        assert await self.ask(database) == 1
        again = await self.claimed(journal, item, epoch)
        await complete(journal, epoch, done(again, place=Place.DEAD_LETTER, dead_letter=PENDING))
        assert await self.tallies(database) == {"dead_letter": 1}

    async def test_the_next_owner_takes_over_what_was_claimed(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        epoch = await database.take_epoch()
        item = await self.letter(journal, epoch)
        await self.ask(database)
        replay = await self.claimed(journal, item, epoch)
        following = await database.take_epoch()
        with pytest.raises(LeaseLost):
            await complete(journal, epoch, done(replay))
        assert await self.claim(journal, following) == []
        await journal.release_dead_letters(following)
        assert await self.claimed(journal, item, following) == replay
        assert await database.value("SELECT count(*) FROM whatsapp_outbox") == 0
        await complete(journal, following, done(replay))
        assert await self.tallies(database) == {"delivered": 1}

    async def test_all_of_them_are_released_a_page_at_a_time(
        self, journal: PostgresJournal, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        epoch = await database.take_epoch()
        for name in "abcde":
            await self.letter(journal, epoch, name, DUE, sender=name)
        claimed = await self.claim(journal, epoch)
        assert len(claimed) == 5
        monkeypatch.setattr(journal_module, "_RELEASED_AT_ONCE", 2)
        await journal.release_dead_letters(epoch)
        assert await self.claim(journal, epoch) == claimed

    async def test_what_was_asked_for_waits_neither_for_its_time_nor_for_an_older_one(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        epoch = await database.take_epoch()
        older, younger = [await self.letter(journal, epoch, name) for name in "ab"]
        assert await self.ask(database, younger.seq) == 1
        assert await self.next_due(journal, epoch) == 0
        replay = await self.claimed(journal, younger, epoch)
        assert await self.ask(database, older.seq) == 1
        assert await self.claim(journal, epoch) == []  # the other one is out
        await complete(journal, epoch, done(replay))
        await self.claimed(journal, older, epoch)

    async def test_what_was_asked_for_does_not_wait_for_one_that_waits_itself(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        epoch = await database.take_epoch()
        await self.letter(journal, epoch, "not due")
        await self.letter(journal, epoch, "behind it", DUE)
        asked = await self.letter(journal, epoch, "asked for")
        assert await self.ask(database, asked.seq) == 1
        await self.claimed(journal, asked, epoch)

    async def test_for_a_service_that_is_not_there_only_what_was_asked_for_is_claimed(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        epoch = await database.take_epoch()
        await self.letter(journal, epoch, "a", DUE, sender="1", service="taxi")
        asked = await self.letter(journal, epoch, "b", NOBODY, sender="2", service="taxi")
        await self.letter(journal, epoch, "c", sender="3")
        assert await self.claim(journal, epoch, others=True) == []
        assert await self.ask(database, asked.seq) == 1
        assert await self.next_due(journal, epoch) == 0
        assert await self.claim(journal, epoch) == []
        [replay] = await self.claim(journal, epoch, others=True)
        assert (replay.seq, replay.domain) == (asked.seq, "taxi")
        await complete(journal, epoch, done(replay, place=Place.DEAD_LETTER, dead_letter=NOBODY))
        assert await self.claim(journal, epoch, others=True) == []
        [row] = await database.fetch(
            "SELECT status, resolution, retry_count FROM webhook_dlq WHERE seq = $1", asked.seq
        )
        assert tuple(row) == ("pending", "no_service", 0)

    async def test_whoever_delivers_is_told_that_somebody_asked(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        await self.letter(journal, await database.take_epoch())
        calls = [trio.Event() for _ in range(3)]
        unheard = iter(calls)
        async with database.connection() as listener:
            await database.bridge.run(
                lambda: listener.add_listener(
                    "postroom_dead_letters", lambda *_: database.bridge.call_soon(next(unheard).set)
                )
            )
            await self.ask(database)
            await calls[0].wait()
            [letter] = await self.ids(database)
            await database.value(_DEAD_LETTERS["edit"], datetime.now(UTC), "cli:ada", letter, "{}")
            await calls[1].wait()
            await database.fetch("SELECT process_dlq_entries()")
            await calls[2].wait()

    async def test_what_operators_did_is_on_record(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        epoch = await database.take_epoch()
        items = [await self.letter(journal, epoch, name) for name in "ab"]
        one, other = await self.ids(database)
        assert await self.ask(database) == 2
        assert await self.edit(database, items[0], message("secret")) == 1
        assert await self.act(database, "discard", "campaign is over", seq=items[1].seq) == 1
        found = await database.fetch("SELECT * FROM audit_log ORDER BY id")
        assert {(row["actor"], row["object_type"]) for row in found} == {("cli:ada", "webhook_dlq")}
        assert sorted((row["action"], row["object_id"], row["detail"]) for row in found) == sorted(
            [
                ("dlq.retry", str(one), "{}"),
                ("dlq.retry", str(other), "{}"),
                ("dlq.edit", str(one), '{"revision": 1}'),
                ("dlq.discard", str(other), '{"reason": "campaign is over"}'),
            ]
        )

    async def test_what_was_discarded_is_over(self, journal: PostgresJournal, database: Database) -> None:
        epoch = await database.take_epoch()
        pending = await self.letter(journal, epoch, "a", sender="1")
        rejected = await self.letter(journal, epoch, "b", REJECTED, sender="2")
        asked = await self.letter(journal, epoch, "c", sender="3")
        await self.letter(journal, epoch, "d", sender="4")
        assert await self.ask(database, asked.seq) == 1
        assert await self.tallies(database) == {"dead_letter": 3, "rejected": 1}
        for item, left in (
            (pending, {"dead_letter": 2, "rejected": 1, "discarded": 1}),
            (rejected, {"dead_letter": 2, "discarded": 2}),
            (asked, {"dead_letter": 1, "discarded": 3}),
        ):
            for discarded in (1, 0):
                assert await self.act(database, "discard", "over", seq=item.seq) == discarded
                assert await self.tallies(database) == left
            assert await self.ask(database, item.seq) == 0
            assert await self.edit(database, item, message("other")) is None
        rows = await database.fetch(
            "SELECT DISTINCT status, resolution, revision, next_retry_at, retry_requested_at, outcome"
            " FROM webhook_dlq JOIN message_outcomes USING (seq) WHERE seq <= 3"
        )
        assert [tuple(row) for row in rows] == [("failed", "discarded", 0, None, None, "discarded")]
        assert await self.claim(journal, epoch) == []
        acts = await database.fetch("SELECT action FROM audit_log ORDER BY id")
        assert [row["action"] for row in acts] == ["dlq.retry"] + ["dlq.discard"] * 3

    async def test_what_is_being_processed_is_left_alone(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        epoch = await database.take_epoch()
        item = await self.letter(journal, epoch, letter=DUE)
        replay = await self.claimed(journal, item, epoch)
        assert await self.ask(database) == await self.act(database, "discard", "over") == 0
        assert await self.edit(database, item, message("other")) is None
        assert await database.value("SELECT count(*) FROM audit_log") == 0
        await complete(journal, epoch, done(replay))
        assert await self.tallies(database) == {"delivered": 1}

    async def test_an_edited_letter_is_another_revision_at_once(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        epoch = await database.take_epoch()
        item = await self.letter(journal, epoch, letter=REJECTED)
        for revision in (1, 2):
            edited = message(f"better {revision}", "1")
            assert await self.edit(database, item, edited) == revision
            replay = await self.claimed(journal, item, epoch)
            assert replay == replace(
                item,
                message=edited,
                revision=revision,
                retries=revision - 1,
                dead_letter=replay.dead_letter,
                domain="rides",
                redelivered=True,
                overtaken=True,
            )
            await complete(journal, epoch, done(replay, place=Place.REJECTED, dead_letter=REJECTED))
        assert await self.tallies(database) == {"rejected": 1}

    @pytest.mark.parametrize("gone", ["wa_events", "whatsapp_messages_items"])
    async def test_the_letter_keeps_its_message_when_the_journal_is_gone(
        self, journal: PostgresJournal, database: Database, gone: str
    ) -> None:
        epoch = await database.take_epoch()
        item = await self.letter(journal, epoch, letter=DUE, errors=[{"title": "nul \0"}])
        await database.fetch(f"DELETE FROM {gone}")
        assert await journal.read([item.seq]) == []
        replay = await self.claimed(journal, item, epoch)
        key = item.key if gone == "wa_events" else f"msg_{uuid.UUID(replay.dead_letter).hex}"
        assert replay == replace(
            item,
            message={**item.message, "errors": [{"title": "nul \ufffd"}]},
            key=key,
            dead_letter=replay.dead_letter,
            domain="rides",
            redelivered=True,
            overtaken=True,
        )

    async def test_a_letter_whose_bytes_are_there_is_replayed_as_it_was_sent(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        epoch = await database.take_epoch()
        item = await self.letter(journal, epoch, letter=DUE, errors=[{"title": "nul \0 and \ud800"}])
        assert (await self.claimed(journal, item, epoch)).message == item.message

    async def test_every_run_is_on_record(self, journal: PostgresJournal, database: Database) -> None:
        epoch = await database.take_epoch()
        before = datetime.now(UTC)
        for processed, failed, error in ((0, 0, None), (3, 1, None), (2, 2, "gone\0")):
            await journal.log_retry_run(
                epoch, took=0.0, processed=processed, failed=failed, error=error, services=["rides"]
            )
        rows = await database.fetch("SELECT * FROM dlq_processing_log ORDER BY id")
        assert [tuple(row)[2:6] for row in rows] == [
            ("completed", 0, 0, None),
            ("completed", 3, 1, None),
            ("failed", 2, 2, "gone\ufffd"),
        ]
        assert all(before <= row["started_at"] <= row["processed_at"] for row in rows)

    async def test_an_expired_letter_can_be_asked_for(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        epoch = await database.take_epoch()
        item = await self.letter(journal, epoch)
        assert await journal.expire_dead_letters(epoch, timedelta(seconds=-1)) == 1
        [row] = await database.fetch("SELECT status, resolution, next_retry_at FROM webhook_dlq")
        assert tuple(row) == ("failed", "exhausted", None)
        assert await self.tallies(database) == {"dead_letter": 1}
        assert await self.ask(database) == 1
        assert await journal.expire_dead_letters(epoch, timedelta(seconds=-1)) == 0
        await complete(journal, epoch, done(await self.claimed(journal, item, epoch)))
        assert await self.tallies(database) == {"delivered": 1}

    async def test_a_number_that_only_the_lenient_parser_takes_can_be_replayed(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        epoch = await database.take_epoch()
        item = await self.letter(journal, epoch, letter=DUE, big=10**400)
        assert (await self.claimed(journal, item, epoch)).message == item.message


class TestStragglers:
    async def test_a_repeated_batch_leaves_no_row_behind(
        self, journal: PostgresJournal, database: Database
    ) -> None:
        epoch = await database.take_epoch()
        item = await stored(journal, "a")
        for _ in range(2):  # the commit of the first was in doubt, say
            await journal.complete([done(item)], epoch=epoch, low_water=2, stragglers=[item.seq])
        assert await database.value("SELECT count(*) FROM journal_stragglers") == 0
