"""What every Journal promises. Each function takes a `World`; a runner parametrizes over CONTRACT and
brings a journal that is empty, with epoch `world.epoch` in force.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest

from actors.errors import LeaseLost
from actors.messages import Appended, Completion, DeadLetter, Delivery, Duplicates, Item, Place, Session
from actors.ports import Journal
from router.channels.whatsapp import Splitter

NUMBER = "100200300"
_SPLITTER = Splitter("contract", dedup_key=b"contract", is_ours=lambda number: True)


@dataclass
class World:
    """One journal under test. `end_epoch` puts the next epoch in force; `duplicates` reads the tally of
    duplicates; `outcomes` and `outbox` count what completions stored."""

    journal: Journal
    epoch: int
    end_epoch: Callable[[], Awaitable[None]]
    duplicates: Callable[[], Awaitable[int]]
    outcomes: Callable[[], Awaitable[int]]
    outbox: Callable[[], Awaitable[int]]
    answers: list[bool] = field(default_factory=list)

    async def append(self, *deliveries: Delivery, duplicates: int = 0) -> Appended:
        result = await self.journal.append(deliveries, duplicates=duplicates)
        assert isinstance(result, Appended)
        return result

    async def read(self, *seqs: int) -> list[Item]:
        return await self.journal.read(seqs)

    async def complete(
        self,
        *done: Completion,
        low_water: int = 1,
        stragglers: tuple[int, ...] = (),
        epoch: int | None = None,
    ) -> None:
        await self.journal.complete(
            done,
            epoch=self.epoch if epoch is None else epoch,
            low_water=low_water,
            stragglers=list(stragglers),
        )

    async def undelivered(self) -> list[int]:
        return [seq for seq, _ in (await self.journal.undelivered()).items]

    async def letter(
        self,
        name: str,
        sender: str = "1",
        *,
        service: str = "rides",
        retry_in: float | None = 0.0,
        resolution: str | None = None,
        keeps_order: bool = False,
        attempts: int = 1,
    ) -> Item:
        """A message that became a pending dead letter."""
        [item] = await self.read((await self.append(body(message(name, sender)))).first_seq)
        letter = DeadLetter(
            status="pending",
            resolution=resolution,
            error="down",
            retry_in=retry_in,
            keeps_order=keeps_order,
        )
        place = Place.DEFERRED if resolution == "deferred" else Place.DEAD_LETTER
        completion = done(item, service=service, place=place, dead_letter=letter)
        await self.complete(replace(completion, attempts=attempts))
        return item

    async def deferred(self, name: str, sender: str = "1") -> Item:
        """A message that waits in its turn."""
        return await self.letter(name, sender, resolution="deferred", keeps_order=True, attempts=0)

    async def claim(
        self, *services: str, limit: int = 10, others: bool = False, epoch: int | None = None
    ) -> list[Item]:
        return await self.journal.claim_dead_letters(
            self.epoch if epoch is None else epoch, limit, services or ("rides",), others=others
        )

    async def next_due(self, *services: str) -> float | None:
        """What the record of a run answers."""
        due = await self.journal.log_retry_run(
            self.epoch, took=0.0, processed=0, failed=0, error=None, services=services
        )
        return min(due.values(), default=None)


def message(name: str, sender: str | None = "250788000001", user_id: str | None = None) -> dict[str, Any]:
    """A text message as Meta sends it."""
    said: dict[str, Any] = {
        "id": f"wamid.{name}",
        "type": "text",
        "text": {"body": name},
        "timestamp": "1893456000",
    }
    if sender is not None:
        said["from"] = sender
    if user_id is not None:
        said["from_user_id"] = user_id
    return said


def body(*messages: dict[str, Any], statuses: tuple[dict[str, Any], ...] = ()) -> Delivery:
    """One body with these messages, and after them these statuses."""
    value: dict[str, Any] = {"messaging_product": "whatsapp", "metadata": {"phone_number_id": NUMBER}}
    if messages:
        value["messages"] = list(messages)
    if statuses:
        value["statuses"] = list(statuses)
    document = {
        "object": "whatsapp_business_account",
        "entry": [{"id": "1", "changes": [{"field": "messages", "value": value}]}],
    }
    return _SPLITTER.delivery(
        json.dumps(document).encode(), correlation_id="c-1", traceparent=None, settle=lambda stored: None
    )


def texts(items: list[Item]) -> list[str]:
    return [item.message["text"]["body"] for item in items]


def done(item: Item, session: Session | None = None, replies: int = 0, **changes: Any) -> Completion:
    completion = Completion(
        item=item,
        place=Place.DELIVERED,
        service="rides",
        rule="keyword",
        attempts=1,
        session=session,
        replies=tuple({"type": "text", "text": {"body": f"r{number}"}} for number in range(replies)),
    )
    return replace(completion, **changes)


async def appends_get_gapless_seqs_in_order(world: World) -> None:
    first = await world.append(body(message("a"), message("b")), body(message("c")))
    second = await world.append(body(message("d")))
    assert second.first_seq == first.first_seq + 3
    items, newest = await world.journal.tail(first.first_seq - 1, 100)
    assert newest == second.first_seq
    assert [item.seq for item in items] == list(range(first.first_seq, newest + 1))
    assert texts(items) == ["a", "b", "c", "d"]


async def duplicates_are_reported_with_their_positions(world: World) -> None:
    first = await world.append(body(message("a"), message("b"), message("c")))
    result = await world.journal.append([body(message("x"), message("c")), body(message("a"))], duplicates=0)
    assert isinstance(result, Duplicates)
    assert result.positions == [1, 2]
    assert result.seqs == [first.first_seq + 2, first.first_seq]


async def a_flush_with_duplicates_writes_nothing(world: World) -> None:
    first = await world.append(body(message("a")))
    assert isinstance(
        await world.journal.append([body(message("x"), message("a"))], duplicates=7), Duplicates
    )
    assert (await world.journal.undelivered()).newest == first.first_seq
    assert await world.duplicates() == 0
    again = await world.append(body(message("x")))
    assert again.first_seq == first.first_seq + 1


async def duplicates_are_tallied_with_the_flush(world: World) -> None:
    first = await world.append(body(message("a")), duplicates=2)
    assert await world.duplicates() == 2
    await world.append(duplicates=3)
    assert await world.duplicates() == 5
    assert (await world.journal.undelivered()).newest == first.first_seq


async def items_that_no_session_takes_have_a_seq_and_no_key(world: World) -> None:
    status = {"id": "wamid.out", "status": "sent", "timestamp": "1893456000", "recipient_id": "1"}
    result = await world.append(body(message("a"), statuses=(status,)), body(message("b")))
    assert [key is None for key in result.session_keys] == [False, True, False]
    items, newest = await world.journal.tail(result.first_seq - 1, 100)
    assert [item.seq - result.first_seq for item in items] == [0, 2]
    assert newest == result.first_seq + 2
    assert await world.undelivered() == [result.first_seq, result.first_seq + 2]


async def session_keys_are_stable(world: World) -> None:
    first = await world.append(body(message("a", "1"), message("b", "2"), message("c", "1")))
    second = await world.append(body(message("d", "2"), message("e", "1")))
    one, two, again = first.session_keys
    assert one == again != two
    assert second.session_keys == [two, one]


async def a_second_name_becomes_an_alias(world: World) -> None:
    first = await world.append(body(message("a", "1")))
    second = await world.append(body(message("b", "1", user_id="RW.1")))
    third = await world.append(body(message("c", None, user_id="RW.1")))
    assert first.session_keys == second.session_keys == third.session_keys
    assert [result.joins for result in (first, second, third)] == [{}, {}, {}]


async def a_second_name_becomes_an_alias_within_one_flush(world: World) -> None:
    result = await world.append(
        body(message("a", "1", user_id="RW.1"), message("b", None, user_id="RW.1"), message("c", "1"))
    )
    assert len(set(result.session_keys)) == 1
    assert not result.joins


async def two_known_names_join_with_the_older_key(world: World) -> None:
    a = await world.append(body(message("a", "1")))
    b = await world.append(body(message("b", None, user_id="RW.1")))
    result = await world.append(
        body(
            message("c", None, user_id="RW.1"),
            message("d", "1", user_id="RW.1"),
            message("e", None, user_id="RW.1"),
        )
    )
    [key_a], [key_b] = a.session_keys, b.session_keys
    assert key_a != key_b
    assert result.session_keys == [key_b, key_a, key_a]
    assert result.joins == {1: key_b}
    items = await world.read(*range(result.first_seq, result.first_seq + 3))
    assert [(i.session_key, i.joins) for i in items] == [(key_b, None), (key_a, key_b), (key_a, None)]
    later = await world.append(body(message("f", "1", user_id="RW.1")))
    assert not later.joins


async def a_join_keeps_the_older_key_whichever_name_comes_first(world: World) -> None:
    older = await world.append(body(message("a", None, user_id="RW.1")))
    younger = await world.append(body(message("b", "1")))
    result = await world.append(body(message("c", "1", user_id="RW.1")))
    assert result.session_keys == older.session_keys
    assert result.joins == {0: younger.session_keys[0]}


async def undelivered_is_what_is_not_completed(world: World) -> None:
    first = (await world.append(body(message("a", "1"), message("b", "2"), message("c", "1")))).first_seq
    items = await world.read(first, first + 1, first + 2)
    assert await world.undelivered() == [first, first + 1, first + 2]
    await world.complete(done(items[1]))
    backlog = await world.journal.undelivered()
    assert backlog.items == [(first, items[0].session_key), (first + 2, items[2].session_key)]
    assert backlog.newest == first + 2
    await world.complete(done(items[0]), done(items[2]))
    assert (await world.journal.undelivered()).items == []
    assert (await world.journal.undelivered()).newest == first + 2


async def tail_reads_on_from_where_it_was(world: World) -> None:
    first = (await world.append(*(body(message(name)) for name in "abcde"))).first_seq
    seen: list[str] = []
    after = first - 1
    while True:
        items, looked = await world.journal.tail(after, 2)
        if looked == after:
            break
        assert looked <= after + 2
        seen += texts(items)
        after = looked
    assert seen == list("abcde")
    assert items == []


async def read_gives_what_is_there_in_seq_order(world: World) -> None:
    result = await world.append(body(message("a", "1"), message("b", "2")))
    first = result.first_seq
    items = await world.read(first + 1, first + 999, first)
    assert [item.seq for item in items] == [first, first + 1]
    assert [item.session_key for item in items] == result.session_keys
    assert items[0].wa_id == "1"
    assert items[0].phone_number_id == NUMBER
    assert items[0].message_id == "wamid.a"
    assert items[0].received_at == result.received_at
    assert items[0].correlation_id == "c-1"
    assert not items[0].redelivered
    assert await world.read() == []


async def a_repeated_complete_is_harmless(world: World) -> None:
    [item] = await world.read((await world.append(body(message("a")))).first_seq)
    letter = DeadLetter(status="pending", resolution=None, error="down", retry_in=60.0)
    for _ in range(2):
        await world.complete(done(item, replies=2, place=Place.DEAD_LETTER, dead_letter=letter))
    await world.complete(done(item, replies=2))
    assert await world.outcomes() == 1
    assert await world.outbox() == 2


async def a_wrong_epoch_loses_the_lease_and_changes_nothing(world: World) -> None:
    [item] = await world.read((await world.append(body(message("a")))).first_seq)
    session = Session(key=item.session_key, phone_number_id=NUMBER, wa_id=item.wa_id, version=1)
    await world.end_epoch()
    with pytest.raises(LeaseLost):
        await world.complete(done(item, session, replies=1), low_water=item.seq + 1)
    assert await world.undelivered() == [item.seq]
    assert await world.outcomes() == await world.outbox() == 0
    assert await world.journal.load_sessions([item.session_key]) == {}


async def load_sessions_gives_what_complete_stored(world: World) -> None:
    [item] = await world.read((await world.append(body(message("a")))).first_seq)
    session = Session(
        key=item.session_key,
        phone_number_id=NUMBER,
        wa_id=item.wa_id,
        user_id="RW.1",
        active_service="rides",
        state={"step": 2, "text": "nul \0 and \ud800"},
        version=(1 << 40) + 5,
    )
    await world.complete(done(item, session))
    stored = await world.journal.load_sessions([item.session_key, "nobody"])
    assert list(stored) == [item.session_key]
    found, touched = stored[item.session_key]
    assert replace(found, state={}) == replace(session, state={})
    assert found.state["step"] == 2
    assert touched >= item.received_at
    assert await world.journal.load_sessions([]) == {}


async def of_several_changes_in_a_batch_the_last_counts(world: World) -> None:
    first = (await world.append(body(message("a"), message("b")))).first_seq
    a, b = await world.read(first, first + 1)
    session = Session(key=a.session_key, phone_number_id=NUMBER, version=1, active_service="rides")
    await world.complete(done(a, session), done(b, replace(session, version=2, active_service="jobs")))
    found, _ = (await world.journal.load_sessions([a.session_key]))[a.session_key]
    assert (found.version, found.active_service) == (2, "jobs")


async def an_older_session_version_does_not_overwrite_a_newer_one(world: World) -> None:
    first = (await world.append(body(message("a"), message("b")))).first_seq
    a, b = await world.read(first, first + 1)
    session = Session(key=a.session_key, phone_number_id=NUMBER, version=9, active_service="rides")
    await world.complete(done(b, session))
    await world.complete(done(a, replace(session, version=8, active_service="jobs")))
    found, _ = (await world.journal.load_sessions([a.session_key]))[a.session_key]
    assert (found.version, found.active_service) == (9, "rides")


async def stragglers_below_the_low_water_mark_are_still_undelivered(world: World) -> None:
    first = (await world.append(*(body(message(name)) for name in "abcd"))).first_seq
    a, b, _, d = await world.read(*range(first, first + 4))
    await world.complete(done(b), low_water=first + 3, stragglers=(first, first + 2))
    assert await world.undelivered() == [first, first + 2, first + 3]
    await world.complete(done(a), done(d), low_water=first + 4, stragglers=(first,))
    assert await world.undelivered() == [first + 2]


async def the_low_water_mark_never_falls(world: World) -> None:
    first = (await world.append(body(message("a"), message("b")))).first_seq
    a, _ = await world.read(first, first + 1)
    await world.complete(done(a), low_water=first + 1)
    await world.complete(low_water=1)
    assert await world.undelivered() == [first + 1]


async def a_dead_letter_is_claimed_when_it_is_due_and_once(world: World) -> None:
    await world.letter("later", "1", retry_in=3_600.0)
    item = await world.letter("due", "2")
    [replay] = await world.claim()
    assert replay.dead_letter is not None
    assert replay == replace(
        item, dead_letter=replay.dead_letter, domain="rides", redelivered=True, overtaken=True
    )
    assert await world.claim() == []


async def the_oldest_dead_letters_are_claimed_first(world: World) -> None:
    for name in "abcde":
        await world.letter(name, name)
    claims = [texts(await world.claim(limit=2)) for _ in range(4)]
    assert claims == [["a", "b"], ["c", "d"], ["e"], []]


async def of_a_conversation_and_service_one_dead_letter_is_out(world: World) -> None:
    for name in ("a1", "a2", "b1"):
        await world.letter(name, name[0])
    await world.letter("a3", "a", service="jobs")
    a1, b1 = await world.claim("rides")
    assert texts([a1, b1]) == ["a1", "b1"]
    assert texts(await world.claim("rides", "jobs")) == ["a3"]
    await world.complete(done(b1))
    assert await world.claim() == []
    await world.complete(done(a1))
    assert texts(await world.claim()) == ["a2"]


async def a_dead_letter_waits_for_an_older_one_of_its_pair(world: World) -> None:
    await world.letter("a1", "a", retry_in=3_600.0)
    await world.letter("a2", "a")
    await world.letter("a3", "a", service="jobs")
    await world.letter("b1", "b")
    assert texts(await world.claim("rides", "jobs")) == ["a3", "b1"]


async def dead_letters_are_claimed_for_the_services_that_are_named(world: World) -> None:
    await world.letter("a", "1")
    await world.letter("b", "2", service="jobs")
    assert await world.claim("rides", others=True) == []  # nobody asked for it
    assert texts(await world.claim("rides", "mail")) == ["a"]
    assert texts(await world.claim("jobs")) == ["b"]


async def a_dead_letter_without_a_service_is_due_when_there_is_one(world: World) -> None:
    await world.letter("a", retry_in=None, resolution="no_service")
    assert await world.claim("jobs") == await world.claim("jobs", others=True) == []
    assert texts(await world.claim("rides")) == ["a"]


async def released_dead_letters_are_claimed_again(world: World) -> None:
    for name in "abc":
        await world.letter(name, name)
    claimed = await world.claim()
    assert len(claimed) == 3
    await world.journal.release_dead_letters(world.epoch)
    assert await world.claim() == claimed


async def dead_letters_that_are_kept_are_not_released(world: World) -> None:
    for name in "abc":
        await world.letter(name, name)
    a, b, c = await world.claim()
    assert b.dead_letter is not None
    await world.journal.release_dead_letters(world.epoch, keep=[b.dead_letter])
    assert await world.claim() == [a, c]
    await world.complete(done(b))
    await world.journal.release_dead_letters(world.epoch)
    assert await world.claim() == [a, c]


async def a_replay_that_was_released_changes_nothing(world: World) -> None:
    item = await world.letter("a")
    claimed = await world.claim()
    await world.journal.release_dead_letters(world.epoch)
    session = Session(key=item.session_key, phone_number_id=NUMBER, version=1)
    await world.complete(done(claimed[0], session, replies=1))
    assert await world.outbox() == 0
    assert await world.journal.load_sessions([item.session_key]) == {}
    assert await world.claim() == claimed


async def a_repeated_complete_of_a_replay_is_harmless(world: World) -> None:
    item = await world.letter("a")
    [replay] = await world.claim()
    session = Session(key=item.session_key, phone_number_id=NUMBER, version=1)
    for _ in range(2):
        await world.complete(done(replay, session, replies=2))
    assert await world.outbox() == 2
    assert await world.outcomes() == 1
    await world.journal.release_dead_letters(world.epoch)
    assert await world.claim() == []


async def only_retries_that_were_not_put_off_are_counted(world: World) -> None:
    await world.letter("a")
    counted = []
    for counts in (False, True, True, False, True):
        [replay] = await world.claim()
        counted.append(replay.retries)
        again = DeadLetter(status="pending", resolution=None, error="?", retry_in=0.0, counted=counts)
        await world.complete(done(replay, place=Place.DEAD_LETTER, dead_letter=again))
    assert counted == [0, 0, 1, 2, 2]
    assert [replay.retries for replay in await world.claim()] == [3]


async def a_replay_that_failed_is_due_again_when_it_says_so_or_never(world: World) -> None:
    for name in "ab":
        await world.letter(name, name)
    a, b = await world.claim()
    later = DeadLetter(status="pending", resolution=None, error="down", retry_in=3_600.0)
    never = DeadLetter(status="failed", resolution="rejected", error="no", retry_in=None)
    await world.complete(
        done(a, place=Place.DEAD_LETTER, dead_letter=later),
        done(b, place=Place.REJECTED, dead_letter=never),
    )
    assert await world.claim() == []
    next_due = await world.next_due("rides")
    assert next_due is not None
    assert 3_000 < next_due <= 3_600


async def pending_dead_letters_expire(world: World) -> None:
    """Not those that are out, nor those that wait for a service and not for a time."""
    for name in "abc":
        await world.letter(name, name)
    await world.letter("d", "d", retry_in=3_600.0)
    await world.letter("e", "e", service="jobs", retry_in=None, resolution="no_service")
    assert texts(await world.claim(limit=1)) == ["a"]
    assert await world.journal.expire_dead_letters(world.epoch, timedelta(hours=1)) == 0
    assert await world.journal.expire_dead_letters(world.epoch, timedelta(seconds=-1)) == 3
    assert await world.journal.expire_dead_letters(world.epoch, timedelta(seconds=-1)) == 0
    assert await world.next_due("rides") is None
    await world.journal.release_dead_letters(world.epoch)
    assert texts(await world.claim("rides", "jobs")) == ["a", "e"]


async def the_record_of_a_run_tells_when_the_next_dead_letter_is_due(world: World) -> None:
    assert await world.next_due("rides") is None
    await world.letter("a1", "a", retry_in=7_200.0)
    await world.letter("a2", "a", retry_in=60.0)  # waits for a1
    await world.letter("b1", "b", service="jobs", retry_in=600.0)
    for services, due in ((("rides",), 7_200), (("rides", "jobs"), 600), (("jobs",), 600)):
        told = await world.next_due(*services)
        assert told is not None
        assert due - 60 < told <= due
    assert await world.next_due("mail") is None


async def the_record_of_a_run_tells_of_one_that_was_due(world: World) -> None:
    await world.letter("a", retry_in=-60.0)
    told = await world.next_due("rides")
    assert told is not None
    assert told <= -60
    [out] = await world.claim()
    assert await world.next_due("rides") is None
    await world.complete(done(out))
    assert await world.next_due("rides") is None


async def one_that_waited_for_a_service_is_due_now(world: World) -> None:
    await world.letter("a", "1", retry_in=3_600.0)
    await world.letter("b", "2", retry_in=None, resolution="no_service")
    assert await world.next_due("rides") == 0
    assert await world.next_due("jobs") is None
    await world.claim()
    told = await world.next_due("rides")
    assert told is not None
    assert told > 3_000


async def the_record_of_a_run_tells_each_service_apart(world: World) -> None:
    await world.letter("a", "1", retry_in=3_600.0)
    await world.letter("b", "2", service="jobs", retry_in=-60.0)
    await world.deferred("c", "3")
    due = await world.journal.log_retry_run(
        world.epoch, took=0.0, processed=0, failed=0, error=None, services=["rides", "jobs"]
    )
    assert due.keys() == {"rides", "jobs"}
    assert due["rides"] == 0
    assert due["jobs"] <= -60


async def what_was_deferred_is_claimed_in_its_turn(world: World) -> None:
    for name in ("a1", "b1", "a2"):
        await world.deferred(name, name[0])
    first, other = await world.claim()
    assert texts([first, other]) == ["a1", "b1"]
    assert (first.deferred, first.overtaken, first.redelivered) == (True, False, False)
    assert await world.claim() == []
    await world.complete(done(first))
    assert texts(await world.claim()) == ["a2"]


async def what_was_deferred_goes_past_a_letter_that_is_not_due_unless_that_keeps_the_order(
    world: World,
) -> None:
    await world.letter("a1", "a", retry_in=3_600.0)
    await world.deferred("a2", "a")
    await world.letter("b1", "b", retry_in=3_600.0, keeps_order=True)
    await world.deferred("b2", "b")
    assert texts(await world.claim()) == ["a2"]
    told = await world.next_due("rides")
    assert told is not None
    assert told > 3_000


async def of_the_oldest_a_single_one_is_the_one_that_was_attempted_least(world: World) -> None:
    for name in "abc":
        await world.deferred(name, name)
    for _ in range(2):
        order = []
        for _ in "abc":
            [one] = await world.claim(limit=1)
            order += texts([one])
            again = DeadLetter(
                status="pending", resolution="deferred", error="?", retry_in=0.0, keeps_order=True
            )
            await world.complete(replace(done(one, place=Place.DEFERRED, dead_letter=again), attempts=1))
        assert order == ["a", "b", "c"]


async def the_first_delivery_of_what_was_deferred_is_no_retry(world: World) -> None:
    await world.deferred("a")
    [first] = await world.claim()
    due = DeadLetter(status="pending", resolution=None, error="down", retry_in=0.0)
    await world.complete(done(first, place=Place.DEAD_LETTER, dead_letter=due))
    [retry] = await world.claim()
    assert (retry.deferred, retry.overtaken, retry.redelivered, retry.retries) == (False, True, True, 0)


async def what_was_released_may_have_arrived(world: World) -> None:
    await world.deferred("a")
    [item] = await world.claim()
    assert not item.redelivered
    await world.journal.release_dead_letters(world.epoch)
    [item] = await world.claim()
    assert item.redelivered


async def pairs_are_held_by_what_keeps_the_order_until_it_has_ended(world: World) -> None:
    a = await world.deferred("a", "1")
    await world.letter("b", "2")
    c = await world.letter("c", "3", service="jobs", keeps_order=True)
    assert sorted(await world.journal.held_pairs()) == [(a.session_key, "rides"), (c.session_key, "jobs")]
    [a, _] = await world.claim("rides")
    [c] = await world.claim("jobs")
    assert len(await world.journal.held_pairs()) == 2
    never = DeadLetter(status="failed", resolution="exhausted", error="no", retry_in=None)
    await world.complete(done(a), done(c, service="jobs", place=Place.DEAD_LETTER, dead_letter=never))
    assert await world.journal.held_pairs() == []


async def what_was_deferred_expires(world: World) -> None:
    await world.deferred("a")
    assert await world.journal.expire_dead_letters(world.epoch, timedelta(seconds=-1)) == 1
    assert await world.claim() == []
    assert await world.journal.held_pairs() == []


async def dead_letters_are_for_the_epoch_in_force(world: World) -> None:
    await world.letter("a")
    await world.end_epoch()
    journal = world.journal
    with pytest.raises(LeaseLost):
        await journal.release_dead_letters(world.epoch)
    with pytest.raises(LeaseLost):
        await journal.expire_dead_letters(world.epoch, timedelta(seconds=-1))
    with pytest.raises(LeaseLost):
        await world.claim()
    with pytest.raises(LeaseLost):
        await world.next_due("rides")
    [replay] = await world.claim(epoch=world.epoch + 1)
    with pytest.raises(LeaseLost):
        await world.complete(done(replay, replies=1))
    assert await world.outbox() == 0


async def an_item_that_is_twice_in_a_batch_is_recorded_once(world: World) -> None:
    [item] = await world.read((await world.append(body(message("a")))).first_seq)
    [other] = await world.read((await world.append(body(message("b", "2")))).first_seq)
    await world.complete(done(item, replies=1), done(item, replies=1), done(other, replies=1))
    assert await world.outcomes() == 2
    assert await world.outbox() == 2
    assert await world.undelivered() == []


CONTRACT: list[Callable[[World], Awaitable[None]]] = [
    appends_get_gapless_seqs_in_order,
    an_item_that_is_twice_in_a_batch_is_recorded_once,
    duplicates_are_reported_with_their_positions,
    a_flush_with_duplicates_writes_nothing,
    duplicates_are_tallied_with_the_flush,
    items_that_no_session_takes_have_a_seq_and_no_key,
    session_keys_are_stable,
    a_second_name_becomes_an_alias,
    a_second_name_becomes_an_alias_within_one_flush,
    two_known_names_join_with_the_older_key,
    a_join_keeps_the_older_key_whichever_name_comes_first,
    undelivered_is_what_is_not_completed,
    tail_reads_on_from_where_it_was,
    read_gives_what_is_there_in_seq_order,
    a_repeated_complete_is_harmless,
    a_wrong_epoch_loses_the_lease_and_changes_nothing,
    load_sessions_gives_what_complete_stored,
    of_several_changes_in_a_batch_the_last_counts,
    an_older_session_version_does_not_overwrite_a_newer_one,
    stragglers_below_the_low_water_mark_are_still_undelivered,
    the_low_water_mark_never_falls,
    a_dead_letter_is_claimed_when_it_is_due_and_once,
    the_oldest_dead_letters_are_claimed_first,
    of_a_conversation_and_service_one_dead_letter_is_out,
    a_dead_letter_waits_for_an_older_one_of_its_pair,
    dead_letters_are_claimed_for_the_services_that_are_named,
    a_dead_letter_without_a_service_is_due_when_there_is_one,
    released_dead_letters_are_claimed_again,
    dead_letters_that_are_kept_are_not_released,
    a_replay_that_was_released_changes_nothing,
    a_repeated_complete_of_a_replay_is_harmless,
    only_retries_that_were_not_put_off_are_counted,
    a_replay_that_failed_is_due_again_when_it_says_so_or_never,
    pending_dead_letters_expire,
    the_record_of_a_run_tells_when_the_next_dead_letter_is_due,
    the_record_of_a_run_tells_of_one_that_was_due,
    one_that_waited_for_a_service_is_due_now,
    the_record_of_a_run_tells_each_service_apart,
    what_was_deferred_is_claimed_in_its_turn,
    what_was_deferred_goes_past_a_letter_that_is_not_due_unless_that_keeps_the_order,
    of_the_oldest_a_single_one_is_the_one_that_was_attempted_least,
    the_first_delivery_of_what_was_deferred_is_no_retry,
    what_was_released_may_have_arrived,
    pairs_are_held_by_what_keeps_the_order_until_it_has_ended,
    what_was_deferred_expires,
    dead_letters_are_for_the_epoch_in_force,
]
