"""What every outbox promises: written once, run on the double in memory and on Postgres."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import pytest

from actors.errors import LeaseLost
from actors.messages import Later, OutboundMessage, Refused, SendOutcome, SendRecord, Sent, Unsent
from actors.ports import Outbox


@dataclass(frozen=True)
class Row:
    """How one reply stands in the outbox."""

    status: str
    attempts: int
    message_id: str | None
    error: str | None


@dataclass
class World:
    """One outbox under test. `put` commits replies to somebody, each text one; `wait` lets seconds pass;
    `rows` are all replies by their text."""

    outbox: Outbox
    epoch: int
    put: Callable[..., Awaitable[None]]
    wait: Callable[[float], None]
    end_epoch: Callable[[], Awaitable[None]]
    rows: Callable[[], Awaitable[dict[str, Row]]]

    async def unsent(self, conversations: int = 10, of_each: int = 10, busy: Sequence[str] = ()) -> Unsent:
        return await self.outbox.unsent(conversations=conversations, of_each=of_each, busy=busy)

    async def record(self, *records: SendRecord) -> None:
        await self.outbox.record(records, epoch=self.epoch)


def texts(messages: list[OutboundMessage]) -> list[str]:
    return [message.message["text"]["body"] for message in messages]


def ended(message: OutboundMessage, outcome: SendOutcome, retry_in: float | None = None) -> SendRecord:
    return SendRecord(message=message, outcome=outcome, retry_in=retry_in)


async def replies_come_in_the_order_of_their_commits(world: World) -> None:
    await world.put("a", "a1", "a2")
    await world.put("b", "b1")
    await world.put("a", "a3")
    found = await world.unsent()
    assert texts(found.messages) == ["a1", "a2", "b1", "a3"]
    assert found.next_in is None
    first = found.messages[0]
    assert (first.session_key, first.recipient) == (f"{first.phone_number_id}:a", "a")
    assert first.attempts == 0
    assert len({message.reference for message in found.messages}) == 4


async def a_page_has_so_many_conversations_and_so_many_of_each(world: World) -> None:
    await world.put("a", "a1", "a2", "a3")
    await world.put("b", "b1")
    await world.put("c", "c1")
    assert texts((await world.unsent(conversations=2, of_each=2)).messages) == ["a1", "a2", "b1"]


async def who_is_busy_is_left_out(world: World) -> None:
    await world.put("a", "a1")
    await world.put("b", "b1")
    busy = (await world.unsent()).messages[0].session_key
    assert texts((await world.unsent(conversations=1, busy=[busy])).messages) == ["b1"]


async def what_was_sent_or_refused_is_gone(world: World) -> None:
    await world.put("a", "a1", "a2", "a3")
    one, two, _ = (await world.unsent()).messages
    await world.record(ended(one, Sent("wamid.1")), ended(two, Refused("no")))
    assert texts((await world.unsent()).messages) == ["a3"]
    rows = await world.rows()
    assert rows["a1"] == Row("sent", 1, "wamid.1", None)
    assert rows["a2"] == Row("failed", 1, None, "no")
    assert rows["a3"] == Row("pending", 0, None, None)


async def what_has_to_wait_holds_back_what_is_behind_it(world: World) -> None:
    await world.put("a", "a1", "a2")
    await world.put("b", "b1")
    [one, _, _] = (await world.unsent()).messages
    await world.record(ended(one, Later("busy"), retry_in=60.0))
    found = await world.unsent()
    assert texts(found.messages) == ["b1"]
    assert found.next_in is not None
    assert 0 < found.next_in <= 60
    assert (await world.rows())["a1"] == Row("pending", 1, None, "busy")
    world.wait(61.0)
    found = await world.unsent()
    assert texts(found.messages) == ["a1", "a2", "b1"]
    assert found.messages[0].attempts == 1
    assert found.next_in is None


async def repeating_a_record_is_harmless(world: World) -> None:
    await world.put("a", "a1")
    [one] = (await world.unsent()).messages
    await world.record(ended(one, Sent("wamid.1")))
    await world.record(ended(one, Later("late"), retry_in=1.0))
    assert (await world.rows())["a1"] == Row("sent", 1, "wamid.1", None)


async def an_epoch_that_is_over_records_nothing(world: World) -> None:
    await world.put("a", "a1")
    [one] = (await world.unsent()).messages
    await world.end_epoch()
    with pytest.raises(LeaseLost):
        await world.record(ended(one, Sent("wamid.1")))
    assert (await world.rows())["a1"] == Row("pending", 0, None, None)


CONTRACT = [
    replies_come_in_the_order_of_their_commits,
    a_page_has_so_many_conversations_and_so_many_of_each,
    who_is_busy_is_left_out,
    what_was_sent_or_refused_is_gone,
    what_has_to_wait_holds_back_what_is_behind_it,
    repeating_a_record_is_harmless,
    an_epoch_that_is_over_records_nothing,
]
