"""The service actor: attempts, time limits, backoff, and what each outcome becomes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from doubles import START, Counterpart, service

from actors.breaker import MINIMUM, RETRY_RESERVE, RETRY_SHARE, BreakerState, Trips
from actors.concurrency import Concurrency
from actors.errors import NotOwner
from actors.kernel import ActorDied, ChildSpec, MailboxFull, Strategy, Supervisor
from actors.messages import Ack, Envelope, Outcome, Reject, Reply, Retry, Session
from actors.ports import Unreadable
from actors.service import Deferred, Deliver, Delivered, Moved, Rejected, Result, Undelivered

Clock = trio.testing.MockClock


class Watched(Counterpart):
    """Notes how many attempts run when each one begins."""

    def __init__(self, *, takes: float) -> None:
        super().__init__(takes=takes)
        self.at_once: list[int] = []
        self._running = 0

    async def attempt(self, envelope: Envelope) -> Outcome | Unreadable:
        self._running += 1
        self.at_once.append(self._running)
        try:
            return await super().attempt(envelope)
        finally:
            self._running -= 1


class Office:
    """One service and its counterpart. The random source is 1, so the waits are 0.25 and 0.5 seconds."""

    def __init__(
        self,
        *,
        lanes: int = 1,
        least: int | None = None,
        waiting: int = 10,
        takes: float = 0.0,
        breaker_failures: int = 1_000,
        trips: Trips | None = None,
    ) -> None:
        self.counterpart = Watched(takes=takes)
        self.held = True
        self.taken: list[tuple[float, int]] = []
        self.crashes: list[Exception] = []
        self.service = service(
            "rides",
            self.counterpart.lane,
            concurrency=Concurrency(lanes if least is None else least, lanes),
            waiting=waiting,
            trips=Trips(breaker_failures, failure_ratio=2) if trips is None else trips,
            may_attempt=lambda: self.held,
            on_taken=lambda name, room: self.taken.append((trio.current_time(), room)),
        )
        self.results: list[Result | Moved | str] = []

    def script(self, *outcomes: object, text: str = "a") -> None:
        self.counterpart.script[text].extend(outcomes)

    async def deliver(self, text: str = "a") -> Result | Moved:
        envelope = Envelope(
            id="msg_1",
            message_id=None,
            domain="rides",
            session=Session(key="k", phone_number_id="100"),
            message={"type": "text", "text": {"body": text}},
            received_at=START,
            correlation_id="c",
        )
        return await self.service.address.ask_nowait(lambda promise: Deliver(envelope, promise))

    async def note(self, text: str) -> None:
        try:
            self.results.append(await self.deliver(text))
        except (ActorDied, NotOwner) as error:
            self.results.append(type(error).__name__)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Supervisor]:
        spec = ChildSpec(
            "rides", self.service.run, self.service.address.mailbox.close, self.service.address.bury
        )
        supervisor = Supervisor(
            "services",
            [spec],
            strategy=Strategy.ONE_FOR_ONE,
            max_restarts=3,
            period=60,
            on_crash=lambda name, error: self.crashes.append(error),
        )
        with trio.fail_after(500):
            async with trio.open_nursery() as nursery:
                await nursery.start(supervisor.run)
                await trio.testing.wait_all_tasks_blocked()
                yield supervisor
                nursery.cancel_scope.cancel()


async def test_the_first_answer_is_the_result(autojump_clock: Clock) -> None:
    office = Office()
    answer = Ack((Reply("hello"),))
    office.script(answer)
    async with office.open():
        assert await office.deliver() == Delivered(answer, 1)
    [seen] = office.counterpart.seen
    assert (seen.attempt, seen.redelivered) == (1, False)


async def test_failures_are_tried_again_with_backoff_and_then_undelivered(autojump_clock: Clock) -> None:
    office = Office()
    office.script(*(Retry(reason=f"down {number}") for number in range(5)))
    async with office.open():
        assert await office.deliver() == Undelivered("down 2", 3)
        assert trio.current_time() == pytest.approx(0.75)
    assert [(one.attempt, one.redelivered) for one in office.counterpart.seen] == [
        (1, False),
        (2, True),
        (3, True),
    ]
    assert (office.service.statistics.attempts, office.service.statistics.failures) == (3, 3)


async def test_a_later_attempt_may_succeed(autojump_clock: Clock) -> None:
    office = Office()
    office.script(Retry(), Ack())
    async with office.open():
        assert await office.deliver() == Delivered(Ack(), 2)


async def test_an_attempt_is_bounded_by_the_timeout(autojump_clock: Clock) -> None:
    office = Office()
    office.script(100.0, 100.0, 3.9)
    async with office.open():
        assert await office.deliver() == Delivered(Ack(), 3)
        assert trio.current_time() == pytest.approx(4 + 0.25 + 4 + 0.5 + 3.9)


async def test_all_attempts_are_bounded_by_the_deadline(autojump_clock: Clock) -> None:
    office = Office()
    office.script(Retry(after=13.0), 100.0)
    async with office.open():
        result = await office.deliver()
        assert isinstance(result, Undelivered)
        assert result.attempts == 2
        assert trio.current_time() == pytest.approx(15.0)


async def test_a_retry_after_is_waited_for_within_the_deadline_and_not_counted(autojump_clock: Clock) -> None:
    office = Office()
    office.script(*(Retry(after=2.0) for _ in range(5)), Ack())
    async with office.open():
        assert await office.deliver() == Delivered(Ack(), 6)
        assert trio.current_time() == pytest.approx(10.0)


async def test_only_failures_by_themselves_are_counted(autojump_clock: Clock) -> None:
    office = Office()
    office.script(Retry(after=1.0), Retry(after=1.0), Retry(), Retry(), Ack())
    async with office.open():
        assert await office.deliver() == Delivered(Ack(), 5)


async def test_a_retry_after_beyond_the_deadline_is_left_to_the_dead_letters(autojump_clock: Clock) -> None:
    office = Office()
    office.script(Retry(after=60.0, reason="busy"))
    async with office.open():
        assert await office.deliver() == Undelivered("busy", 1, 60.0)
        assert trio.current_time() == 0


async def test_a_retry_after_of_nothing_does_not_hammer(autojump_clock: Clock) -> None:
    office = Office()
    office.script(*(Retry(after=0.0) for _ in range(1_000)))
    async with office.open():
        result = await office.deliver()
    assert isinstance(result, Undelivered)
    assert result.attempts <= 15 / 0.1 + 1


async def test_a_reject_is_final(autojump_clock: Clock) -> None:
    office = Office()
    office.script(Reject("no such ride"))
    async with office.open():
        assert await office.deliver() == Rejected("no such ride", 1)


async def test_an_unreadable_answer_is_delivered(autojump_clock: Clock) -> None:
    office = Office()
    office.script(Unreadable("not JSON"))
    async with office.open():
        assert await office.deliver() == Delivered(Ack(), 1, unreadable=True)


async def test_without_the_lease_no_attempt_is_started(autojump_clock: Clock) -> None:
    office = Office()
    async with office.open():
        office.held = False
        with pytest.raises(NotOwner):
            await office.deliver()
        assert office.counterpart.seen == []
        office.held = True
        assert await office.deliver() == Delivered(Ack(), 1)  # the lane lives on


async def test_a_lease_lost_between_attempts_stops_them(autojump_clock: Clock) -> None:
    office = Office()
    office.script(Retry(), Retry())
    async with office.open(), trio.open_nursery() as nursery:
        nursery.start_soon(office.note, "a")
        await trio.sleep(0.1)
        office.held = False
    assert office.results == ["NotOwner"]
    assert len(office.counterpart.seen) == 1


async def test_lanes_are_the_concurrency_and_the_mailbox_is_bounded(autojump_clock: Clock) -> None:
    office = Office(lanes=2, waiting=1, takes=1.0)
    async with office.open():
        assert office.counterpart.open_lanes == 2
        async with trio.open_nursery() as nursery:
            for text in "abcde":
                nursery.start_soon(office.note, text)
                await trio.testing.wait_all_tasks_blocked()
            assert len(office.counterpart.seen) == 2
            assert office.taken == [(0, 1), (0, 1)]
            with pytest.raises(MailboxFull):
                await office.deliver("f")
        assert trio.current_time() == pytest.approx(3.0)
        assert office.taken == [(0, 1), (0, 1), (1.0, 0), (1.0, 0), (2.0, 1)]


async def test_a_crashed_lane_ends_what_was_in_hand_and_keeps_what_waits(autojump_clock: Clock) -> None:
    office = Office(lanes=2, takes=1.0)
    office.script(OSError("bug"), text="crash")
    office.script(3.0, text="with it")
    async with office.open():
        async with trio.open_nursery() as nursery:
            for text in ("crash", "with it", "waits"):
                nursery.start_soon(office.note, text)
                await trio.testing.wait_all_tasks_blocked()
        assert office.results == ["ActorDied", "ActorDied", Delivered(Ack(), 1)]
        assert len(office.crashes) == 1
        assert office.counterpart.open_lanes == 2


async def test_a_cancelled_asker_does_not_stop_the_attempt(autojump_clock: Clock) -> None:
    office = Office(takes=1.0)
    async with office.open():
        with trio.move_on_after(0.5):
            await office.deliver("a")
        assert await office.deliver("b") == Delivered(Ack(), 1)
        assert office.counterpart.texts == ["a", "b"]
        assert office.crashes == []


async def test_drain_finishes_what_was_taken(autojump_clock: Clock) -> None:
    office = Office(takes=1.0)
    async with office.open() as supervisor:
        async with trio.open_nursery() as nursery:
            for text in "abc":
                nursery.start_soon(office.note, text)
                await trio.testing.wait_all_tasks_blocked()
            await supervisor.drain()
        assert office.results == [Delivered(Ack(), 1)] * 3
        assert office.counterpart.open_lanes == 0


# The breaker


async def test_a_delivery_that_opens_the_breaker_is_deferred_with_its_attempts(autojump_clock: Clock) -> None:
    office = Office(breaker_failures=2)
    office.script(Retry(reason="one"), Retry(reason="two"))
    async with office.open():
        result = await office.deliver()
        assert isinstance(result, Deferred)
        assert result.attempts == 2
        assert "two" in result.reason


async def test_while_it_is_open_nothing_is_attempted(autojump_clock: Clock) -> None:
    office = Office(breaker_failures=2)
    office.script(Retry(), Retry())
    async with office.open():
        await office.deliver()
        result = await office.deliver("b")
        assert isinstance(result, Deferred)
        assert result.attempts == 0
        await trio.sleep(1)
        assert await office.deliver("b") == Delivered(Ack(), 1)
    assert [one.text for one in office.counterpart.seen] == ["a", "a", "b"]


async def test_a_service_that_refuses_or_puts_off_is_well(autojump_clock: Clock) -> None:
    office = Office(breaker_failures=2)
    async with office.open():
        for number, outcome in enumerate((Retry(), Reject("no"), Retry(), Unreadable("?"), Retry())):
            office.script(outcome, Reject("no") if number == 4 else Ack(), text=str(number))
            await office.deliver(str(number))
        office.script(Retry(after=1.0), Retry(after=1.0), Retry(after=60.0), text="later")
        assert await office.deliver("later") == Undelivered("retry", 3, 60.0)
        assert office.service.breaker.state is BreakerState.CLOSED


async def test_a_lane_that_crashes_during_the_only_try_leaves_room_for_another(autojump_clock: Clock) -> None:
    office = Office(breaker_failures=1)
    office.script(Retry(), ArithmeticError("bug"), Ack())
    async with office.open():
        await office.deliver()
        await trio.sleep(1)
        await office.note("a")
        assert office.results == ["ActorDied"]
        assert office.service.breaker.state is BreakerState.OPEN
        await trio.sleep(2)
        assert await office.deliver() == Delivered(Ack(), 1)


async def test_a_service_that_is_slow_is_left_alone_and_tried(autojump_clock: Clock) -> None:
    office = Office(takes=3.0, trips=Trips(5, slow_after=3.0))
    async with office.open():
        for number in range(MINIMUM):
            assert await office.deliver(str(number)) == Delivered(Ack(), 1)
        result = await office.deliver()
        assert isinstance(result, Deferred)
        assert "took 3 s or longer" in result.reason
        office.counterpart.takes = 0.1
        await trio.sleep(1)
        assert await office.deliver() == Delivered(Ack(), 1)
        assert office.service.breaker.state is BreakerState.CLOSED


# The budget


async def test_where_most_attempts_fail_few_deliveries_are_tried_again(autojump_clock: Clock) -> None:
    office = Office()
    for number in range(100):
        office.script(Retry(), Retry(), Retry(), text=str(number))
    async with office.open():
        results = [await office.deliver(str(number)) for number in range(100)]
    attempts = [result.attempts for result in results if isinstance(result, Undelivered)]
    assert len(attempts) == 100
    assert attempts[:10] == [3] * 10
    retries = sum(attempts) - 100
    assert RETRY_RESERVE <= retries <= RETRY_RESERVE + 100 * RETRY_SHARE
    assert len(office.counterpart.seen) == sum(attempts)


async def test_what_the_service_asked_for_later_costs_no_retry(autojump_clock: Clock) -> None:
    office = Office()
    async with office.open():
        for number in range(100):
            office.script(Retry(after=0.5), Ack(), text=str(number))
            assert await office.deliver(str(number)) == Delivered(Ack(), 2)


# How many attempts run at once


async def test_a_timeout_shrinks_the_limit_and_no_more_attempts_run_at_once_until_it_has_grown_back(
    autojump_clock: Clock,
) -> None:
    office = Office(lanes=4, least=1, waiting=100, takes=1.0)
    office.script(100.0, text="slow")
    async with office.open():
        assert office.service.concurrency.limit == office.counterpart.open_lanes == 4
        await office.deliver("slow")
        assert office.service.concurrency.limit == 2
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(office.note, str(number))
            await trio.sleep(0.5)
            assert office.counterpart.at_once[2:] == [1, 2]
        assert max(office.counterpart.at_once) == office.service.concurrency.limit == 4
        assert office.results == [Delivered(Ack(), 1)] * 20
        assert sorted(office.counterpart.texts[2:], key=int) == [str(number) for number in range(20)]
        assert office.counterpart.open_lanes == 4


async def test_timeouts_alone_leave_one_attempt_at_a_time(autojump_clock: Clock) -> None:
    office = Office(lanes=8, least=1, waiting=100)
    async with office.open():
        for number in range(8):
            office.script(100.0, 100.0, 100.0, text=f"slow {number}")
            await office.deliver(f"slow {number}")
        assert office.service.concurrency.limit == 1
        office.counterpart.takes = 1.0
        began = len(office.counterpart.seen)
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(office.note, str(number))
        assert office.counterpart.at_once[began : began + 2] == [1, 1]


async def test_failures_do_not_make_it_grow_and_every_answer_does(autojump_clock: Clock) -> None:
    for outcome in (Ack(), Reject("no"), Unreadable("?")):
        office = Office(lanes=2, least=1)
        office.script(100.0, Retry(), Retry())
        office.script(*(Retry() for _ in range(30)), *(Retry(after=0.1) for _ in range(5)), text="b")
        async with office.open():
            for text in ("a", *"bbbbb"):
                await office.deliver(text)
                assert office.service.concurrency.limit == 1
            office.script(outcome, text="c")
            await office.deliver("c")
            assert office.service.concurrency.limit == 2


async def test_what_each_attempt_took_is_observed_unless_it_was_broken_off(autojump_clock: Clock) -> None:
    office = Office()
    office.script(Retry(), 0.2, text="a")
    office.script(100.0, 0.3, text="b")
    office.script(OSError("bug"), text="crash")
    async with office.open():
        for text in ("a", "b", "crash"):
            await office.note(text)
        latency = office.service.statistics.latency.snapshot()
    assert office.service.statistics.attempts == 5
    assert latency.count == 4
    assert latency.seconds == pytest.approx(0.0 + 0.2 + 4.0 + 0.3)


# Replaced by another one


async def test_one_that_is_retired_finishes_what_runs_and_sends_on_what_waits(autojump_clock: Clock) -> None:
    office = Office(lanes=2, takes=1.0)
    async with office.open(), trio.open_nursery() as nursery:
        for text in "abcde":
            nursery.start_soon(office.note, text)
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(0.5)
        office.service.retire()
        await trio.testing.wait_all_tasks_blocked()
        assert office.results == [Moved()] * 3
        assert trio.current_time() == 0.5
        await trio.sleep(0.6)
        assert office.results[3:] == [Delivered(Ack(), 1)] * 2
        assert office.counterpart.texts == ["a", "b"]
        assert office.counterpart.open_lanes == 0
        assert office.crashes == []


async def test_a_delivery_that_waits_for_its_next_attempt_moves_with_those_that_were_made(
    autojump_clock: Clock,
) -> None:
    office = Office(lanes=2)
    office.script(Retry(), Retry(), text="twice")
    office.script(Retry(after=5.0), text="put off")
    async with office.open(), trio.open_nursery() as nursery:
        nursery.start_soon(office.note, "twice")
        nursery.start_soon(office.note, "put off")
        await trio.sleep(0.5)
        assert len(office.counterpart.seen) == 3
        office.service.retire()
        await trio.testing.wait_all_tasks_blocked()
        assert trio.current_time() == 0.5
        assert sorted(office.results, key=repr) == [Moved(1), Moved(2)]
        await trio.sleep(10)
        assert len(office.counterpart.seen) == 3


async def test_an_attempt_that_fails_after_it_was_retired_is_not_followed_by_another(
    autojump_clock: Clock,
) -> None:
    office = Office(takes=1.0)
    office.script(Retry())
    async with office.open(), trio.open_nursery() as nursery:
        nursery.start_soon(office.note, "a")
        await trio.sleep(0.5)
        office.service.retire()
        await trio.sleep(10)
        assert office.results == [Moved(1)]
        assert len(office.counterpart.seen) == 1


async def test_deliveries_that_lanes_hold_beyond_the_limit_move_too(autojump_clock: Clock) -> None:
    office = Office(lanes=2, least=1, takes=1.0)
    office.script(100.0, Retry(), Retry(), text="slow")
    async with office.open(), trio.open_nursery() as nursery:
        await office.deliver("slow")
        assert office.service.concurrency.limit == 1
        for text in "abc":
            nursery.start_soon(office.note, text)
            await trio.testing.wait_all_tasks_blocked()
        assert office.service.room == 9  # one runs, one is held, one waits
        office.service.retire()
        await trio.sleep(2)
        assert office.results == [Moved(), Moved(), Delivered(Ack(), 1)]
        assert office.counterpart.open_lanes == 0


async def test_retries_do_not_run_beyond_the_limit_either(autojump_clock: Clock) -> None:
    office = Office(lanes=8, least=1)
    office.script(*(100.0 for _ in range(24)))
    async with office.open(), trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(office.note, "a")
        await trio.sleep(4.5)
        assert office.service.concurrency.limit == 5
        assert max(office.counterpart.at_once[8:]) <= 5


async def test_what_lanes_hold_beyond_the_limit_has_its_turn_before_what_comes_later(
    autojump_clock: Clock,
) -> None:
    office = Office(lanes=8, least=1, waiting=100)
    for number in range(8):
        office.script(100.0, Retry(), Retry(), text=f"slow {number}")
    async with office.open():
        for number in range(8):
            await office.deliver(f"slow {number}")
        assert office.service.concurrency.limit == 1
        office.counterpart.takes = 1.0
        before = len(office.counterpart.seen)
        async with trio.open_nursery() as nursery:
            for number in range(40):
                office.script(Retry(after=60.0), text=str(number))  # no answer that lets it grow
                nursery.start_soon(office.note, str(number))
                await trio.testing.wait_all_tasks_blocked()
        told = [int(text) for text in office.counterpart.texts[before:]]
        assert all(abs(told.index(number) - number) <= 8 for number in range(40))
