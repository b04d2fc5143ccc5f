"""The mailbox: bounded, first in first out, one checkpoint per batch, nothing lost by cancellation."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors.kernel import Mailbox, MailboxClosed, MailboxFull


def test_capacity_has_no_default() -> None:
    make: Any = Mailbox
    with pytest.raises(TypeError):
        make()


@pytest.mark.parametrize("capacity", [0, -1])
def test_capacity_is_at_least_one(capacity: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Mailbox(capacity)


async def test_capacity_is_enforced() -> None:
    mailbox: Mailbox[int] = Mailbox(2)
    assert [mailbox.put_nowait(1), mailbox.put_nowait(2)] == [1, 2]
    with pytest.raises(MailboxFull):
        mailbox.put_nowait(3)
    assert len(mailbox) == 2
    assert repr(mailbox) == "<Mailbox 2/2 open>"


async def test_drain_takes_everything_oldest_first() -> None:
    mailbox: Mailbox[int] = Mailbox(5)
    for number in range(5):
        mailbox.put_nowait(number)
    assert await mailbox.drain() == [0, 1, 2, 3, 4]
    assert len(mailbox) == 0


async def test_drain_takes_at_most_the_limit() -> None:
    mailbox: Mailbox[int] = Mailbox(5)
    for number in range(5):
        mailbox.put_nowait(number)
    assert await mailbox.drain(2) == [0, 1]
    assert mailbox.taken_count == 2
    assert await mailbox.drain(9) == [2, 3, 4]


class _Steps(trio.abc.Instrument):
    def __init__(self, task: trio.lowlevel.Task) -> None:
        self.task = task
        self.count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += task is self.task


async def test_a_drained_batch_costs_one_checkpoint() -> None:
    mailbox: Mailbox[int] = Mailbox(1_000)
    for number in range(1_000):
        mailbox.put_nowait(number)
    steps = _Steps(trio.lowlevel.current_task())
    trio.lowlevel.add_instrument(steps)
    try:
        with trio.testing.assert_checkpoints():
            assert len(await mailbox.drain()) == 1_000
    finally:
        trio.lowlevel.remove_instrument(steps)
    assert steps.count == 1


@pytest.mark.parametrize(("linger", "least", "most"), [(0, 1, 2), (3, 3, 5), (50, 6, 6)])
async def test_a_lingering_drain_ends_with_a_pass_that_brings_nothing(
    linger: int, least: int, most: int
) -> None:
    async def taken() -> int:
        mailbox: Mailbox[int] = Mailbox(10)
        mailbox.put_nowait(0)

        async def put_one_in_each_pass() -> None:
            for number in range(1, 6):
                mailbox.put_nowait(number)
                await trio.lowlevel.checkpoint()
            for _ in range(3):
                await trio.lowlevel.checkpoint()
            mailbox.put_nowait(6)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(put_one_in_each_pass)
            found = await mailbox.drain(linger=linger)
        assert found == list(range(len(found)))
        return len(found)

    # Who runs first in a pass is left to chance: one of them may seem to bring nothing, or two things.
    assert least <= max([await taken() for _ in range(200)]) <= most


async def test_a_lingering_drain_that_is_cancelled_took_nothing() -> None:
    mailbox: Mailbox[str] = Mailbox(10)
    mailbox.put_nowait("a")
    with trio.CancelScope() as scope:
        scope.cancel()
        await mailbox.drain(linger=3)
    assert mailbox.drain_nowait() == ["a"]


async def test_each_message_wakes_a_reader_of_its_own() -> None:
    mailbox: Mailbox[str] = Mailbox(10)
    taken: list[list[str]] = []

    async def lane() -> None:
        taken.append(await mailbox.drain(1))
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(lane)
        await trio.testing.wait_all_tasks_blocked()
        mailbox.put_nowait("a")
        mailbox.put_nowait("b")
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(taken) == [["a"], ["b"]]
        nursery.cancel_scope.cancel()


async def test_put_and_drain_are_checkpoints() -> None:
    mailbox: Mailbox[int] = Mailbox(1)
    with trio.testing.assert_checkpoints():
        await mailbox.put(1)
    with trio.testing.assert_checkpoints():
        await mailbox.drain()


async def test_put_waits_for_room() -> None:
    mailbox: Mailbox[str] = Mailbox(1)
    mailbox.put_nowait("a")
    tickets: list[int] = []

    async def put() -> None:
        tickets.append(await mailbox.put("b"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(put)
        await trio.testing.wait_all_tasks_blocked()
        assert mailbox.statistics().tasks_waiting_put == 1
        assert not tickets
        assert await mailbox.drain() == ["a"]
    assert tickets == [2]
    assert mailbox.drain_nowait() == ["b"]


async def test_waiting_putters_get_room_in_the_order_they_came() -> None:
    for _ in range(20):  # trio shuffles tasks that are woken together
        mailbox: Mailbox[int] = Mailbox(4)
        for _ in range(4):
            mailbox.put_nowait(-1)
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(mailbox.put, number)
                await trio.testing.wait_all_tasks_blocked()
            taken: list[int] = []
            while len(taken) < 12:
                taken += await mailbox.drain()
        assert taken == [-1] * 4 + list(range(8))


async def test_a_limited_drain_makes_room_too() -> None:
    mailbox: Mailbox[str] = Mailbox(2)
    for text in "ab":
        mailbox.put_nowait(text)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mailbox.put, "c")
        await trio.testing.wait_all_tasks_blocked()
        assert mailbox.drain_nowait(1) == ["a"]
        assert mailbox.drain_nowait() == ["b", "c"]


async def test_nobody_overtakes_a_waiting_putter() -> None:
    mailbox: Mailbox[str] = Mailbox(1)
    mailbox.put_nowait("a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mailbox.put, "waited")
        await trio.testing.wait_all_tasks_blocked()
        assert mailbox.drain_nowait() == ["a"]
        with pytest.raises(MailboxFull):
            mailbox.put_nowait("quick")
    assert mailbox.drain_nowait() == ["waited"]


async def test_a_cancelled_put_was_not_put() -> None:
    mailbox: Mailbox[str] = Mailbox(1)
    mailbox.put_nowait("a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mailbox.put, "b")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert await mailbox.drain() == ["a"]
    assert mailbox.put_count == 1
    assert mailbox.statistics().tasks_waiting_put == 0


async def test_a_put_in_a_cancelled_scope_was_not_put() -> None:
    mailbox: Mailbox[str] = Mailbox(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await mailbox.put("a")
    assert scope.cancelled_caught
    assert len(mailbox) == 0


async def test_a_cancelled_putter_passes_the_room_on() -> None:
    mailbox: Mailbox[str] = Mailbox(1)
    mailbox.put_nowait("a")
    scope = trio.CancelScope()

    async def cancelled() -> None:
        with scope:
            await mailbox.put("cancelled")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancelled)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(mailbox.put, "next")
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        assert mailbox.drain_nowait() == ["a"]
        await trio.testing.wait_all_tasks_blocked()
        # Cancelled before there was room, or after it had been put: one of both, never in between.
        taken = mailbox.drain_nowait()
        await trio.testing.wait_all_tasks_blocked()
        taken += mailbox.drain_nowait()
    assert taken == (["next"] if scope.cancelled_caught else ["cancelled", "next"])


async def test_a_cancelled_drain_took_nothing() -> None:
    mailbox: Mailbox[str] = Mailbox(2)
    scope = trio.CancelScope()

    async def drain() -> None:
        with scope:
            await mailbox.drain()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
    mailbox.put_nowait("a")
    with trio.CancelScope() as late:
        late.cancel()
        await mailbox.drain()
    assert late.cancelled_caught
    assert await mailbox.drain() == ["a"]


async def test_a_message_that_woke_the_reader_is_not_lost_when_it_is_cancelled() -> None:
    mailbox: Mailbox[str] = Mailbox(2)
    got: list[str] = []
    scope = trio.CancelScope()

    async def drain() -> None:
        with scope:
            got.extend(await mailbox.drain())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        await trio.testing.wait_all_tasks_blocked()
        mailbox.put_nowait("a")
        scope.cancel()
    assert got + mailbox.drain_nowait() == ["a"]


async def test_close_lets_the_reader_take_what_is_there() -> None:
    mailbox: Mailbox[str] = Mailbox(2)
    mailbox.put_nowait("a")
    mailbox.close()
    assert mailbox.closed
    with pytest.raises(MailboxClosed):
        mailbox.put_nowait("b")
    with pytest.raises(MailboxClosed):
        await mailbox.put("b")
    assert await mailbox.drain() == ["a"]
    with pytest.raises(MailboxClosed):
        await mailbox.drain()
    mailbox.close()


async def test_close_wakes_those_that_wait() -> None:
    empty: Mailbox[str] = Mailbox(1)
    full: Mailbox[str] = Mailbox(1)
    full.put_nowait("a")
    woken: list[str] = []

    async def drain() -> None:
        with pytest.raises(MailboxClosed):
            await empty.drain()
        woken.append("reader")

    async def put() -> None:
        with pytest.raises(MailboxClosed):
            await full.put("b")
        woken.append("putter")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        nursery.start_soon(put)
        await trio.testing.wait_all_tasks_blocked()
        empty.close()
        full.close()
    assert sorted(woken) == ["putter", "reader"]
    assert full.drain_nowait() == ["a"]


async def test_several_readers_share_what_comes() -> None:
    mailbox: Mailbox[int] = Mailbox(10)
    taken: list[int] = []

    async def read() -> None:
        while True:
            try:
                taken.extend(await mailbox.drain(1))
            except MailboxClosed:
                return

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(10):
            mailbox.put_nowait(number)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(taken) == list(range(10))
        mailbox.close()


class MailboxMachine(RuleBasedStateMachine):
    """Against a deque: what does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.mailbox: Mailbox[int] = Mailbox(3)
        self.model: deque[int] = deque()
        self.put = 0
        self.closed = False

    @rule()
    def put_nowait(self) -> None:
        try:
            ticket = self.mailbox.put_nowait(self.put)
        except MailboxFull:
            assert len(self.model) == 3
        except MailboxClosed:
            assert self.closed
        else:
            assert not self.closed
            self.model.append(self.put)
            self.put += 1
            assert ticket == self.put

    @rule(limit=st.none() | st.integers(0, 4))
    def drain_nowait(self, limit: int | None) -> None:
        expected = [
            self.model.popleft()
            for _ in range(len(self.model) if limit is None else min(limit, len(self.model)))
        ]
        assert self.mailbox.drain_nowait(limit) == expected

    @precondition(lambda self: self.put > 6)
    @rule()
    def close(self) -> None:
        self.mailbox.close()
        self.closed = True

    @invariant()
    def counts_agree(self) -> None:
        assert len(self.mailbox) == len(self.model) <= 3
        assert self.mailbox.taken_count == self.put - len(self.model)


