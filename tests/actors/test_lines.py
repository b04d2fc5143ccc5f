"""Lines: first come, first called, nobody for ever, and no service is given up that waits for us."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio.testing

from actors.lines import Lines
from actors.messages import Turn

Clock = trio.testing.MockClock
PATIENCE = {"rides": 1.0, "agents": 7.5}


class Queue:
    """Lines, and who left them when; True: in vain."""

    def __init__(self) -> None:
        self.left: list[tuple[float, str, bool]] = []
        self.lines = Lines(patience=PATIENCE.__getitem__, leave=self._leave)

    def _leave(self, key: str, in_vain: bool) -> None:
        self.left.append((round(trio.current_time(), 2), key, in_vain))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Lines]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.lines.run)
            yield self.lines
            nursery.cancel_scope.cancel()


async def test_as_many_are_called_as_there_is_room_for_in_the_order_of_the_line(
    autojump_clock: Clock,
) -> None:
    queue = Queue()
    async with queue.running() as lines:
        for key in "abcdef":
            lines.join(key, "rides")
        lines.taken("rides", 0)
        assert queue.left == []
        lines.taken("rides", 2)
        lines.taken("rides", 3)
        assert queue.left == [(0, "a", False), (0, "b", False), (0, "c", False)]
        assert lines.turn("b", "rides") is Turn.CALLED
        assert lines.turn("b", "rides") is lines.turn("x", "rides") is Turn.IN_LINE
        lines.give_up("a")
        assert queue.left[3:] == [(0, "d", False)]
        assert lines.turn("x", "agents") is Turn.FREE


async def test_a_line_that_forms_later_may_lose_patience_sooner(autojump_clock: Clock) -> None:
    queue = Queue()
    async with queue.running() as lines:
        lines.join("slow", "agents")
        await trio.sleep(0.5)
        lines.join("quick", "rides")
        await trio.sleep(10)
        assert lines.lengths() == {}
        assert lines.turn("slow", "agents") is lines.turn("quick", "rides") is Turn.TOO_LATE
        assert lines.turn("quick", "rides") is Turn.FREE
    assert queue.left == [(1.5, "quick", True), (7.5, "slow", True)]


async def test_a_service_waits_in_vain_for_who_was_called_and_is_not_given_up(autojump_clock: Clock) -> None:
    """A database that is away keeps a called session from its messages."""
    queue = Queue()
    async with queue.running() as lines:
        lines.join("a", "rides")
        lines.join("b", "rides")
        lines.taken("rides", 1)
        await trio.sleep(30)
        assert queue.left == [(0, "a", False)]
        assert lines.turn("a", "rides") is Turn.CALLED
        await trio.sleep(3)
        assert [left[1:] for left in queue.left] == [("a", False), ("b", True)]
