"""Statuses on their way to services: what is told, when it is told again, and what is given up."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest
import trio
import trio.testing
from doubles import START, Counterpart, service, virtual_now
from memory_statuses import MemoryStatuses

from actors.breaker import Trips
from actors.errors import LeaseLost
from actors.kernel import MailboxFull, Promise
from actors.messages import Envelope, Reject, Retry, Session
from actors.service import Deliver, Service
from actors.status_relay import MAX_AGE, StatusRelay

Clock = trio.testing.MockClock


class Office:
    """A relay, its queue, and two services of which `wanted` are told."""

    def __init__(self, *wanted: str, takes: float = 0.0, trips: Trips | None = None) -> None:
        self.log = MemoryStatuses(clock=virtual_now)
        self.counterparts = {name: Counterpart(takes=takes) for name in ("rides", "jobs")}
        changes = {} if trips is None else {"trips": trips}
        self.services: dict[str, Service] = {
            name: service(name, counterpart.lane, lanes=8, **changes)
            for name, counterpart in self.counterparts.items()
        }
        self.wanted = list(wanted)
        self.given_up: list[tuple[str, int]] = []
        self.unavailable = 0
        self.relay = StatusRelay(
            self.log,
            epoch=1,
            services=lambda: self.services,
            wanted=lambda: self.wanted,
            clock=virtual_now,
            on_unavailable=self._unavailable,
            given_up=lambda name, count: self.given_up.append((name, count)),
        )

    def _unavailable(self, error: Exception) -> None:
        self.unavailable += 1

    def happened(self, *statuses: str, message: str = "rpl_1", service: str = "rides") -> None:
        for status in statuses:
            self.log.happened(service, message, status)
        self.relay.wake()

    def told(self, name: str = "rides") -> list[str]:
        return [one.message["status"]["status"] for one in self.counterparts[name].seen]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        with trio.fail_after(500_000):
            async with trio.open_nursery() as nursery:
                for one in self.services.values():
                    nursery.start_soon(one.run)
                nursery.start_soon(self.relay.run)
                await trio.testing.wait_all_tasks_blocked()
                yield
                nursery.cancel_scope.cancel()

    async def settled(self, seconds: float = 0.0) -> None:
        await trio.sleep(seconds)
        await trio.testing.wait_all_tasks_blocked()


def envelope(text: str) -> Envelope:
    """A message that takes a place."""
    return Envelope(
        id=f"msg_{text}",
        message_id=None,
        domain="rides",
        session=Session(key=text, phone_number_id="100"),
        message={"type": "text", "text": {"body": text}},
        received_at=START,
        correlation_id="c",
    )


def say(office: Office, *outcomes: object) -> None:
    """What the service says to attempts at statuses, which have no text."""
    office.counterparts["rides"].script[""].extend(outcomes)


async def test_a_message_s_statuses_are_told_in_order_and_once(autojump_clock: Clock) -> None:
    office = Office("rides")
    async with office.open():
        office.happened("sent", "delivered", "read")
        await office.settled(1)
        assert office.told() == ["sent", "delivered", "read"]
        assert office.log.waiting == []
        await office.settled(100)
        assert len(office.told()) == 3


async def test_who_does_not_want_to_know_is_not_told_and_may_change_its_mind(autojump_clock: Clock) -> None:
    office = Office("rides")
    async with office.open():
        office.happened("sent", service="jobs")
        office.wanted = ["jobs"]
        office.relay.change_services()
        await office.settled(1)
        assert office.log.subscribed == ["jobs"]
        office.happened("read", service="jobs")
        office.happened("read", service="rides")
        await office.settled(1)
        assert (office.told("jobs"), office.told("rides")) == (["read"], [])


async def test_what_failed_is_told_again_later_and_says_so(autojump_clock: Clock) -> None:
    office = Office("rides")
    say(office, *(Retry() for _ in range(3)))
    async with office.open():
        office.happened("sent", "read")
        await office.settled(1)
        assert office.told() == ["sent"] * 3  # the attempts of one delivery
        await office.settled(2)
        assert office.told() == ["sent"] * 4 + ["read"]
        assert office.counterparts["rides"].seen[3].redelivered


async def test_one_that_the_service_rejects_is_done(autojump_clock: Clock) -> None:
    office = Office("rides")
    say(office, Reject("no"))
    async with office.open():
        office.happened("sent", "read")
        await office.settled(1)
        assert office.told() == ["sent", "read"]


async def test_a_service_that_is_left_alone_is_told_nothing_until_its_probe(autojump_clock: Clock) -> None:
    office = Office("rides", trips=Trips(1))
    say(office, Retry())
    async with office.open():
        office.happened("sent")
        await office.settled(0.2)
        assert office.told() == ["sent"]
        office.happened("sent", message="rpl_2")
        await office.settled(0.2)
        assert office.told() == ["sent"]
        await office.settled(20)
        assert office.told() == ["sent"] * 3
        assert office.log.waiting == []


async def test_a_few_at_a_time_so_that_messages_find_room(autojump_clock: Clock) -> None:
    office = Office("rides", takes=1.0)
    async with office.open():
        for number in range(9):
            office.happened("sent", message=f"rpl_{number}")
        await office.settled(0.5)
        assert len(office.told()) == 4
        assert office.services["rides"].room == 10
        await office.settled(3)
        assert len(office.told()) == 9


async def test_a_service_that_is_full_is_asked_again_later_and_nothing_is_written_down(
    autojump_clock: Clock,
) -> None:
    office = Office("rides", takes=100.0)
    rides = office.services["rides"]
    looks = []
    office.log.looked = lambda: looks.append(trio.current_time())
    async with office.open():
        for number in range(40):
            with contextlib.suppress(MailboxFull):
                rides.address.tell_nowait(Deliver(envelope(str(number)), Promise()))
        assert rides.room == 0
        office.happened("sent")
        await office.settled(3)
        assert len(looks) <= 1
        assert [news.attempts for news in office.log.waiting] == [0]
        office.counterparts["rides"].takes = 0.0
        await office.settled(600)
        assert office.log.waiting == []
        assert not next(one for one in office.counterparts["rides"].seen if not one.text).redelivered


async def test_what_is_too_old_is_given_up(autojump_clock: Clock) -> None:
    office = Office("rides")
    async with office.open():
        del office.services["rides"]
        office.happened("sent")
        await office.settled(MAX_AGE / timedelta(seconds=1) + 60)
        office.services["rides"] = service("rides", office.counterparts["rides"].lane)
        await office.settled(60)
        assert office.given_up == [("rides", 1)]
        assert office.log.waiting == []
        assert office.told() == []


async def test_the_database_is_away_for_a_while(autojump_clock: Clock) -> None:
    office = Office("rides")
    office.log.fail(2)
    async with office.open():
        await office.settled(3)
        assert office.log.subscribed == ["rides"]
        office.log.fail(1)
        office.happened("sent")
        await office.settled(3)
        assert office.told() == ["sent"]
        assert office.unavailable == 3


async def test_an_epoch_that_is_over_ends_it(autojump_clock: Clock) -> None:
    office = Office("rides")
    office.log.epoch = 2
    with trio.fail_after(10), pytest.raises(ExceptionGroup) as caught:
        await office.relay.run()
    assert caught.value.split(LeaseLost)[1] is None
    assert virtual_now() >= START