TestMailboxMachine = MailboxMachine.TestCase
TestMailboxMachine.settings = settings(stateful_step_count=30)


@given(
    capacity=st.integers(1, 3),
    schedule=st.lists(
        st.tuples(st.sampled_from(["put", "drain", "cancel", "yield"]), st.integers(0, 5)), max_size=40
    ),
)
def test_whatever_the_schedule_nothing_is_lost_or_reordered(
    capacity: int, schedule: list[tuple[str, int]]
) -> None:
    async def main() -> None:
        mailbox: Mailbox[int] = Mailbox(capacity)
        scopes: list[trio.CancelScope] = []
        put: dict[int, int] = {}  # number -> ticket
        taken: list[int] = []

        async def putter(number: int, scope: trio.CancelScope) -> None:
            with scope:
                put[number] = await mailbox.put(number)

        async with trio.open_nursery() as nursery:
            for action, argument in schedule:
                if action == "put":
                    scopes.append(trio.CancelScope())
                    nursery.start_soon(putter, len(scopes) - 1, scopes[-1])
                elif action == "drain":
                    taken += mailbox.drain_nowait(argument)
                elif action == "cancel" and scopes:
                    scopes[argument % len(scopes)].cancel()
                else:
                    await trio.testing.wait_all_tasks_blocked()
                assert len(mailbox) <= capacity
            while mailbox.statistics().tasks_waiting_put or len(mailbox) or nursery.child_tasks:
                taken += mailbox.drain_nowait()
                await trio.testing.wait_all_tasks_blocked()
        assert taken == sorted(put, key=put.__getitem__)
        assert sorted(put.values()) == list(range(1, len(put) + 1))
        for number, scope in enumerate(scopes):
            assert (number in put) != scope.cancelled_caught

    trio.run(main)
