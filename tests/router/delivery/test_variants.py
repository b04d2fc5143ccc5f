"""A canary has its conversations while it is well, and a shadow gets copies that nobody waits for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from doubles import START, Counterpart, service
from hypothesis import given
from hypothesis import strategies as st
from tables import each
from texts import texts

from actors.breaker import Breaker, BreakerState, Trips
from actors.messages import Ack, Envelope, Outcome, Reject, Reply, Retry, Session
from actors.ports import Handler, Unreadable
from actors.service import Deliver, Delivered, Moved, OpenLane, Result
from router.delivery.variants import Canary, Shadow, is_in_share
from router.retry import Backoff

Clock = trio.testing.MockClock
KEYS = [f"100:{250_700_000_000 + number}" for number in range(5_000)]


def envelope(key: str = "100:1", text: str = "a", attempt: int = 1) -> Envelope:
    return Envelope(
        id="msg_1",
        message_id=None,
        domain="rides",
        session=Session(key=key, phone_number_id="100"),
        message={"type": "text", "text": {"body": text}},
        received_at=START,
        correlation_id="c",
        attempt=attempt,
    )


class TestShare:
    @each("domain", ["rides", "jobs"])
    @each("share", [0.1, 0.5, 0.9])
    def test_about_that_share_of_the_conversations_is_in_it(self, domain: str, share: float) -> None:
        chosen = sum(is_in_share(key, share, domain) for key in KEYS)
        assert abs(chosen / len(KEYS) - share) < 0.02

    def test_all_of_them_are_in_the_whole(self) -> None:
        assert all(is_in_share(key, 1.0, "rides") for key in KEYS)

    @given(texts(), st.floats(0.001, 1.0), st.floats(0.001, 1.0))
    def test_it_is_the_same_each_time_and_a_larger_share_has_all_of_a_smaller_one(
        self, key: str, one: float, other: float
    ) -> None:
        smaller, larger = sorted((one, other))
        assert is_in_share(key, smaller, "rides") is is_in_share(key, smaller, "rides")
        assert is_in_share(key, larger, "rides") or not is_in_share(key, smaller, "rides")

    def test_two_domains_do_not_try_things_out_on_the_same_conversations(self) -> None:
        rides, jobs = ({key for key in KEYS if is_in_share(key, 0.1, name)} for name in ("rides", "jobs"))
        assert len(rides & jobs) < 0.2 * len(rides)


IN_SHARE = next(key for key in KEYS if is_in_share(key, 0.1, "rides"))
OUTSIDE = next(key for key in KEYS if not is_in_share(key, 0.1, "rides"))


class Pair:
    """A stable service and its canary, which has a tenth of the conversations. Its breaker opens after two
    failures, for 1, 2, 4 ... seconds.
    """

    def __init__(self) -> None:
        self.stable, self.other = Counterpart(), Counterpart()
        self.states: list[str] = []
        self.breaker = Breaker(
            Trips(2, failure_ratio=2),
            pause=Backoff(lambda: 1.0).pause,
            clock=trio.current_time,
            on_change=lambda: self.states.append(str(self.breaker.state)),
        )
        self.canary = Canary("rides", 0.1, self.other.lane, breaker=self.breaker)

    @asynccontextmanager
    async def lane(self) -> AsyncIterator[Handler]:
        with trio.fail_after(1_000):
            async with self.canary.beside(self.stable.lane)() as handler:
                yield handler

    @property
    def counted(self) -> tuple[int, int]:
        return self.canary.statistics.attempts, self.canary.statistics.failures


class TestCanary:
    async def test_it_has_its_conversations_and_no_others(self, autojump_clock: Clock) -> None:
        pair = Pair()
        answer = Ack((Reply("from the canary"),))
        pair.other.script["a"].append(answer)
        async with pair.lane() as lane:
            assert (pair.stable.open_lanes, pair.other.open_lanes) == (1, 1)
            assert await lane.attempt(envelope(IN_SHARE)) is answer
            assert await lane.attempt(envelope(OUTSIDE)) == Ack()
            for key in KEYS[:500]:
                await lane.attempt(envelope(key))
        expected = [IN_SHARE, *(key for key in KEYS[:500] if is_in_share(key, 0.1, "rides"))]
        assert [one.session.key for one in pair.other.seen] == expected
        assert len(pair.other.seen) + len(pair.stable.seen) == 502
        assert pair.counted == (len(expected), 0)
        assert (pair.stable.open_lanes, pair.other.open_lanes) == (0, 0)

    async def test_while_it_fails_its_conversations_are_with_the_stable_one(
        self, autojump_clock: Clock
    ) -> None:
        pair = Pair()
        pair.other.script["a"].extend(Retry(reason="down") for _ in range(3))
        async with pair.lane() as lane:
            for _ in range(2):
                assert await lane.attempt(envelope(IN_SHARE)) == Ack()
            assert [one.redelivered for one in pair.stable.seen] == [True, True]
            assert pair.breaker.state is BreakerState.OPEN
            assert pair.breaker.reason == "down"
            for _ in range(5):
                assert await lane.attempt(envelope(IN_SHARE)) == Ack()
            assert (len(pair.other.seen), len(pair.stable.seen)) == (2, 7)
            assert not pair.stable.seen[-1].redelivered

            await trio.sleep(1)
            assert await lane.attempt(envelope(OUTSIDE)) == Ack()  # says nothing about it
            assert pair.breaker.state is BreakerState.OPEN
            assert await lane.attempt(envelope(IN_SHARE)) == Ack()
            assert await lane.attempt(envelope(IN_SHARE)) == Ack()
            assert (len(pair.other.seen), len(pair.stable.seen)) == (3, 10)

            await trio.sleep(2)
            for _ in range(5):
                assert await lane.attempt(envelope(IN_SHARE)) == Ack()
            assert (len(pair.other.seen), len(pair.stable.seen)) == (8, 10)
        assert pair.states == ["open", "half-open", "open", "half-open", "closed"]
        assert pair.counted == (8, 3)

    async def test_one_attempt_at_a_time_tries_it_again(self, autojump_clock: Clock) -> None:
        pair = Pair()
        pair.other.script["a"].extend([Retry(), Retry(), 3.0])
        async with pair.lane() as lane, trio.open_nursery() as nursery:
            for _ in range(2):
                await lane.attempt(envelope(IN_SHARE))
            await trio.sleep(1)
            for _ in range(3):
                nursery.start_soon(lane.attempt, envelope(IN_SHARE))
            await trio.sleep(1)
            assert (len(pair.other.seen), len(pair.stable.seen)) == (3, 4)

    @each("outcome", [Ack(), Unreadable("?")])
    async def test_whoever_answers_is_well(self, autojump_clock: Clock, outcome: object) -> None:
        pair = Pair()
        pair.other.script["a"].extend([outcome] * 10)
        async with pair.lane() as lane:
            for _ in range(10):
                assert await lane.attempt(envelope(IN_SHARE)) is outcome
        assert pair.states == []
        assert pair.counted == (10, 0)

    async def test_an_attempt_without_an_answer_in_time_has_failed(self, autojump_clock: Clock) -> None:
        pair = Pair()
        pair.other.script["a"].extend([100.0] * 2)
        async with pair.lane() as lane:
            for _ in range(2):
                with trio.move_on_after(4.0):
                    assert await lane.attempt(envelope(IN_SHARE)) == Ack()
            assert trio.current_time() == pytest.approx(4.0)  # it has half of the time of an attempt
            assert pair.breaker.state is BreakerState.OPEN
            assert pair.breaker.reason == "no answer within 2 s"
            assert await lane.attempt(envelope(IN_SHARE)) == Ack()
        assert pair.counted == (2, 2)
        assert len(pair.stable.seen) == 3

    async def test_one_that_was_broken_off_says_nothing(self, autojump_clock: Clock) -> None:
        pair = Pair()
        pair.other.script["a"].extend([100.0] * 5)
        async with pair.lane() as lane:
            for _ in range(5):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(lane.attempt, envelope(IN_SHARE))
                    await trio.sleep(3.0)
                    nursery.cancel_scope.cancel()
        assert pair.states == []
        assert pair.counted == (5, 0)

    @each(("outcome", "opens"), [(Retry(after=300.0), True), (Retry(), True), (Reject("no"), False)])
    async def test_what_it_does_not_take_is_for_the_stable_one(
        self, autojump_clock: Clock, outcome: object, opens: bool
    ) -> None:
        pair = Pair()
        pair.other.script["a"].extend([outcome] * 10)
        async with pair.lane() as lane:
            for _ in range(10):
                assert await lane.attempt(envelope(IN_SHARE)) == Ack()
        assert len(pair.stable.seen) == 10
        assert len(pair.other.seen) == (2 if opens else 10)
        assert (pair.breaker.state is BreakerState.OPEN) is opens

    async def test_a_bug_in_a_lane_is_nobodys_answer(self, autojump_clock: Clock) -> None:
        pair = Pair()
        pair.other.script["a"].append(OSError("bug"))
        async with pair.lane() as lane:
            with pytest.raises(OSError, match="bug"):
                await lane.attempt(envelope(IN_SHARE))
        assert pair.counted == (1, 0)


async def test_a_canary_that_fails_does_not_keep_its_conversations_from_the_stable_one(
    autojump_clock: Clock,
) -> None:
    pair, results = Pair(), []
    pair.other.script["a"].extend(Retry(reason="down") for _ in range(1_000))
    rides = service("rides", pair.lane, trips=Trips(2, failure_ratio=2))
    with trio.fail_after(1_000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rides.run)
            for _ in range(60):
                message = envelope(IN_SHARE)
                results.append(await rides.address.ask_nowait(lambda promise: Deliver(message, promise)))  # noqa: B023
                await trio.sleep(1)
            nursery.cancel_scope.cancel()
    assert sum(isinstance(result, Delivered) for result in results) > 30


class Beside:
    """A service with lanes to itself and to its shadow, which gets copies of all conversations; share 0.1:
    of a tenth.
    """

    def __init__(self, share: float = 1.0, *, lanes: int = 1, takes: float = 0.0) -> None:
        self.usual, self.other = Counterpart(takes=takes), Counterpart()
        self.shadow = Shadow("rides", share, self.other.lane, timeout=4.0)
        self.service = service("rides", self.lane, lanes=lanes, waiting=100)

    @property
    def lane(self) -> OpenLane:
        return self.shadow.beside(self.usual.lane)

    async def deliver(self, key: str = "100:1", text: str = "a") -> Result | Moved:
        return await self.service.address.ask_nowait(lambda promise: Deliver(envelope(key, text), promise))

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        with trio.fail_after(10_000):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.service.run)
                yield
                nursery.cancel_scope.cancel()

    @property
    def counted(self) -> tuple[int, int, int]:
        told = self.shadow.statistics
        return told.copies, told.failures, told.dropped


class TestShadow:
    async def test_it_gets_a_copy_of_the_first_attempt_only(self, autojump_clock: Clock) -> None:
        both = Beside()
        answer = Ack((Reply("the usual one"),))
        both.usual.script["a"].extend([Retry(), Retry(), answer])
        both.other.script["a"].append(Ack((Reply("the shadow"),)))
        async with both.open():
            assert await both.deliver() == Delivered(answer, 3)
            await trio.sleep(1)
        assert [one.attempt for one in both.usual.seen] == [1, 2, 3]
        assert [one.attempt for one in both.other.seen] == [1]
        assert both.other.seen[0] is both.usual.seen[0]
        assert both.counted == (1, 0, 0)

    async def test_it_gets_its_share_of_the_conversations(self, autojump_clock: Clock) -> None:
        both = Beside(0.1)
        async with both.open():
            for key in KEYS[:500]:
                await both.deliver(key)
                await trio.testing.wait_all_tasks_blocked()
        assert len(both.usual.seen) == 500
        expected = [key for key in KEYS[:500] if is_in_share(key, 0.1, "rides")]
        assert [one.session.key for one in both.other.seen] == expected

    @each("outcome", [Retry(reason="down"), Retry(after=60.0), Reject("no"), Unreadable("?")])
    async def test_what_it_answers_changes_nothing(self, autojump_clock: Clock, outcome: object) -> None:
        both = Beside()
        both.other.script["a"].extend([outcome] * 30)
        async with both.open():
            for _ in range(30):
                assert await both.deliver() == Delivered(Ack(), 1)
                await trio.sleep(0.1)
            assert both.service.breaker.state is BreakerState.CLOSED
            assert both.service.statistics.failures == 0
        if not isinstance(outcome, Unreadable):
            assert both.counted == (30, 0 if isinstance(outcome, Reject) else 30, 0)

    async def test_nothing_waits_for_one_that_is_slow(self, autojump_clock: Clock) -> None:
        both = Beside(takes=0.1)
        both.other.takes = 3.0
        async with both.open():
            for number in range(10):
                assert await both.deliver(text=str(number)) == Delivered(Ack(), 1)
            assert trio.current_time() == pytest.approx(1.0)
            assert len(both.other.seen) == 1
            await trio.sleep(100)
        assert both.other.texts == both.usual.texts == [str(number) for number in range(10)]
        assert both.counted == (10, 0, 0)
        assert both.service.statistics.latency.snapshot().seconds == pytest.approx(1.0)

    async def test_one_that_does_not_answer_is_given_up_each_time(self, autojump_clock: Clock) -> None:
        both = Beside()
        both.other.takes = 1_000.0
        async with both.open():
            for number in range(3):
                await both.deliver(text=str(number))
            await trio.sleep(11)
            assert both.counted == (3, 2, 0)
            await trio.sleep(2)
        assert both.counted == (3, 3, 0)

    async def test_what_does_not_fit_is_dropped_and_counted(self, autojump_clock: Clock) -> None:
        both = Beside()
        both.other.takes = 3.0
        async with both.open():
            for number in range(50):
                assert await both.deliver(text=str(number)) == Delivered(Ack(), 1)
                await trio.testing.wait_all_tasks_blocked()
            assert both.counted == (1, 0, 50 - 1 - 16)
            await trio.sleep(100)
            assert both.other.texts == [str(number) for number in range(17)]
            await both.deliver(text="later")
            await trio.sleep(1)
            assert both.other.texts[-1] == "later"
        assert both.counted == (18, 0, 33)

    async def test_lanes_end_with_a_copy_under_way(self, autojump_clock: Clock) -> None:
        both = Beside(lanes=3)
        both.other.takes = 3.0
        async with both.open():
            await trio.testing.wait_all_tasks_blocked()
            assert (both.usual.open_lanes, both.other.open_lanes) == (3, 3)
            await both.deliver()
            await trio.testing.wait_all_tasks_blocked()
            both.service.drain()
            await trio.testing.wait_all_tasks_blocked()
            assert trio.current_time() == 0
            assert (both.usual.open_lanes, both.other.open_lanes) == (0, 0)


async def test_a_bug_in_the_shadows_lane_changes_nothing() -> None:
    both = Beside()
    both.usual.takes = 0.0
    both.other.script["a"].append(OSError("bug"))
    async with both.open():
        assert await both.deliver() == Delivered(Ack(), 1)
        await trio.testing.wait_all_tasks_blocked()
        assert await both.deliver(text="b") == Delivered(Ack(), 1)


async def test_a_shadow_sees_what_a_canary_has_too(autojump_clock: Clock) -> None:
    pair, shadow = Pair(), Counterpart()
    both = Shadow("rides", 1.0, shadow.lane, timeout=4.0)
    async with both.beside(pair.canary.beside(pair.stable.lane))() as lane:
        for key in (IN_SHARE, OUTSIDE):
            outcome: Outcome | Unreadable = await lane.attempt(envelope(key))
            assert outcome == Ack()
        await trio.sleep(1)
    assert [one.session.key for one in shadow.seen] == [IN_SHARE, OUTSIDE]
    assert (len(pair.other.seen), len(pair.stable.seen)) == (1, 1)
