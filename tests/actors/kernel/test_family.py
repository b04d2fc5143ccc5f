"""The family: one child per key, and no message lost while a child leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from actors.kernel import Family, FamilyStatistics, MailboxClosed, MailboxFull


class Household:
    """A family whose children take `work` seconds for a message and `farewell` to passivate."""

    def __init__(self, *, capacity: int = 4, idle: float = 10, work: float = 0, farewell: float = 0) -> None:
        self.work, self.farewell = work, farewell
        self.received: list[tuple[str, str, int]] = []  # key, message, which child
        self.ended: list[tuple[str, str | None, list[str]]] = []
        self.born: Counter[str] = Counter()
        self.alive: Counter[str] = Counter()
        self.broken: set[str] = set()
        self.passivated: Counter[str] = Counter()
        self.family: Family[str, str] = Family(self._make, capacity=capacity, idle=idle, on_end=self._on_end)

    def _make(self, key: str) -> Child:
        if key in self.broken:
            raise OSError("cannot be made")
        self.born[key] += 1
        self.alive[key] += 1
        assert self.alive[key] == 1, "two children for one key"
        return Child(self, key, self.born[key])

    def _on_end(self, key: str, crash: Exception | None, left: list[str]) -> None:
        if key not in self.broken:
            self.alive[key] -= 1
        self.ended.append((key, str(crash) if crash else None, left))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Family[str, str]]:
        with trio.fail_after(1_000):
            async with trio.open_nursery() as nursery:
                await nursery.start(self.family.run)
                yield self.family
                self.family.close()


class Child:
    def __init__(self, house: Household, key: str, number: int) -> None:
        self.house, self.key, self.number = house, key, number

    async def receive(self, batch: list[str]) -> None:
        for message in batch:
            if message == "crash":
                raise OSError("crashed")
            await trio.sleep(self.house.work)
            self.house.received.append((self.key, message, self.number))

    async def passivate(self) -> None:
        await trio.sleep(self.house.farewell)
        self.house.passivated[self.key] += 1


async def test_one_child_per_key(autojump_clock: trio.testing.MockClock) -> None:
    house = Household()
    async with house.running() as family:
        for key, message in (("x", "1"), ("y", "1"), ("x", "2")):
            family.tell_nowait(key, message)
        assert ("x" in family, "z" in family, len(family)) == (True, False, 2)
        await trio.sleep(1)
        assert sorted(house.received) == [("x", "1", 1), ("x", "2", 1), ("y", "1", 1)]
        assert family.statistics() == FamilyStatistics(alive=2, started=2)


async def test_each_childs_mailbox_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    house = Household(capacity=2, work=1)
    async with house.running() as family:
        family.tell_nowait("x", "1")
        family.tell_nowait("x", "2")
        with pytest.raises(MailboxFull):
            family.tell_nowait("x", "3")
        family.tell_nowait("y", "1")


async def test_an_idle_child_passivates(autojump_clock: trio.testing.MockClock) -> None:
    house = Household(idle=10)
    async with house.running() as family:
        family.tell_nowait("x", "1")
        await trio.sleep(9)
        family.tell_nowait("x", "2")
        await trio.sleep(9)
        assert "x" in family
        await trio.sleep(2)
        assert "x" not in family
        assert house.ended == [("x", None, [])]
        family.tell_nowait("x", "3")
        await trio.sleep(1)
    assert [entry[1:] for entry in house.received] == [("1", 1), ("2", 1), ("3", 2)]


async def test_a_message_during_passivation_goes_to_the_same_child(
    autojump_clock: trio.testing.MockClock,
) -> None:
    house = Household(idle=10, farewell=2)
    async with house.running() as family:
        family.tell_nowait("x", "1")
        await trio.sleep(11)
        family.tell_nowait("x", "2")
        await trio.sleep(5)
        assert house.received == [("x", "1", 1), ("x", "2", 1)]
        assert house.ended == []
        await trio.sleep(20)
        assert house.ended == [("x", None, [])]


async def test_passivate_oldest_takes_the_longest_idle_one(autojump_clock: trio.testing.MockClock) -> None:
    house = Household(idle=100, work=1)
    async with house.running() as family:
        assert not family.passivate_oldest()
        for key in ("x", "y", "z"):
            family.tell_nowait(key, "1")
            await trio.sleep(2)
        family.tell_nowait("x", "2")
        await trio.sleep(0.5)
        gone = []
        while family.passivate_oldest():
            await trio.testing.wait_all_tasks_blocked(0.01)
            gone.append(house.ended[-1][0])
        assert gone == ["y", "z"]  # x is at work
        await trio.sleep(2)
        assert family.passivate_oldest()


async def test_a_message_told_before_passivate_oldest_is_not_lost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    for told_first in (True, False):
        house = Household(idle=100)
        async with house.running() as family:
            family.tell_nowait("x", "1")
            await trio.sleep(1)
            if told_first:
                family.tell_nowait("x", "2")
            assert family.passivate_oldest()
            if not told_first:
                family.tell_nowait("x", "2")
            await trio.sleep(1)
            assert [entry[1] for entry in house.received] == ["1", "2"]


async def test_a_crash_hands_back_what_is_left(autojump_clock: trio.testing.MockClock) -> None:
    house = Household(work=1)
    async with house.running() as family:
        family.tell_nowait("x", "1")
        await trio.sleep(0.5)
        for message in ("crash", "3"):
            family.tell_nowait("x", message)
        await trio.sleep(0.6)
        assert house.ended == [("x", "crashed", [])]  # "3" was in the batch in hand
        family.tell_nowait("x", "crash")
        await trio.lowlevel.checkpoint()
        family.tell_nowait("x", "4")
        family.tell_nowait("y", "1")
        await trio.sleep(5)
        assert [end for end in house.ended if end[0] == "x"][1][1] == "crashed"
        assert ("y", "1", 1) in house.received


async def test_what_came_during_the_crashing_batch_is_left(autojump_clock: trio.testing.MockClock) -> None:
    house = Household(work=1)
    async with house.running() as family:
        family.tell_nowait("x", "1")
        family.tell_nowait("x", "crash")
        await trio.sleep(0.5)
        family.tell_nowait("x", "2")
        family.tell_nowait("x", "3")
        await trio.sleep(1)
        assert house.ended == [("x", "crashed", ["2", "3"])]


async def test_a_child_that_cannot_be_made_is_a_crash(autojump_clock: trio.testing.MockClock) -> None:
    house = Household()
    house.broken = {"x"}
    async with house.running() as family:
        family.tell_nowait("x", "1")
        await trio.sleep(1)
        assert house.ended == [("x", "cannot be made", ["1"])]
        assert "x" not in family


async def test_take_back_withdraws_what_was_not_received(autojump_clock: trio.testing.MockClock) -> None:
    house = Household(work=1)
    async with house.running() as family:
        assert family.take_back("x") == []
        family.tell_nowait("x", "1")
        await trio.sleep(0.5)
        family.tell_nowait("x", "2")
        assert family.take_back("x") == ["2"]
        await trio.sleep(5)
        family.tell_nowait("x", "3")
        await trio.sleep(5)
    assert [entry[1] for entry in house.received] == ["1", "3"]


async def test_close_finishes_what_is_there(autojump_clock: trio.testing.MockClock) -> None:
    house = Household(work=1, farewell=1)
    async with house.running() as family:
        for message in ("1", "2"):
            family.tell_nowait("x", message)
        await trio.sleep(0.5)
        family.tell_nowait("x", "3")
        family.close()
        for key in ("x", "new"):
            with pytest.raises(MailboxClosed):
                family.tell_nowait(key, "late")
    assert [entry[1] for entry in house.received] == ["1", "2", "3"]
    assert house.ended == [("x", None, [])]
    assert house.passivated == {"x": 1}
    assert house.family.ended.is_set()


async def test_a_family_that_does_not_run_takes_nothing(autojump_clock: trio.testing.MockClock) -> None:
    house = Household(work=1)
    with pytest.raises(MailboxClosed):
        house.family.tell_nowait("x", "1")
    with trio.move_on_after(0.5):
        async with trio.open_nursery() as nursery:
            await nursery.start(house.family.run)
            house.family.tell_nowait("x", "1")
            await trio.sleep_forever()
    assert house.ended == [("x", None, [])]
    with pytest.raises(MailboxClosed):
        house.family.tell_nowait("y", "1")


@given(
    work=st.sampled_from([0.0, 0.1, 1.0]),
    farewell=st.sampled_from([0.0, 0.1, 1.0, 3.0]),
    idle=st.sampled_from([0.1, 0.5, 1.0]),
    schedule=st.lists(
        st.tuples(
            st.sampled_from(["tell", "tell", "tell", "crash", "oldest"]),
            st.sampled_from("xy"),
            st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0, 1.5]),
        ),
        max_size=30,
    ),
)
def test_whatever_the_schedule_each_message_is_received_once_in_order(
    work: float, farewell: float, idle: float, schedule: list[tuple[str, str, float]]
) -> None:
    async def main() -> None:
        house = Household(capacity=50, work=work, idle=idle, farewell=farewell)
        told: dict[str, list[str]] = {"x": [], "y": []}
        crashes = 0
        async with house.running() as family:
            for number, (action, key, pause) in enumerate(schedule):
                if action == "tell":
                    told[key].append(str(number))
                    family.tell_nowait(key, str(number))
                elif action == "crash":
                    crashes += 1
                    family.tell_nowait(key, "crash")
                else:
                    family.passivate_oldest()
                if pause:
                    await trio.sleep(pause)
            await trio.sleep(100)
            assert len(family) == 0
        for key, messages in told.items():
            received = [message for to, message, _ in house.received if to == key]
            children = [child for to, _, child in house.received if to == key]
            assert children == sorted(children)
            if not crashes:
                assert received == messages
            else:
                assert [message for message in messages if message in received] == received
                left = [m for k, _, batch in house.ended if k == key for m in batch if m != "crash"]
                assert len(set(received + left)) == len(received + left)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
