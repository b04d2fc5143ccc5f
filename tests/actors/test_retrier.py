"""The retrier: letters go back to their sessions when they are due, one of a pair at a time, and every run is
on record.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta

import pytest
import trio
import trio.testing
from doubles import (
    START,
    Counterpart,
    MemoryJournal,
    RetryRun,
    delivery,
    incoming,
    service,
    service_spec,
    tree_spec,
    virtual_now,
)

from actors.breaker import BreakerState, Trips
from actors.deferrals import Deferrals
from actors.errors import JournalUnavailable, LeaseLost
from actors.messages import (
    Appended,
    Completion,
    DeadLetter,
    Envelope,
    Item,
    Outcome,
    Place,
    Reject,
    Retry,
)
from actors.ports import Unreadable
from actors.retrier import PAGE, Retrier
from actors.tree import DeliveryTree

Clock = trio.testing.MockClock
Seen = list[tuple[float, str]]

DOWN = [Retry()] * 3  # a delivery that fails by itself: attempts at once, after 0.25 s and 0.75 s


class Watched(Counterpart):
    """Notes when each delivery began."""

    def __init__(self, seen: Seen, *, takes: float) -> None:
        super().__init__(takes=takes)
        self.down_until = 0.0
        self._deliveries = seen

    async def attempt(self, envelope: Envelope) -> Outcome | Unreadable:
        if envelope.attempt == 1:
            self._deliveries.append((trio.current_time(), envelope.text))
        outcome = await super().attempt(envelope)
        return outcome if trio.current_time() >= self.down_until else Retry(reason="down")


class Office:
    """A DeliveryTree on a MemoryJournal whose clock is trio's. A text names its service: `rides:a`."""

    def __init__(
        self,
        *,
        journal: MemoryJournal | None = None,
        takes: float = 0.0,
        lanes: int = 1,
        waiting: int = 5,
        max_age: timedelta = timedelta(days=2),
        strict: bool = False,
        breaker_failures: int = 1_000,
    ) -> None:
        self.journal = journal or MemoryJournal(clock=virtual_now)
        self.journal.before = self._note
        self.seen: Seen = []
        self.runs_at: list[float] = []
        self.services = {name: Watched(self.seen, takes=takes) for name in ("rides", "jobs")}
        self.leases_lost = 0
        self.reports: list[tuple[str, str]] = []
        self.breakers: list[tuple[str, BreakerState]] = []
        self._spec = tree_spec(
            self.journal,
            *(
                service_spec(
                    name,
                    service.lane,
                    lanes=lanes,
                    waiting=waiting,
                    strict=strict,
                    trips=Trips(breaker_failures, failure_ratio=2),
                )
                for name, service in self.services.items()
            ),
            clock=virtual_now,
            dead_letter_max_age=max_age,
            max_live_sessions=100,
            sweep_every=10_000,
            report=lambda name, error: self.reports.append((name, type(error).__name__)),
            on_breaker=lambda name, breaker: self.breakers.append((name, breaker.state)),
        )
        self.tree: DeliveryTree

    async def _note(self, method: str) -> None:
        if method == "log_retry_run":
            assert len(self.runs_at) < 200, "a run after the other without a pause"
            self.runs_at.append(trio.current_time())

    def _lease_lost(self) -> None:
        self.leases_lost += 1

    def may_attempt(self) -> bool:
        return True

    @asynccontextmanager
    async def open(self) -> AsyncIterator[DeliveryTree]:
        self.tree = DeliveryTree(
            self._spec,
            epoch=self.journal.epoch,
            may_attempt=self.may_attempt,
            on_lease_lost=self._lease_lost,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.tree.run)
            yield self.tree
            nursery.cancel_scope.cancel()

    def say(self, text: str, sender: str = "1") -> Item:
        """Journaled, and not told to the tree."""
        message = {"type": "text", "text": {"body": text}}
        result = self.journal.commit(
            [delivery(replace(incoming(str(len(self.journal.items)), sender), message=message))]
        )
        assert isinstance(result, Appended)
        item = self.journal.items[result.first_seq - 1]
        assert item is not None
        return item

    async def letter(
        self, text: str, sender: str = "1", *, due: float | None = 0.0, resolution: str | None = None
    ) -> int:
        """A pending dead letter that is due in so many seconds; its seq."""
        item = self.say(text, sender)
        letter = DeadLetter(status="pending", resolution=resolution, error="down", retry_in=due)
        done = Completion(
            item=item,
            place=Place.DEAD_LETTER,
            service=text.split(":")[0],
            rule="keyword",
            attempts=1,
            dead_letter=letter,
        )
        await self.journal.complete([done], epoch=self.journal.epoch, low_water=1, stragglers=[])
        return item.seq

    def became(self, seq: int) -> tuple[str, str | None, int]:
        """The letter's status, resolution and retries."""
        letter = self.journal.letters[str(uuid.UUID(int=seq))]
        return letter.status, letter.resolution, letter.retries

    def due(self, seq: int) -> float:
        due = self.journal.letters[str(uuid.UUID(int=seq))].due
        assert due is not None
        return (due - START).total_seconds()

    @property
    def recorded(self) -> tuple[int, int]:
        """Processed and failed in all runs."""
        runs = self.journal.retry_runs
        return sum(run.processed for run in runs), sum(run.failed for run in runs)


