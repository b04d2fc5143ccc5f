"""Services that attach: credit bounds what is under way, a conversation keeps its connection, a lost one
loses no delivery, and whatever a service says is understood or refused."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import doubles
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from tables import each
from texts import texts

from actors.messages import Ack, Envelope, Outcome, Reject, Reply, Retry, Session, SessionChange
from actors.ports import Unreadable
from actors.service import Deliver, Delivered
from router.delivery.attached import MAX_CREDIT, AttachedService, Attachment, BadFrame
from router.delivery.contract import answer_of, as_object, envelope_of, read_object

Clock = trio.testing.MockClock


def envelope(number: int = 1, key: str = "100:1", **changes: Any) -> Envelope:
    return Envelope(
        **{
            "id": f"msg_{number:032x}",
            "message_id": f"wamid.{number}",
            "domain": "rides",
            "session": Session(key=key, phone_number_id="100", wa_id="1", state={"step": 1}, version=7),
            "message": {"type": "text", "text": {"body": "taxi"}},
            "received_at": datetime(2026, 3, 4, tzinfo=UTC),
            "correlation_id": "c-1",
            **changes,
        }
    )


def service() -> AttachedService:
    return AttachedService(
        "rides", sha256(b"token").hexdigest(), known_domain=lambda name: name in ("rides", "jobs")
    )


class Peer:
    """A service's end of one connection."""

    def __init__(self, service: AttachedService, credit: int = 0) -> None:
        self.service = service
        self.got: list[dict[str, Any]] = []
        self.attachment: Attachment = service.attach(lambda frame: self.got.append(json.loads(frame)))
        if credit:
            self.say(type="credit", credit=credit)

    def say(self, **said: Any) -> None:
        self.attachment.receive(json.dumps(said))

    def ack(self, number: int = 1, **answer: Any) -> None:
        self.say(type="ack", id=f"msg_{number:032x}", answer=answer)

    def leave(self) -> None:
        self.service.detach(self.attachment)

    @property
    def ids(self) -> list[int]:
        return [int(frame["delivery"]["id"][4:], 16) for frame in self.got]


async def attempted(service: AttachedService, *envelopes: Envelope) -> list[Outcome | Unreadable]:
    outcomes: dict[int, Outcome | Unreadable] = {}

    async def one(number: int, envelope: Envelope) -> None:
        outcomes[number] = await service.attempt(envelope)

    async with trio.open_nursery() as nursery:
        for number, each_one in enumerate(envelopes):
            nursery.start_soon(one, number, each_one)
    return [outcomes[number] for number in range(len(envelopes))]


async def test_a_delivery_is_answered(autojump_clock: Clock) -> None:
    rides = service()
    peer = Peer(rides, credit=1)
    async with trio.open_nursery() as nursery:

        async def answer() -> None:
            await trio.sleep(0.1)
            peer.ack(replies=[{"text": "on its way"}], session={"state": {"step": 2}})

        nursery.start_soon(answer)
        assert await attempted(rides, envelope()) == [
            Ack((Reply("on its way"),), SessionChange(state={"step": 2}))
        ]
    assert envelope_of(peer.got[0]["delivery"]) == envelope()


@each(
    ("said", "outcome"),
    [
        ({"type": "retry"}, Retry(reason="retry")),
        ({"type": "retry", "after": 5, "reason": "busy"}, Retry(5.0, "busy")),
        ({"type": "retry", "after": None, "reason": 3}, Retry(reason="retry")),
        ({"type": "reject", "reason": "x" * 500}, Reject("x" * 200)),
        ({"type": "reject"}, Reject("reject")),
        ({"type": "ack"}, Ack()),
        ({"type": "ack", "answer": None}, Ack()),
        ({"type": "ack", "answer": []}, Ack()),
        ({"type": "ack", "answer": [1]}, Unreadable("the answer is not an object")),
        ({"type": "ack", "answer": {"replies": 1}}, Unreadable("replies is not a list")),
    ],
)
async def test_what_it_says_is_understood(said: dict[str, Any], outcome: Outcome | Unreadable) -> None:
    rides = service()
    peer = Peer(rides, credit=1)
    async with trio.open_nursery() as nursery:

        async def answer() -> None:
            await trio.testing.wait_all_tasks_blocked()
            peer.say(**said, id=envelope().id)

        nursery.start_soon(answer)
        assert await attempted(rides, envelope()) == [outcome]


