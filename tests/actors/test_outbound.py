"""Replies leave in order, once where nothing fails, and what cannot go now goes later."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest
import trio
import trio.testing
from doubles import virtual_now
from hypothesis import given
from hypothesis import strategies as st
from memory_outbox import MemoryOutbox, PhoneNetwork

from actors.breaker import Breaker, BreakerState, Trips
from actors.errors import JournalUnavailable, LeaseLost
from actors.messages import Later, Refused, SendOutcome, Sent
from actors.outbound import Outbound
from router.retry import Backoff


class Desk:
    """An outbound actor between an outbox and a phone network."""

    def __init__(self, *, lanes: int = 3, breaker_failures: int = 3, timeout: float = 5.0) -> None:
        self.outbox = MemoryOutbox(clock=virtual_now)
        self.phones = PhoneNetwork()
        self.troubles: list[JournalUnavailable] = []
        self.held = True
        backoff = Backoff(lambda: 0.5)
        self.outbound = Outbound(
            self.outbox,
            epoch=1,
            open_sender=self.phones.lane,
            lanes=lanes,
            timeout=timeout,
            max_age=timedelta(hours=1),
            policy=backoff,
            breaker=Breaker(
                Trips(breaker_failures), pause=backoff.pause, clock=trio.current_time, on_change=lambda: None
            ),
            may_attempt=lambda: self.held,
            clock=virtual_now,
            on_unavailable=self.troubles.append,
        )

    def reply(self, key: str, *texts: str) -> None:
        self.outbox.put(key, *texts)
        self.outbound.committed()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        with trio.fail_after(100_000):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.outbound.run)
                yield
                self.outbound.drain()

    async def sent_all(self, *, look_every: float = 0.1) -> None:
        while self.outbox.in_status("pending"):  # noqa: ASYNC110  # virtual time
            await trio.sleep(look_every)


async def test_replies_go_out_in_order_several_conversations_at_once(autojump_clock: trio.abc.Clock) -> None:
    desk = Desk()
    desk.phones.takes = 0.1
    for number in range(20):
        for key in "abcde":
            desk.outbox.put(key, f"{key}{number}")
    async with desk.running():
        await desk.sent_all()
    for key in "abcde":
        assert desk.phones.to(key) == [f"{key}{number}" for number in range(20)]
    assert desk.phones.at_once == 3
    assert desk.outbox.rows[0].message_id == "wamid.1"
    assert desk.outbound.statistics.sent == 100


async def test_what_is_committed_later_goes_at_once(autojump_clock: trio.abc.Clock) -> None:
    desk = Desk()
    async with desk.running():
        await trio.sleep(1)
        started = trio.current_time()
        desk.reply("a", "one")
        await trio.testing.wait_all_tasks_blocked()
        assert desk.phones.to("a") == ["one"]
        assert trio.current_time() == started


async def test_a_reply_that_has_to_wait_holds_up_its_conversation_only(
    autojump_clock: trio.abc.Clock,
) -> None:
    desk = Desk(lanes=1)
    desk.phones.answers.extend([Later("pair", only_this_one=True)] * 3)
    desk.outbox.put("a", "a1", "a2")
    desk.outbox.put("b", "b1")
    async with desk.running():
        await desk.sent_all()
    assert desk.phones.taken[-1] == ("a", "a2")
    assert desk.phones.to("a") == ["a1", "a2"]
    assert desk.outbound.breaker.state is BreakerState.CLOSED
    assert desk.outbound.statistics.put_off == 3


async def test_one_that_is_refused_lets_the_next_one_go(autojump_clock: trio.abc.Clock) -> None:
    desk = Desk()
    desk.phones.answers.append(Refused("no"))
    desk.outbox.put("a", "a1", "a2")
    async with desk.running():
        await desk.sent_all()
    assert (desk.outbox.in_status("failed"), desk.outbox.in_status("sent")) == (["a1"], ["a2"])
    assert desk.outbox.rows[0].error == "no"


async def test_a_sender_that_is_down_is_left_alone_and_tried(autojump_clock: trio.abc.Clock) -> None:
    desk = Desk(lanes=2)
    desk.phones.answers.extend([Later("down")] * 12)
    for number in range(50):
        desk.outbox.put(f"{number}", "one", "two")
    async with desk.running():
        await trio.sleep(20)
        few = len(desk.phones.attempts)
        assert few < 12
        await desk.sent_all()
    assert len(desk.phones.taken) == 100
    assert all(desk.phones.to(f"{number}") == ["one", "two"] for number in range(50))


async def test_an_answer_that_does_not_come_is_waited_for_no_longer(autojump_clock: trio.abc.Clock) -> None:
    desk = Desk(lanes=1, timeout=2.0)
    desk.phones.hangs_on = {"a1"}
    desk.outbox.put("a", "a1")
    desk.outbox.put("b", "b1")
    async with desk.running():
        await trio.sleep(2.5)
        assert desk.phones.to("b") == ["b1"]
        desk.phones.hangs_on.clear()
        await desk.sent_all()
    assert desk.phones.attempts == ["a1", "b1", "a1"]


async def test_what_could_not_be_sent_for_too_long_has_failed(autojump_clock: trio.abc.Clock) -> None:
    desk = Desk()
    desk.phones.answers.extend([Later("down")] * 10_000)
    desk.outbox.put("a", "a1")
    async with desk.running():
        await desk.sent_all(look_every=60)
    assert desk.outbox.in_status("failed") == ["a1"]
    assert trio.current_time() < 2 * 3_600


async def test_an_outbox_that_is_away_is_waited_for_and_nothing_is_sent_twice(
    autojump_clock: trio.abc.Clock,
) -> None:
    desk = Desk()
    desk.outbox.put("a", "a1", "a2")
    async with desk.running():
        await trio.testing.wait_all_tasks_blocked()
        desk.outbox.fail(7)
        desk.reply("b", "b1")
        await desk.sent_all()
    assert desk.phones.attempts == ["a1", "a2", "b1"]
    assert desk.troubles


async def test_what_is_being_put_on_record_is_not_taken_for_unsent(autojump_clock: trio.abc.Clock) -> None:
    desk = Desk()

    async def slowly(method: str) -> None:
        await trio.sleep(1.0 if method == "record" else 0.0)

    desk.outbox.before = slowly
    async with desk.running():
        desk.reply("a", "a1")
        await trio.sleep(0.5)
        desk.reply("b", "b1")
        await desk.sent_all()
    assert desk.phones.attempts == ["a1", "b1"]


async def test_without_the_lease_nothing_is_attempted(autojump_clock: trio.abc.Clock) -> None:
    desk = Desk()
    desk.held = False
    desk.outbox.put("a", "a1")
    async with desk.running():
        await trio.sleep(10)
        assert desk.phones.attempts == []
        desk.held = True
        await desk.sent_all()


async def test_an_epoch_that_is_over_ends_it(autojump_clock: trio.abc.Clock) -> None:
    desk = Desk()
    desk.outbox.epoch = 2
    desk.outbox.put("a", "a1")
    with pytest.RaisesGroup(LeaseLost, flatten_subgroups=True):
        await desk.outbound.run()
    assert desk.outbox.in_status("pending") == ["a1"]


async def test_a_drain_finishes_what_is_under_way(autojump_clock: trio.abc.Clock) -> None:
    desk = Desk(lanes=1)
    desk.phones.takes = 1.0
    desk.outbox.put("a", "a1", "a2", "a3")
    async with desk.running():
        await trio.sleep(1.5)
    assert (desk.outbox.in_status("sent"), desk.outbox.in_status("pending")) == (["a1", "a2"], ["a3"])


async def test_cancelled_in_an_attempt_it_is_sent_again_by_the_next_one(
    autojump_clock: trio.abc.Clock,
) -> None:
    desk = Desk(lanes=1)
    desk.phones.takes = 1.0
    desk.outbox.put("a", "a1", "a2")
    with trio.move_on_after(1.5):
        await desk.outbound.run()
    assert desk.outbox.in_status("pending") == ["a2"]
    assert desk.outbound.breaker.state is BreakerState.CLOSED
    again = Desk(lanes=1)
    again.outbox.rows = desk.outbox.rows
    async with again.running():
        await again.sent_all()
    assert again.phones.attempts == ["a2"]


_OUTCOMES = st.sampled_from(
    [Later("down"), Later("asked", 3.0), Later("pair", only_this_one=True), Refused("never"), Sent("wamid")]
)


@given(
    replies=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 4)), max_size=25),
    answers=st.lists(_OUTCOMES, max_size=25),
    away=st.lists(st.integers(0, 3), max_size=6),
)
def test_whatever_happens_each_is_sent_once_in_order(
    replies: list[tuple[str, int]], answers: list[SendOutcome], away: list[int]
) -> None:
    said: dict[str, list[str]] = {}

    async def run() -> None:
        desk = Desk(lanes=2)
        desk.phones.answers.extend(answers)
        async with desk.running():
            for number, (key, count) in enumerate(replies):
                texts = [f"{number}.{ordinal}" for ordinal in range(count)]
                said.setdefault(key, []).extend(texts)
                desk.reply(key, *texts)
                if number < len(away):
                    desk.outbox.fail(away[number])
                    await trio.sleep(0.3)
            await desk.sent_all()
        failed = set(desk.outbox.in_status("failed"))
        assert len(failed) == sum(isinstance(one, Refused) for one in answers[: len(desk.phones.attempts)])
        for key, texts in said.items():
            assert desk.phones.to(key) == [text for text in texts if text not in failed]

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