# When letters are retried


async def test_a_letter_is_retried_when_it_is_due(autojump_clock: Clock) -> None:
    office = Office()
    later, sooner = await office.letter("rides:b", "b", due=700), await office.letter("jobs:a", "a", due=120)
    async with office.open():
        await trio.sleep(1_000)
    assert office.seen == [(120.0, "jobs:a"), (700.0, "rides:b")]
    assert office.became(sooner) == office.became(later) == ("reprocessed", "reprocessed", 1)
    assert [office.journal.outcomes[seq].place for seq in (later, sooner)] == [Place.DELIVERED] * 2


async def test_a_letter_that_becomes_one_now_is_retried_when_it_is_due(autojump_clock: Clock) -> None:
    office = Office()
    async with office.open() as tree:
        await trio.sleep(10)
        office.services["rides"].script["rides:a"].extend(DOWN)
        seq = office.say("rides:a").seq
        tree.look()
        await trio.sleep(200)
    assert office.seen == [(10.0, "rides:a"), (130.75, "rides:a")]
    assert office.became(seq) == ("reprocessed", "reprocessed", 1)


async def test_a_service_that_always_fails_is_asked_so_often_and_no_more(autojump_clock: Clock) -> None:
    """Policy `fast`: 2, 4 and 8 minutes after each failure."""
    office = Office()
    office.services["rides"].script["rides:a"].extend(DOWN * 10)
    seq = office.say("rides:a").seq
    async with office.open():
        await trio.sleep(842)
        assert office.became(seq) == ("pending", None, 2)
        await trio.sleep(5_000)
    waits = (120, 240, 480)
    expected = [0.0]
    for wait in waits:
        expected.append(expected[-1] + 0.75 + wait)
    assert office.seen == [(at, "rides:a") for at in expected]
    assert office.became(seq) == ("failed", "exhausted", 3)
    assert office.recorded == (3, 3)


async def test_what_the_service_put_off_is_due_then_and_not_counted(autojump_clock: Clock) -> None:
    office = Office()
    office.services["rides"].script["rides:a"].extend([Retry(after=60.0), Retry(after=600.0), *DOWN])
    seq = office.say("rides:a").seq
    async with office.open():
        for at, due in ((30, 60), (100, 660)):
            await trio.sleep(at - trio.current_time())
            assert office.became(seq) == ("pending", None, 0)
            assert office.due(seq) == due
        await trio.sleep(700 - trio.current_time())
        assert office.became(seq) == ("pending", None, 1)
        await trio.sleep(1_000)
    # Its first counted retry has failed: the next wait is the policy's second.
    assert office.seen == [(at, "rides:a") for at in (0.0, 60.0, 660.0, 900.75)]
    assert office.became(seq) == ("reprocessed", "reprocessed", 2)


async def test_a_letter_that_nobody_serves_waits_for_a_service(autojump_clock: Clock) -> None:
    office = Office()
    seq = office.say("taxi:a").seq
    async with office.open():
        await trio.sleep(10_000)
    assert office.became(seq) == ("pending", "no_service", 0)
    assert office.journal.calls["complete"] == 1
    assert office.recorded == (0, 0)


async def test_a_letter_that_nobody_served_is_retried_when_there_is_a_service(autojump_clock: Clock) -> None:
    office = Office()
    seq = await office.letter("rides:a", due=None, resolution="no_service")
    async with office.open():
        await trio.sleep(0.5)
    assert office.seen == [(0.0, "rides:a")]
    assert office.became(seq) == ("reprocessed", "reprocessed", 1)