@each("after", [-1, 10**9, True, "5", []])
async def test_a_time_that_is_none_is_a_failed_attempt(after: Any) -> None:
    rides = service()
    peer = Peer(rides, credit=1)
    async with trio.open_nursery() as nursery:

        async def answer() -> None:
            await trio.testing.wait_all_tasks_blocked()
            peer.say(type="retry", id=envelope().id, after=after)

        nursery.start_soon(answer)
        [outcome] = await attempted(rides, envelope())
    assert isinstance(outcome, Retry)
    assert outcome.after is None
    assert "no number of seconds" in outcome.reason


@each(
    "frame",
    [
        "", "nothing", "[]", "3", "null", "{}", '{"type": "hello"}', '{"type": "ack"}',
        '{"type": "ack", "id": 3}',
        '{"type": "credit"}', '{"type": "credit", "credit": 0}', '{"type": "credit", "credit": true}',
        '{"type": "credit", "credit": "8"}', '{"type": "credit", "credit": 1.5}', b"\xff\xfe", "[" * 2_000,
    ],
)  # fmt: skip
def test_anything_else_is_refused(frame: str | bytes) -> None:
    with pytest.raises(BadFrame):
        Peer(service()).attachment.receive(frame)


@given(st.one_of(texts(max_size=40), st.binary(max_size=40)))
def test_whatever_comes_is_a_frame_or_is_refused(frame: str | bytes) -> None:
    with suppress(BadFrame):
        Peer(service()).attachment.receive(frame)


async def test_no_more_is_under_way_than_there_is_credit_for() -> None:
    rides = service()
    peer = Peer(rides, credit=2)
    async with trio.open_nursery() as nursery:
        for number in range(1, 6):
            nursery.start_soon(rides.attempt, envelope(number, f"100:{number}"))
        await trio.testing.wait_all_tasks_blocked()
        assert len(peer.ids) == 2
        peer.ack(peer.ids[0])
        await trio.testing.wait_all_tasks_blocked()
        assert len(peer.ids) == 2
        peer.say(type="credit", credit=10**9)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(peer.ids) == [1, 2, 3, 4, 5]
        assert peer.attachment.free <= MAX_CREDIT
        for number in range(1, 6):
            peer.ack(number)


async def test_a_conversation_keeps_its_connection_and_others_go_where_there_is_room() -> None:
    rides = service()
    one, two = Peer(rides, credit=4), Peer(rides, credit=4)
    for number in range(1, 9):
        key = f"100:{number % 2}"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rides.attempt, envelope(number, key))
            await trio.testing.wait_all_tasks_blocked()
            for peer in (one, two):
                if number in peer.ids:
                    peer.ack(number)
    assert {frozenset(one.ids), frozenset(two.ids)} == {frozenset({1, 3, 5, 7}), frozenset({2, 4, 6, 8})}


async def test_what_was_under_way_on_a_lost_connection_is_to_be_tried_again() -> None:
    rides = service()
    one = Peer(rides, credit=1)
    outcomes: list[Any] = []

    async def attempt() -> None:
        outcomes.append(await rides.attempt(envelope()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt)
        await trio.testing.wait_all_tasks_blocked()
        two = Peer(rides, credit=1)
        one.leave()
    assert outcomes == [Retry(reason="the service's connection was closed")]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt)
        await trio.testing.wait_all_tasks_blocked()
        two.ack()
    assert outcomes[-1] == Ack()


async def test_with_nobody_attached_an_attempt_waits_a_moment_for_one(
    autojump_clock: Clock,
) -> None:
    rides = service()
    assert await rides.attempt(envelope()) == Retry(reason="the service is not attached")
    async with trio.open_nursery() as nursery:

        async def come() -> None:
            await trio.sleep(0.5)
            peer = Peer(rides, credit=1)
            await trio.sleep(0.1)
            peer.ack()

        nursery.start_soon(come)
        assert await rides.attempt(envelope()) == Ack()


