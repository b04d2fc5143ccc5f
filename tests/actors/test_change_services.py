"""Services that change while they are delivered to: whoever waits goes on to the one that has the name now,
what runs is finished, and nothing is lost, told twice or out of turn.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta

import trio
import trio.testing
from doubles import START, Counterpart, MemoryJournal, delivery, incoming, service_spec, tree_spec
from hypothesis import given
from hypothesis import strategies as st
from tables import each

from actors.messages import Appended, Envelope, Outcome, Place, Retry
from actors.ports import Unreadable
from actors.tree import DeliveryTree, ServiceSpec

Clock = trio.testing.MockClock


def virtual_now() -> datetime:
    return START + timedelta(seconds=trio.current_time())


class Watched(Counterpart):
    """Notes what it is told beside what others are told."""

    def __init__(self, told: list[str], *, takes: float) -> None:
        super().__init__(takes=takes)
        self._told = told

    async def attempt(self, envelope: Envelope) -> Outcome | Unreadable:
        self._told.append(envelope.text)
        return await super().attempt(envelope)


class Office:
    """A DeliveryTree on a MemoryJournal, whose services are in a list that may change: rides and jobs. A text
    names its service and its sender: `rides:a1` is the first one of a.
    """

    def __init__(
        self, *, takes: float = 0.0, lanes: int = 1, waiting: int = 5, timeout: float = 14.0
    ) -> None:
        self.journal = MemoryJournal(clock=virtual_now)
        self.told: list[str] = []  # by whichever service
        self.specs: dict[str, ServiceSpec] = {}
        self._settings = {"lanes": lanes, "waiting": waiting, "timeout": timeout}
        self._takes = takes
        self.rides, self.jobs = self.add("rides"), self.add("jobs")
        self.crashes: list[tuple[str, Exception]] = []
        self.tree: DeliveryTree

    # What changes the services; nobody is told of it before `change`

    def add(self, name: str) -> Watched:
        """A new one, in place of one that has that name; its other end."""
        counterpart = Watched(self.told, takes=self._takes)
        self.specs[name] = service_spec(name, counterpart.lane, **self._settings)
        return counterpart

    def replace(self, name: str = "rides") -> Watched:
        counterpart = self.add(name)
        self.tree.change_services()
        return counterpart

    def pause(self, name: str = "rides", *, paused: bool = True) -> None:
        self.specs[name] = replace(self.specs[name], paused=paused)
        self.tree.change_services()

    def resume(self, name: str = "rides") -> None:
        self.pause(name, paused=False)

    def remove(self, name: str = "rides") -> None:
        self.specs.pop(name, None)
        self.tree.change_services()

    # What phones say, and what came of it

    def say(self, *texts: str) -> None:
        """Journaled in one flush."""
        number = len(self.journal.items)
        messages = [
            replace(
                incoming(f"{number}-{place}", text.partition(":")[2][0]),
                message={"type": "text", "text": {"body": text}},
            )
            for place, text in enumerate(texts)
        ]
        result = self.journal.commit([delivery(*messages)])
        assert isinstance(result, Appended)
        self.tree.look()

    def say_all(self, senders: str, count: int, service: str = "rides") -> list[str]:
        """So many of each, by turns, none of which was said before."""
        first = len(self.journal.items)
        texts = [f"{service}:{sender}{first + number}" for number in range(count) for sender in senders]
        self.say(*texts)
        return texts

    @property
    def texts(self) -> list[str]:
        return [_text(item.message) for item in self.journal.items if item is not None]

    def place(self, text: str) -> Place:
        return self.journal.outcomes[self._seq(text)].place

    def attempts(self, text: str) -> int:
        return self.journal.outcomes[self._seq(text)].attempts

    def letter(self, text: str) -> tuple[str, str | None]:
        """Status and resolution of the dead letter that it became."""
        letter = self.journal.letters[str(uuid.UUID(int=self._seq(text)))]
        return letter.status, letter.resolution

    def _seq(self, text: str) -> int:
        return self.texts.index(text) + 1

    def assert_all_told_once(self, *, in_order: bool = True) -> None:
        assert sorted(self.told) == sorted(self.texts)
        assert {done.place for done in self.journal.outcomes.values()} <= {Place.DELIVERED}
        assert len(self.journal.outcomes) == len(self.texts)
        if in_order:
            assert by_conversation(self.told) == by_conversation(self.texts)

    @property
    def waiting_for(self) -> dict[str, int]:
        assert self.tree.dispatcher is not None
        return self.tree.dispatcher.statistics().waiting_for

    @asynccontextmanager
    async def open(self) -> AsyncIterator[DeliveryTree]:
        spec = tree_spec(
            self.journal,
            services=lambda: list(self.specs.values()),
            clock=virtual_now,
            max_live_sessions=100,
            sweep_every=10_000,
            report=lambda name, error: self.crashes.append((name, error)),
        )
        self.tree = DeliveryTree(spec, epoch=1, may_attempt=lambda: True, on_lease_lost=lambda: None)
        with trio.fail_after(10_000):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.tree.run)
                await trio.testing.wait_all_tasks_blocked()
                yield self.tree
                nursery.cancel_scope.cancel()
        assert self.crashes == []


def _text(message: object) -> str:
    assert isinstance(message, dict)
    return str(message["text"]["body"])


def by_conversation(texts: list[str]) -> dict[str, list[str]]:
    """What each sender said to each service, in this order."""
    said: dict[str, list[str]] = {}
    for text in texts:
        said.setdefault(text[: text.index(":") + 2], []).append(text)
    return said


SENDERS = "abcdefghijklmnopqrst"


# Another one of the same name


async def test_another_one_takes_over_what_waits_and_nothing_more_goes_to_the_old_one(
    autojump_clock: Clock,
) -> None:
    office = Office(takes=1.0, waiting=3)
    async with office.open():
        office.say_all(SENDERS, 3)
        await trio.sleep(4.5)
        assert office.waiting_for["rides"] > 0
        assert len(office.rides.seen) == 5  # the last of them runs
        new = office.replace()
        office.say_all(SENDERS, 2, "jobs")
        await trio.sleep(100)
        assert len(office.rides.seen) == 5
        assert len(new.seen) == 60 - 5
        assert all((one.attempt, one.redelivered) == (1, False) for one in new.seen)
        assert office.waiting_for == {}
    office.assert_all_told_once()


async def test_what_runs_is_finished_where_it_runs(autojump_clock: Clock) -> None:
    office = Office(takes=5.0, lanes=2)
    async with office.open():
        office.say("rides:a0", "rides:b0")
        await trio.sleep(1)
        office.say("rides:a1", "rides:c0")
        new = office.replace()
        await trio.sleep(1)
        assert new.texts == ["rides:c0"]  # a waits for its first message
        assert office.rides.open_lanes == 2
        await trio.sleep(3.1)
        assert office.place("rides:a0") is office.place("rides:b0") is Place.DELIVERED
        assert sorted(office.rides.texts) == ["rides:a0", "rides:b0"]
        assert office.rides.open_lanes == 0
        await trio.sleep(10)
        assert new.texts == ["rides:c0", "rides:a1"]
    office.assert_all_told_once()


async def test_a_delivery_between_two_attempts_goes_on_at_the_new_one(autojump_clock: Clock) -> None:
    office = Office()
    office.rides.script["rides:a0"].extend([Retry(), Retry(after=10.0)])
    async with office.open():
        office.say("rides:a0", "rides:a1")
        await trio.sleep(5)
        new = office.replace()
        await trio.sleep(1)
        assert [one.attempt for one in office.rides.seen] == [1, 2]
        assert [(one.text, one.redelivered) for one in new.seen] == [("rides:a0", True), ("rides:a1", False)]
        assert office.attempts("rides:a0") == 3
        assert office.place("rides:a0") is Place.DELIVERED


async def test_one_that_is_replaced_again_and_again_loses_nothing(autojump_clock: Clock) -> None:
    office = Office(takes=1.0, waiting=2)
    async with office.open():
        office.say_all(SENDERS, 2)
        for _ in range(30):
            await trio.sleep(0.7)
            office.replace()
        for _ in range(10):
            office.replace()
        await trio.sleep(100)
        assert office.waiting_for == {}
    office.assert_all_told_once()


async def test_one_whose_spec_is_the_same_goes_on(autojump_clock: Clock) -> None:
    office = Office(takes=1.0)
    async with office.open() as tree:
        before = dict(tree.services)
        office.say_all("abc", 2)
        await trio.sleep(0.5)
        tree.change_services()
        office.replace("jobs")
        await trio.sleep(100)
        assert tree.services["rides"] is before["rides"]
        assert tree.services["jobs"] is not before["jobs"]
        assert len(office.rides.seen) == 6
    office.assert_all_told_once()


async def test_a_new_one_takes_what_waits_for_an_old_one_that_hangs(autojump_clock: Clock) -> None:
    office = Office(takes=10.0)
    async with office.open():
        texts = office.say_all("abcd", 1)
        await trio.sleep(1)
        new = office.replace()
        new.takes = 0.0
        await trio.sleep(0.1)
        assert {*office.rides.texts, *new.texts} == set(texts)
        assert len(new.texts) == 3


async def test_attempts_are_counted_over_all_of_one_name(autojump_clock: Clock) -> None:
    office = Office()
    async with office.open() as tree:
        office.say("rides:a0")
        await trio.sleep(1)
        office.replace()
        office.say("rides:b0")
        await trio.sleep(1)
        assert tree.services["rides"].statistics.attempts == 2


# Paused


async def test_while_one_is_paused_everything_for_it_waits_and_others_go_on(autojump_clock: Clock) -> None:
    office = Office(takes=1.0, waiting=3)
    async with office.open():
        first = office.say_all(SENDERS, 2)
        await trio.sleep(4.5)
        office.pause()
        other = office.say_all("abc", 2, "jobs")
        await trio.sleep(1)
        later = office.say_all(SENDERS, 1)
        await trio.sleep(1_000)
        told = [text for text in office.told if text in first]
        assert len(told) == 5
        assert [office.place(text) for text in told] == [Place.DELIVERED] * 5
        for text in {*first, *later} - set(told):
            assert office.place(text) is Place.DEFERRED
            assert office.letter(text) == ("pending", "deferred")
        assert set(other) <= set(office.told)
        assert not set(later) & set(office.told)
        assert office.waiting_for == {}

        office.resume()
        office.say_all(SENDERS, 1)
        await trio.sleep(1_000)
    office.assert_all_told_once()


async def test_what_comes_after_a_pause_does_not_go_past_what_waits(autojump_clock: Clock) -> None:
    office = Office(takes=1.0, lanes=3)
    async with office.open():
        office.pause()
        office.say_all("abc", 4)
        await trio.sleep(10)
        assert office.told == []
        office.resume()
        for _ in range(10):
            office.say("rides:a9")
            await trio.sleep(0.3)
        await trio.sleep(200)
    assert len(office.told) == 22
    assert by_conversation(office.told) == by_conversation(office.texts)


async def test_what_runs_when_one_is_paused_is_finished_and_a_delivery_in_its_backoff_waits(
    autojump_clock: Clock,
) -> None:
    office = Office(takes=2.0, lanes=2)
    office.rides.script["rides:b0"].append(Retry(after=12.0))
    async with office.open():
        office.say("rides:b0")
        await trio.sleep(3)
        office.say("rides:a0", "rides:a1")
        await trio.sleep(1)
        office.pause()
        await trio.sleep(5)
        assert office.place("rides:a0") is Place.DELIVERED
        assert [office.place(text) for text in ("rides:a1", "rides:b0")] == [Place.DEFERRED] * 2
        assert office.attempts("rides:b0") == 1
        office.resume()
        await trio.sleep(20)
        assert [one.redelivered for one in office.rides.seen if one.text == "rides:b0"] == [False, True]
    assert sorted(office.told) == ["rides:a0", "rides:a1", "rides:b0", "rides:b0"]


# Removed


async def test_what_waits_for_one_that_is_removed_and_what_comes_is_without_a_service(
    autojump_clock: Clock,
) -> None:
    office = Office(takes=1.0, waiting=3)
    async with office.open():
        first = office.say_all(SENDERS, 2)
        await trio.sleep(4.5)
        office.remove()
        later = office.say_all("abc", 1)
        jobs = office.say_all("abc", 1, "jobs")
        await trio.sleep(1_000)
        told = [text for text in office.told if text in first]
        assert len(told) == 5
        assert set(jobs) <= set(office.told)
        left = {*first, *later} - set(told)
        assert {office.letter(text) for text in left} == {("pending", "no_service")}
        assert {office.place(text) for text in left} == {Place.DEAD_LETTER}
        assert {office.place(text) for text in told} == {Place.DELIVERED}
        assert office.waiting_for == {}

        office.replace()
        await trio.sleep(1_000)
    office.assert_all_told_once()


async def test_what_was_said_before_there_was_a_service_is_delivered_when_there_is(
    autojump_clock: Clock,
) -> None:
    office = Office()
    async with office.open():
        office.say("taxi:a0", "taxi:a1", "taxi:b0")
        await trio.sleep(100)
        assert office.letter("taxi:a0") == ("pending", "no_service")
        taxi = office.replace("taxi")
        office.say("taxi:c0")
        await trio.sleep(2)
        assert sorted(taxi.texts) == ["taxi:a0", "taxi:a1", "taxi:b0", "taxi:c0"]
    office.assert_all_told_once()


async def test_what_is_deferred_when_one_is_removed_waits_on(autojump_clock: Clock) -> None:
    office = Office()
    async with office.open():
        office.pause()
        office.say("rides:a0", "rides:a1")
        await trio.sleep(10)
        office.remove()
        await trio.sleep(1_000)
        assert office.letter("rides:a0") == office.letter("rides:a1") == ("pending", "deferred")
        office.replace()
        await trio.sleep(10)
    office.assert_all_told_once()


async def test_what_was_attempted_when_one_is_removed_is_told_again_as_such(autojump_clock: Clock) -> None:
    office = Office()
    office.rides.script["rides:a0"].append(Retry(after=10.0))
    async with office.open():
        office.say("rides:a0")
        await trio.sleep(1)
        office.remove()
        await trio.sleep(1)
        assert office.letter("rides:a0") == ("pending", "no_service")
        new = office.replace()
        await trio.sleep(5)
        assert [one.redelivered for one in new.seen] == [True]


# Whoever stands in line


async def _line_for_a_service_that_hangs(office: Office) -> None:
    """One runs, some wait, and the others stand in line."""
    office.say_all(SENDERS, 1)
    await trio.sleep(0.1)
    assert office.waiting_for == {
        "rides": len(SENDERS) - 1 - len(office.tree.services["rides"].address.mailbox)
    }


@each("change", ["replace", "pause", "remove"])
async def test_nobody_stands_in_line_for_one_that_is_gone(autojump_clock: Clock, change: str) -> None:
    office = Office(takes=13.0, waiting=3)
    async with office.open():
        await _line_for_a_service_that_hangs(office)
        assert office.waiting_for["rides"] == 16
        [runs] = office.told
        rides = getattr(office, change)()
        if rides is not None:
            rides.takes = 0.1
        else:
            await trio.sleep(0.1)
            assert office.waiting_for == {}
        await trio.sleep(3)
        assert office.waiting_for == {}
        assert len(office.journal.outcomes) == 19  # all but the one that runs
        places = {done.place for done in office.journal.outcomes.values()}
        expected = {"replace": Place.DELIVERED, "pause": Place.DEFERRED, "remove": Place.DEAD_LETTER}[change]
        assert places == {expected}
        await trio.sleep(20)
        assert office.place(runs) is Place.DELIVERED


async def test_a_line_that_another_service_does_not_take_either_breaks_up(autojump_clock: Clock) -> None:
    office = Office(takes=13.0, waiting=3)
    async with office.open():
        await _line_for_a_service_that_hangs(office)
        office.replace()
        await trio.sleep(12)
        assert office.waiting_for == {}
        assert [done.place for done in office.journal.outcomes.values()].count(Place.DEFERRED) > 10
        await trio.sleep(1_000)
    office.assert_all_told_once()


# While the delivering side ends


@each("change", ["replace", "pause", "remove"])
@each("after", [0.0, 0.5, 3.0])
async def test_a_change_during_a_drain_is_harmless(autojump_clock: Clock, change: str, after: float) -> None:
    office = Office(takes=2.0, waiting=3)
    async with office.open() as tree:
        office.say_all("abcdefgh", 2)
        office.say_all("ab", 1, "jobs")
        await trio.sleep(1)
        drained = trio.Event()

        async def drain() -> None:
            await tree.drain()
            drained.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            await trio.sleep(after)
            getattr(office, change)()
        assert drained.is_set()
        assert len(office.told) == len(set(office.told)) > 0
        delivered = [
            _text(done.item.message)
            for done in office.journal.outcomes.values()
            if done.place is Place.DELIVERED
        ]
        assert sorted(delivered) == sorted(office.told)


async def test_a_change_while_the_lanes_are_closed_begins_no_new_ones(autojump_clock: Clock) -> None:
    office = Office()

    @asynccontextmanager
    async def lane() -> AsyncIterator[Counterpart]:
        yield office.rides
        with trio.CancelScope(shield=True):
            await trio.sleep(5)  # to say goodbye

    office.specs["rides"] = replace(office.specs["rides"], open_lane=lane)
    async with office.open() as tree, trio.open_nursery() as nursery:
        nursery.start_soon(tree.drain)
        await trio.sleep(1)
        new = office.replace()
        await trio.sleep(1)
        assert new.open_lanes == 0


async def test_a_change_before_the_services_began_counts_when_they_do(autojump_clock: Clock) -> None:
    office = Office()
    office.tree = DeliveryTree(
        tree_spec(office.journal, services=lambda: list(office.specs.values())),
        epoch=1,
        may_attempt=lambda: True,
        on_lease_lost=lambda: None,
    )
    office.remove()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(office.tree.run)
        await trio.testing.wait_all_tasks_blocked()
        assert office.tree.services.keys() == {"jobs"}
        nursery.cancel_scope.cancel()


# Whatever happens

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("say"), st.lists(st.sampled_from("abcd"), min_size=1, max_size=8)),
        st.tuples(st.sampled_from(["replace", "pause", "resume"]), st.just([])),
        st.tuples(st.just("sleep"), st.just([])),
    ),
    min_size=1,
    max_size=25,
)


@given(
    steps=STEPS,
    takes=st.sampled_from([0.0, 0.3, 2.0]),
    lanes=st.integers(1, 3),
    waiting=st.integers(1, 3),
    between=st.sampled_from([0.1, 1.7]),
)
def test_whatever_changes_each_message_is_told_once_and_in_order(
    steps: list[tuple[str, list[str]]], takes: float, lanes: int, waiting: int, between: float
) -> None:
    async def main() -> None:
        office = Office(takes=takes, lanes=lanes, waiting=waiting)
        async with office.open():
            for what, senders in steps:
                if what == "say":
                    number = len(office.journal.items)
                    office.say(*(f"rides:{sender}{number + place}" for place, sender in enumerate(senders)))
                elif what == "sleep":
                    await trio.sleep(between)
                else:
                    getattr(office, what)()
            office.resume()
            await trio.sleep(2_000)
            assert office.waiting_for == {}
        office.assert_all_told_once()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