async def test_of_a_conversation_only_the_oldest_letter_is_out(autojump_clock: Clock) -> None:
    office = Office(takes=2.0, lanes=3)
    for text in ("rides:a1", "rides:b1", "rides:a2", "rides:b2", "rides:a3"):
        await office.letter(text, text[6])
    async with office.open():
        await trio.sleep(100)
    assert sorted(office.seen) == [
        (0.0, "rides:a1"),
        (0.0, "rides:b1"),
        (2.0, "rides:a2"),
        (2.0, "rides:b2"),
        (4.0, "rides:a3"),
    ]


async def test_a_younger_letter_waits_for_an_older_one_that_is_not_due(autojump_clock: Clock) -> None:
    office = Office()
    await office.letter("rides:a1", due=600)
    await office.letter("rides:a2", due=100)
    async with office.open():
        await trio.sleep(1_000)
    assert office.seen == [(600.0, "rides:a1"), (600.0, "rides:a2")]


async def test_a_slow_service_holds_up_the_letters_of_no_other(autojump_clock: Clock) -> None:
    office = Office()
    office.services["rides"].takes = 9.0
    for sender in "abc":
        await office.letter(f"rides:{sender}", sender)
        await office.letter(f"jobs:{sender}", sender + sender)
    async with office.open():
        await trio.sleep(5)
    told = sorted(office.seen)
    assert told[:3] == [(0.0, "jobs:a"), (0.0, "jobs:b"), (0.0, "jobs:c")]
    assert [text[:6] for _, text in told[3:]] == ["rides:"]


async def test_a_slow_service_holds_up_no_letter_that_becomes_due_meanwhile(autojump_clock: Clock) -> None:
    office = Office(takes=10.0)
    for number in range(50):
        await office.letter(f"rides:{number}", f"r{number}")
    await office.letter("jobs:due", "due", due=60)
    async with office.open():
        await trio.sleep(90)
    assert "jobs:due" in [text for _, text in office.seen]
    assert len(office.seen) > 5


async def test_letters_get_their_share_of_a_service_that_has_too_much_to_do(autojump_clock: Clock) -> None:
    office = Office(takes=0.5, waiting=2)
    for number in range(5):
        await office.letter(f"rides:old{number}", f"old{number}")
    async with office.open() as tree:
        for number in range(200):
            office.say(f"rides:new{number}", f"new{number % 50}")
            tree.look()
            await trio.sleep(0.1)
        assert tree.dispatcher is not None
        assert tree.dispatcher.statistics().waiting_for["rides"] > 10
    told = [text for _, text in office.seen]
    assert {f"rides:old{number}" for number in range(5)} <= set(told)
    assert len(told) == 41


# What operators ask for


async def test_what_was_asked_for_is_retried_at_once(autojump_clock: Clock) -> None:
    office = Office()
    older, younger = await office.letter("rides:a", due=5_000), await office.letter("rides:b", due=5_000)
    async with office.open() as tree:
        await trio.sleep(50)
        office.journal.request_retry(younger)
        tree.replay()
        await trio.sleep(1)
        assert office.seen == [(50.0, "rides:b")]
        await trio.sleep(1_000)
    assert office.seen == [(50.0, "rides:b")]
    assert office.became(younger) == ("reprocessed", "reprocessed", 1)
    assert office.became(older) == ("pending", None, 0)


async def test_what_was_asked_for_without_a_service_is_tried_and_waits_on(autojump_clock: Clock) -> None:
    office = Office()
    seq = await office.letter("taxi:a", due=None, resolution="no_service")
    async with office.open() as tree:
        await trio.sleep(50)
        office.journal.request_retry(seq)
        tree.replay()
        await trio.sleep(1)
        assert office.journal.outcomes[seq].item.dead_letter is not None  # it was out
        await trio.sleep(1_000)
    assert office.became(seq) == ("pending", "no_service", 0)
    assert office.recorded == (1, 1)


async def test_a_request_while_a_run_is_put_on_record_is_not_forgotten(autojump_clock: Clock) -> None:
    journal = LateRequest(clock=virtual_now)
    office = Office(journal=journal)
    asked = await office.letter("rides:a", due=5_000)
    async with office.open() as tree:
        journal.ask = lambda: (journal.request_retry(asked), tree.replay())
        await trio.sleep(10)
    assert office.seen == [(0.0, "rides:a")]