async def test_lanes_take_nothing_that_there_is_no_credit_for(autojump_clock: Clock) -> None:
    """Eight lanes, credit for one, a second each: nobody's time runs out while it waits for its turn."""
    rides = service()
    peer = Peer(rides, credit=1)
    office = doubles.service("rides", rides.open_lane(), lanes=8, waiting=20, timeout=4.0, deadline=15.0)
    results: list[Any] = []

    async def work() -> None:
        done = 0
        while done < 20:
            await trio.sleep(0.01)
            for number in peer.ids[done:]:
                await trio.sleep(1.0)
                peer.ack(number)
                peer.say(type="credit", credit=1)
                done += 1

    async def deliver(number: int) -> None:
        one = envelope(number, f"100:{number}")
        results.append(await office.address.ask_nowait(lambda promise: Deliver(one, promise)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(office.run)
        async with trio.open_nursery() as asking:
            asking.start_soon(work)
            for number in range(1, 21):
                asking.start_soon(deliver, number)
        office.drain()
    assert results == [Delivered(Ack(), 1)] * 20


async def test_lanes_that_wait_for_credit_do_not_hold_up_a_drain(
    autojump_clock: Clock,
) -> None:
    rides = service()
    office = doubles.service("rides", rides.open_lane(), lanes=8)
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(office.run)
            await trio.sleep(0.5)
            office.drain()


async def test_a_connection_that_hangs_loses_its_conversations(
    autojump_clock: Clock,
) -> None:
    rides = service()
    one, two = Peer(rides, credit=2), Peer(rides, credit=1)
    with trio.move_on_after(4):
        await rides.attempt(envelope())
    assert (one.ids, two.ids) == ([1], [])
    one.attachment.free = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rides.attempt, envelope(attempt=2))
        await trio.sleep(0.1)
        assert two.ids == [1]
        two.ack()
    assert await rides.attempt(envelope(2)) == Retry(1.0, "the service takes no more at the moment")


async def test_an_answer_to_an_attempt_that_was_given_up_is_nobodys() -> None:
    rides = service()
    peer = Peer(rides, credit=2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rides.attempt, envelope())
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    peer.ack()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rides.attempt, envelope(attempt=2))
        await trio.testing.wait_all_tasks_blocked()
        assert [frame["delivery"]["attempt"] for frame in peer.got] == [1, 2]
        peer.ack()


def test_the_token_is_the_whole_of_it() -> None:
    rides = service()
    assert rides.is_authorized("token")
    assert not any(rides.is_authorized(wrong) for wrong in ("", "tok", "tokens", "TOKEN", "tokén", "\ud800"))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | texts(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(texts(max_size=4), _JSON), st.booleans(), st.integers(1, 9))
def test_an_envelope_comes_out_as_it_went_in(message: dict[str, Any], flag: bool, number: int) -> None:
    sent = envelope(number, message=message, redelivered=flag, replay=not flag, attempt=number)
    assert envelope_of(json.loads(json.dumps(as_object(sent)))) == sent


@each("delivery", [None, {}, [], {"version": 2}, {**as_object(envelope()), "session": {}}, {"version": 1}])
def test_what_is_no_delivery_is_refused(delivery: Any) -> None:
    with pytest.raises(ValueError, match="delivery"):
        envelope_of(delivery)


@each(
    "ack",
    [
        Ack(),
        Ack((Reply("a"), Reply(message={"type": "image"}))),
        Ack(session=SessionChange(active_service="jobs")),
        Ack(session=SessionChange(active_service=None, state={})),
        Ack(session=SessionChange()),
    ],
)
def test_an_answer_means_what_was_returned(ack: Ack) -> None:
    read = read_object(answer_of(ack), lambda name: name == "jobs")
    assert isinstance(read, Ack)
    assert [reply.as_message() for reply in read.replies] == [reply.as_message() for reply in ack.replies]
    assert read.session == ack.session
