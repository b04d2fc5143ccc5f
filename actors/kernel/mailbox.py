"""A bounded queue that is drained: one checkpoint per batch, not per message. An actor is its only reader;
the lanes of a service are several.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from .errors import MailboxClosed, MailboxFull

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MailboxStatistics:
    """A snapshot: messages waiting, capacity, tasks waiting for room, and whether it is closed."""

    waiting: int
    capacity: int
    tasks_waiting_put: int
    closed: bool


@dataclass(slots=True)
class _Putter(Generic[T]):
    """A task that waits for room. Its message is appended for it when there is some, oldest first: tasks
    that are merely woken run in no particular order.
    """

    item: T
    ticket: int | None = None


class Mailbox(Generic[T]):
    """First in, first out. `capacity` has no default: whoever makes a mailbox decides how much may wait.

    Raises:
        ValueError: capacity is less than one.
    """

    __slots__ = ("_capacity", "_closed", "_items", "_putters", "_readers", "put_count")

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"mailbox capacity must be at least 1, not {capacity}")
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._closed = False
        self.put_count = 0
        self._putters: dict[trio.lowlevel.Task, _Putter[T]] = {}
        self._readers = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Mailbox {len(self._items)}/{self._capacity} {state}>"

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def taken_count(self) -> int:
        """How many were ever taken: a message whose ticket is at most this has left the mailbox."""
        return self.put_count - len(self._items)

    def put_nowait(self, item: T) -> int:
        """Append without waiting; returns its ticket (1 for the first message ever put).

        Raises:
            MailboxFull: there is no room (tasks that wait for it get it first).
            MailboxClosed: it was closed.
        """
        if self._closed:
            raise MailboxClosed
        if len(self._items) >= self._capacity:
            raise MailboxFull
        return self._append(item)

    def _append(self, item: T) -> int:
        self._items.append(item)
        self.put_count += 1
        if self._readers:
            self._readers.unpark()
        return self.put_count

    async def put(self, item: T) -> int:
        """Append, waiting for room; returns its ticket. Cancelled while waiting: it was not put.

        Raises:
            MailboxClosed: it was closed, before or while waiting.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._closed:
            raise MailboxClosed
        if len(self._items) < self._capacity:
            ticket = self._append(item)
            await trio.lowlevel.cancel_shielded_checkpoint()
            return ticket
        task = trio.lowlevel.current_task()
        self._putters[task] = putter = _Putter(item)

        def abort(_: Callable[[], object]) -> trio.lowlevel.Abort:
            del self._putters[task]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        if putter.ticket is None:
            raise MailboxClosed
        return putter.ticket

    def _admit(self) -> None:
        """Give the room there is to those who wait for it."""
        while self._putters and len(self._items) < self._capacity:
            task = next(iter(self._putters))
            putter = self._putters.pop(task)
            putter.ticket = self._append(putter.item)
            trio.lowlevel.reschedule(task)

    async def drain(self, limit: int | None = None, *, linger: int = 0) -> list[T]:
        """Wait until something is there, then take all of it (at most `limit`), oldest first. With
        `linger`, wait on for as long as each pass of the scheduler brings more, so many passes at most.

        Cancelled: nothing was taken.

        Raises:
            MailboxClosed: it is closed and empty.
        """
        if self._items:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        while not self._items:
            if self._closed:
                raise MailboxClosed
            await self._readers.park()
        for _ in range(linger):
            waiting = len(self._items)
            await trio.lowlevel.checkpoint()
            if len(self._items) == waiting:
                break
        return self.drain_nowait(limit)

    def drain_nowait(self, limit: int | None = None) -> list[T]:
        """What is there now, possibly nothing."""
        items = self._items
        if limit is None or limit >= len(items):
            batch = list(items)
            items.clear()
        else:
            batch = [items.popleft() for _ in range(limit)]
        if self._putters:
            self._admit()
        return batch

    def close(self) -> None:
        """Take nothing more. The reader still gets what is there; waiting putters get MailboxClosed."""
        self._closed = True
        putters, self._putters = self._putters, {}
        for task in putters:
            trio.lowlevel.reschedule(task)
        self._readers.unpark_all()

    def statistics(self) -> MailboxStatistics:
        return MailboxStatistics(
            waiting=len(self._items),
            capacity=self._capacity,
            tasks_waiting_put=len(self._putters),
            closed=self._closed,
        )