class LateRequest(MemoryJournal):
    """Somebody asks when a run is on record, and the answer does not know it."""

    ask: Callable[[], object] | None = None

    async def log_retry_run(
        self,
        epoch: int,
        *,
        took: float,
        processed: int,
        failed: int,
        error: str | None,
        services: Sequence[str],
    ) -> float | None:
        told = await super().log_retry_run(
            epoch, took=took, processed=processed, failed=failed, error=error, services=services
        )
        if self.ask is not None:
            self.ask()
            self.ask = None
        return told


@pytest.mark.parametrize("resolution", [None, "no_service"])
async def test_what_a_run_left_is_gone_on_with(autojump_clock: Clock, resolution: str | None) -> None:
    """Also what has no due time: an operator asked for it, or there is a service by now."""
    office = Office(takes=10.0)
    for sender in "abcdef":
        seq = await office.letter(f"rides:{sender}", sender, due=None, resolution=resolution)
        if resolution is None:
            office.journal.request_retry(seq)
    async with office.open():
        await trio.sleep(100)
    assert len(office.seen) == 6


# Runs


async def test_an_empty_run_is_on_record(autojump_clock: Clock) -> None:
    office = Office()
    async with office.open():
        await trio.sleep(1)
    assert office.journal.retry_runs == [RetryRun(0, 0, None)]


async def test_there_is_a_run_every_five_minutes_at_least(autojump_clock: Clock) -> None:
    office = Office()
    await office.letter("rides:a", due=50_000)
    async with office.open():
        await trio.sleep(1_000)
    assert office.runs_at == [0.0, 300.0, 600.0, 900.0]


async def test_there_is_a_run_every_second_at_most(autojump_clock: Clock) -> None:
    office = Office()
    seq = await office.letter("rides:a", due=-10)
    office.journal.items[seq - 1] = None  # it is due and cannot be claimed
    async with office.open():
        await trio.sleep(10.5)
    assert office.runs_at == [float(second) for second in range(11)]


async def test_the_runs_add_up_to_the_replays_that_ended(autojump_clock: Clock) -> None:
    office = Office(lanes=2)
    script = office.services["rides"].script
    script["rides:no"].append(Reject("no"))
    script["rides:down"].extend(DOWN)  # again after four minutes
    script["rides:later"].append(Retry(after=60.0))
    for text, due in (("rides:ok", 0), ("rides:no", 10), ("rides:down", 10), ("rides:later", 20)):
        await office.letter(text, text, due=due)
    asked = await office.letter("taxi:a", "taxi", due=None, resolution="no_service")
    office.journal.request_retry(asked)
    async with office.open():
        await trio.sleep(2_000)
    assert office.recorded == (7, 4)
    assert all(run.error is None and run.failed <= run.processed for run in office.journal.retry_runs)


async def test_a_run_is_put_on_record_when_the_journal_is_back(autojump_clock: Clock) -> None:
    office = Office()
    await office.letter("rides:a")
    office.journal.fail("log_retry_run", *(JournalUnavailable("away") for _ in range(3)))
    async with office.open():
        await trio.sleep(400)
    assert office.journal.retry_runs == [RetryRun(1, 0, None), RetryRun(0, 0, None)]
    assert office.runs_at[:4] == pytest.approx([0.0, 0.2, 0.6, 1.4])  # again until it is on record
    assert office.runs_at[4] == pytest.approx(301.4)


@pytest.mark.parametrize("method", ["release_dead_letters", "expire_dead_letters"])
async def test_a_run_without_the_journal_has_its_error_on_record(autojump_clock: Clock, method: str) -> None:
    office = Office()
    seq = await office.letter("rides:a")
    office.journal.fail(method, JournalUnavailable("away"))
    async with office.open():
        await trio.sleep(10)
    assert office.journal.retry_runs == [RetryRun(0, 0, "away"), RetryRun(1, 0, None)]
    assert office.runs_at == [0.0, 1.0]
    assert office.became(seq)[0] == "reprocessed"
    assert office.reports == []


class UnluckyJournal(MemoryJournal):
    """Its first claim for rides gets no answer; `committed`: it was made all the same."""

    def __init__(self, *, committed: bool) -> None:
        super().__init__(clock=virtual_now)
        self._committed = committed
        self._claims = 0

    async def claim_dead_letters(
        self, epoch: int, limit: int, services: Sequence[str], *, others: bool = False
    ) -> list[Item]:
        self._claims += not others and "rides" in services
        if self._claims == 1:
            self._claims += 1
            if self._committed:
                await super().claim_dead_letters(epoch, limit, services)
            raise JournalUnavailable("away")
        return await super().claim_dead_letters(epoch, limit, services, others=others)


async def test_a_claim_that_failed_is_on_record_and_the_rest_is_seen_through(autojump_clock: Clock) -> None:
    office = Office(journal=UnluckyJournal(committed=False), takes=2.0)
    seqs = [await office.letter("rides:a", "a"), await office.letter("jobs:b", "b")]
    async with office.open():
        await trio.sleep(10)
    assert office.journal.retry_runs == [RetryRun(1, 0, "away"), RetryRun(1, 0, None)]
    assert office.seen == [(0.0, "jobs:b"), (3.0, "rides:a")]
    assert [office.became(seq)[0] for seq in seqs] == ["reprocessed"] * 2


async def test_a_letter_whose_claim_was_in_doubt_is_claimed_again(autojump_clock: Clock) -> None:
    office = Office(journal=UnluckyJournal(committed=True))
    seq = await office.letter("rides:a")
    async with office.open():
        await trio.sleep(1_000)
    assert office.became(seq) == ("reprocessed", "reprocessed", 1)


async def test_a_letter_that_waited_too_long_is_given_up(autojump_clock: Clock) -> None:
    office = Office(max_age=timedelta(hours=1))
    old = await office.letter("rides:a", "a", due=50_000)
    nobody = await office.letter("taxi:b", "b", due=None, resolution="no_service")
    async with office.open():
        await trio.sleep(3_590)
        young = await office.letter("rides:c", "c", due=50_000)
        assert office.became(old) == ("pending", None, 0)
        await trio.sleep(400)
    assert office.became(old) == ("failed", "exhausted", 0)
    assert office.became(young) == ("pending", None, 0)
    assert office.became(nobody) == ("pending", "no_service", 0)
    assert office.seen == []
    assert office.recorded == (1, 1)


# Owners before and after


async def test_what_an_earlier_owner_left_is_retried_at_the_start(autojump_clock: Clock) -> None:
    office = Office()
    journal = office.journal
    seqs = [await office.letter("rides:a", "a"), await office.letter("taxi:b", "b", resolution="no_service")]
    journal.request_retry(seqs[1])
    for others in (False, True):
        assert len(await journal.claim_dead_letters(1, 10, ["rides"], others=others)) == 1
    assert [office.became(seq)[0] for seq in seqs] == ["processing"] * 2
    journal.epoch = 2
    async with office.open():
        await trio.sleep(1)
    assert office.seen == [(0.0, "rides:a")]
    assert [office.became(seq)[0] for seq in seqs] == ["reprocessed", "pending"]


async def test_what_was_out_when_the_dispatcher_crashed_is_retried(autojump_clock: Clock) -> None:
    office = Office(takes=10.0, lanes=2)
    seq = await office.letter("rides:a")
    async with office.open() as tree:
        await trio.sleep(5)
        office.journal.fail("tail", ArithmeticError("bug"))
        tree.look()
        await trio.sleep(100)
    assert [name for name, _ in office.reports] == ["dispatcher"]
    assert [text for _, text in office.seen] == ["rides:a"] * 2
    assert office.became(seq) == ("reprocessed", "reprocessed", 1)
    assert office.recorded == (1, 0)


@pytest.mark.parametrize(
    "method", ["release_dead_letters", "expire_dead_letters", "claim_dead_letters", "log_retry_run"]
)
async def test_without_the_lease_the_owner_is_told_and_nothing_crashes(
    autojump_clock: Clock, method: str
) -> None:
    office = Office()
    await office.letter("rides:a")
    office.journal.fail(method, *(LeaseLost("over") for _ in range(3)))
    async with office.open():
        await trio.sleep(1_000)
    assert office.leases_lost == 1
    assert office.reports == []
    assert office.journal.retry_runs == []


async def test_a_drain_waits_for_no_letter_that_is_not_out(autojump_clock: Clock) -> None:
    office = Office(takes=5.0)
    seqs = [await office.letter(f"rides:{sender}", sender) for sender in "abc"]
    async with office.open() as tree:
        await trio.sleep(3)
        await tree.drain()
        assert trio.current_time() == 10  # one was with the service, one waited for it
    assert len(office.seen) == 2
    became = sorted(office.became(seq)[0] for seq in seqs)
    assert became[1:] == ["reprocessed", "reprocessed"]


# Sessions and their room


class Desk:
    """A retrier, and what it offered when. `room` answers each offer; delivering is up to the test."""

    def __init__(
        self, journal: MemoryJournal, lanes: Mapping[str, int], *, room: Callable[[Item], bool]
    ) -> None:
        self.journal = journal
        self.offers: list[float] = []
        self.items: list[Item] = []
        self._room = room
        never = Counterpart().lane
        self.retrier = Retrier(
            journal,
            epoch=1,
            services={name: service(name, never, lanes=number) for name, number in lanes.items()},
            deferrals=Deferrals(journal),
            max_age=timedelta(days=1),
            offer=self._offer,
        )

    def _offer(self, item: Item) -> bool:
        self.offers.append(trio.current_time())
        self.items.append(item)
        return self._room(item)

    async def deliver(self, item: Item) -> None:
        done = Completion(item=item, place=Place.DELIVERED, service=item.domain, rule="replay", attempts=1)
        await self.journal.complete([done], epoch=1, low_water=1, stragglers=[])
        self.retrier.committed([done])


async def test_no_more_letters_are_with_sessions_than_twice_the_lanes_of_their_service(
    autojump_clock: Clock,
) -> None:
    office = Office()
    for sender in "abcde":
        await office.letter(f"rides:{sender}", sender)
    await office.letter("jobs:f", "f")
    desk = Desk(office.journal, {"rides": 1, "jobs": 1}, room=lambda item: True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.retrier.run)
        await trio.sleep(5)
        assert sorted(item.session_key for item in desk.items) == ["100:a", "100:b", "100:f"]
        [first] = [item for item in desk.items if item.session_key == "100:a"]
        await desk.deliver(first)
        await trio.sleep(1)
        assert [item.session_key for item in desk.items[3:]] == ["100:c"]
        nursery.cancel_scope.cancel()


async def test_no_more_letters_of_a_service_are_claimed_than_a_page(autojump_clock: Clock) -> None:
    office = Office()
    for number in range(2 * PAGE):
        await office.letter(f"rides:{number}", f"r{number}")
    for lanes in (2, 1_000):
        desk = Desk(office.journal, {"rides": lanes}, room=lambda item: True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(desk.retrier.run)
            await trio.sleep(5)
            claimed = [one.status for one in office.journal.letters.values()].count("processing")
            assert 0 < len(desk.items) <= claimed <= PAGE
            nursery.cancel_scope.cancel()


async def test_a_session_that_had_no_room_is_offered_its_letter_again(autojump_clock: Clock) -> None:
    office = Office()
    await office.letter("rides:a")
    desk = Desk(office.journal, {"rides": 1}, room=lambda item: len(desk.offers) == 3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.retrier.run)
        await trio.sleep(5)
        assert desk.offers == pytest.approx([0.0, 0.2, 0.4])
        await desk.deliver(desk.items[-1])
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert office.journal.retry_runs == [RetryRun(1, 0, None)]


async def test_a_letter_that_a_session_lost_is_offered_again(autojump_clock: Clock) -> None:
    office = Office()
    await office.letter("rides:a")
    desk = Desk(office.journal, {"rides": 1}, room=lambda item: True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.retrier.run)
        await trio.sleep(5)
        [item] = desk.items
        desk.retrier.lost(item)
        await trio.sleep(2)
        assert desk.items == [item, item]
        assert desk.offers[1] == pytest.approx(5, abs=1)
        await desk.deliver(item)
        desk.retrier.lost(item)  # both of one that is not out
        desk.retrier.committed(
            [Completion(item=item, place=Place.HANDLED, service=None, rule="?", attempts=0)]
        )
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert len(desk.items) == 2
    assert office.journal.retry_runs == [RetryRun(1, 0, None)]


async def test_a_letter_that_was_lost_before_a_run_that_failed_is_offered_soon(autojump_clock: Clock) -> None:
    office = Office()
    await office.letter("rides:a")
    desk = Desk(office.journal, {"rides": 1}, room=lambda item: True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.retrier.run)
        await trio.sleep(20)
        office.journal.fail("expire_dead_letters", JournalUnavailable("away"))
        desk.retrier.lost(desk.items[0])
        await trio.sleep(30)
        assert len(desk.offers) == 2
        nursery.cancel_scope.cancel()


async def test_what_ends_between_runs_is_counted_and_makes_room(autojump_clock: Clock) -> None:
    office = Office()
    for name in "abc":
        await office.letter(f"rides:{name}", name)
    desk = Desk(office.journal, {"rides": 1}, room=lambda item: True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.retrier.run)
        await trio.sleep(100)
        assert len(desk.items) == 2
        await desk.deliver(desk.items[0])
        await trio.sleep(5)
        assert [item.session_key for item in desk.items] == ["100:a", "100:b", "100:c"]
        for item in desk.items[1:]:
            await desk.deliver(item)
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert office.recorded == (3, 0)


async def test_a_letter_that_finds_no_room_holds_up_no_other(autojump_clock: Clock) -> None:
    office = Office()
    stuck, due = await office.letter("rides:a", "a"), await office.letter("jobs:b", "b", due=60)
    async with trio.open_nursery() as nursery:

        def room(item: Item) -> bool:
            if item.domain == "rides" and trio.current_time() < 500:
                return False
            nursery.start_soon(desk.deliver, item)
            return True

        desk = Desk(office.journal, {"rides": 1, "jobs": 1}, room=room)
        nursery.start_soon(desk.retrier.run)
        await trio.sleep(100)
        assert office.became(due)[0] == "reprocessed"
        assert office.became(stuck)[0] != "reprocessed"
        await trio.sleep(420)
        nursery.cancel_scope.cancel()
    assert office.became(stuck) == ("reprocessed", "reprocessed", 1)


async def test_a_letter_in_the_queue_of_a_slow_service_holds_up_no_other(autojump_clock: Clock) -> None:
    office = Office(waiting=16)
    office.services["rides"].takes = 13.0
    queued, due = (
        await office.letter("rides:letter", "letter", due=5),
        await office.letter("jobs:b", "b", due=60),
    )
    async with office.open() as tree:
        await trio.sleep(1)
        for number in range(16):
            office.say(f"rides:{number}", f"s{number}")
        tree.look()
        await trio.sleep(100)
        assert office.became(queued)[0] == "processing"
        assert office.became(due)[0] == "reprocessed"


async def test_a_letter_waits_quietly_while_the_lease_is_not_known_to_be_held(autojump_clock: Clock) -> None:
    office = Office()
    asked = 0

    def may_attempt() -> bool:
        nonlocal asked
        asked += 1
        return trio.current_time() > 10 or asked > 1_000  # an end also of a loop in which no time passes

    office.may_attempt = may_attempt  # type: ignore[method-assign]
    seq = await office.letter("rides:a")
    async with office.open():
        await trio.sleep(30)
    assert office.became(seq) == ("reprocessed", "reprocessed", 1)
    assert asked <= 60


async def test_a_letter_waits_quietly_while_its_service_is_full(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    office = Office(takes=3.0, waiting=1)
    seq = await office.letter("rides:letter", "letter", due=5)
    offers: list[float] = []
    async with office.open() as tree:
        await trio.sleep(4)
        assert tree.dispatcher is not None
        replay = tree.dispatcher.replay

        def counted(item: Item) -> bool:
            offers.append(trio.current_time())
            return len(offers) <= 1_000 and replay(item)

        monkeypatch.setattr(tree.dispatcher, "replay", counted)
        for sender in "abcdef":
            office.say(f"rides:{sender}", sender)
        tree.look()
        await trio.sleep(60)
    assert office.became(seq) == ("reprocessed", "reprocessed", 1)
    assert len(offers) <= 120


# Deferral


async def test_what_waited_for_a_service_is_delivered_in_order_when_it_is_well_again(
    autojump_clock: Clock,
) -> None:
    office = Office(breaker_failures=2, lanes=2)
    rides = office.services["rides"]
    rides.down_until = 40.0
    async with office.open() as tree:
        for number in range(6):
            for sender in "abc":
                office.say(f"rides:{sender}{number}", sender)
            office.say(f"jobs:a{number}", "a")
            tree.look()
            await trio.sleep(1)
        await trio.sleep(200)
    letters = office.journal.letters.values()
    assert {(one.status, one.retries) for one in letters} == {("reprocessed", 0)}
    delivered = [text for at, text in office.seen if at >= 40.0]
    for sender in "abc":
        mine = [text for text in delivered if text.startswith(f"rides:{sender}")]
        assert mine == [f"rides:{sender}{number}" for number in range(6)]
    assert len([text for at, text in office.seen if text.startswith("jobs")]) == 6
    assert all(at < 10 for at, text in office.seen if text.startswith("jobs"))
    # While it was down it was tried now and then, and not for each message.
    assert 4 <= len([at for at, text in office.seen if at < 40.0 and text.startswith("rides")]) <= 10
    assert not any(one.replay for one in rides.seen)
    assert {one.redelivered for one in rides.seen if one.text == "rides:b5"} == {False}


async def test_an_idle_service_that_is_left_alone_is_not_looked_at_all_the_time(
    autojump_clock: Clock,
) -> None:
    office = Office(breaker_failures=1)
    office.services["rides"].down_until = 3_600.0
    async with office.open() as tree:
        office.say("rides:a")
        tree.look()
        await trio.sleep(1_200)
        assert len(office.runs_at) < 60
        attempts = len(office.seen)
    assert 1_200 / 30 <= attempts <= 1_200 / 30 + 8


async def test_a_message_that_its_service_stumbles_over_does_not_keep_it_left_alone(
    autojump_clock: Clock,
) -> None:
    office = Office(breaker_failures=3)
    office.services["rides"].script["rides:poison"].extend([Retry()] * 1_000)
    async with office.open() as tree:
        office.say("rides:poison", "a")
        tree.look()
        await trio.sleep(0.3)
        for sender in "bcd":
            office.say(f"rides:{sender}", sender)
        tree.look()
        await trio.sleep(60)
        assert [office.journal.outcomes[seq].place for seq in (2, 3, 4)] == [Place.DELIVERED] * 3


async def test_a_strict_service_gets_a_conversation_in_order_whatever_fails(autojump_clock: Clock) -> None:
    office = Office(strict=True)
    rides = office.services["rides"]
    rides.script["rides:a0"].extend(DOWN * 2)
    rides.script["rides:b0"].extend(DOWN * 4)
    async with office.open() as tree:
        for number in range(3):
            for sender in "ab":
                office.say(f"rides:{sender}{number}", sender)
        tree.look()
        await trio.sleep(3_000)
    taken = [text for _, text in office.seen]
    assert [text for text in taken if ":a" in text] == ["rides:a0"] * 3 + ["rides:a1", "rides:a2"]
    assert [text for text in taken if ":b" in text] == ["rides:b0"] * 4 + ["rides:b1", "rides:b2"]
    assert office.became(1) == ("reprocessed", "reprocessed", 2)
    assert office.became(2) == ("failed", "exhausted", 3)  # it releases those behind it


async def test_a_conversation_is_held_back_across_a_restart(autojump_clock: Clock) -> None:
    office = Office(breaker_failures=1)
    office.services["rides"].down_until = 5.0
    async with office.open() as tree:
        office.say("rides:a0")
        tree.look()
        await trio.sleep(0.5)
    office.services["rides"].down_until = 20.0
    async with office.open() as tree:
        office.say("rides:a1")
        tree.look()
        await trio.sleep(100)
    taken = [text for at, text in office.seen if at >= 20.0]
    assert taken == ["rides:a0", "rides:a1"]


async def test_nobody_waits_any_more_behind_one_that_was_discarded(autojump_clock: Clock) -> None:
    office = Office(strict=True)
    office.services["rides"].script["rides:a0"].extend(DOWN)
    async with office.open() as tree:
        first = office.say("rides:a0").seq
        office.say("rides:a1")
        tree.look()
        await trio.sleep(10)
        assert [text for _, text in office.seen] == ["rides:a0"]
        letter = office.journal.letters[str(uuid.UUID(int=first))]
        letter.status, letter.resolution = "failed", "discarded"
        tree.replay()
        await trio.sleep(10)
        office.say("rides:a2")
        tree.look()
        await trio.sleep(10)
    assert [text for _, text in office.seen] == ["rides:a0", "rides:a1", "rides:a2"]
    assert len(office.journal.letters) == 2
