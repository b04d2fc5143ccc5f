"""One child task per key, started by its first message and passivated when idle, without losing a
message that arrives while it leaves.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import trio

from .errors import MailboxClosed
from .mailbox import Mailbox

K = TypeVar("K")
M = TypeVar("M")


class FamilyChild(Protocol[M]):
    """What the family runs for one key."""

    async def receive(self, batch: list[M]) -> None: ...

    async def passivate(self) -> None:
        """Make its state durable; more messages may still come, then it goes on."""


@dataclass(frozen=True, slots=True)
class FamilyStatistics:
    """Children alive, and how many were ever started."""

    alive: int
    started: int


class Family(Generic[K, M]):
    """`make(key)` builds a child. `capacity` bounds each child's mailbox, `idle` (seconds) is how long
    a child with nothing to do stays. `on_end(key, crash, left)` is told when a child is gone: what was
    left in its mailbox is the owner's to hand on; `crash` is None when it passivated.
    """

    def __init__(
        self,
        make: Callable[[K], FamilyChild[M]],
        *,
        capacity: int,
        idle: float,
        on_end: Callable[[K, Exception | None, list[M]], None],
    ) -> None:
        self._make = make
        self._capacity = capacity
        self._idle = idle
        self._on_end = on_end
        self._mailboxes: dict[K, Mailbox[M]] = {}
        self._nursery: trio.Nursery | None = None
        self._closed = trio.Event()
        self.ended = trio.Event()
        self._started = 0
        self._idling: dict[K, trio.CancelScope] = {}  # the longest idle first

    def __contains__(self, key: K) -> bool:
        return key in self._mailboxes

    def __len__(self) -> int:
        return len(self._mailboxes)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the children until `close` was called and the last one has finished."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await self._closed.wait()
        finally:
            self._nursery = None
        self.ended.set()

    def tell_nowait(self, key: K, message: M) -> None:
        """Send to the child of `key`, starting it if need be.

        Raises:
            MailboxFull: that child has `capacity` messages waiting.
            MailboxClosed: the family is closed or not running.
        """
        mailbox = self._mailboxes.get(key)
        if mailbox is None:
            if self._nursery is None or self._closed.is_set():
                raise MailboxClosed
            mailbox = Mailbox(self._capacity)
            self._mailboxes[key] = mailbox
            self._started += 1
            self._nursery.start_soon(self._run_child, key, mailbox)
        mailbox.put_nowait(message)

    def take_back(self, key: K) -> list[M]:
        """What that child was sent and has not received yet; it will not receive it any more."""
        mailbox = self._mailboxes.get(key)
        return mailbox.drain_nowait() if mailbox is not None else []

    def passivate_oldest(self) -> bool:
        """Ask the child that has been idle longest to leave now; False when none is idle."""
        for key, scope in self._idling.items():
            del self._idling[key]
            scope.cancel()
            return True
        return False

    def close(self) -> None:
        """Children finish what they have, passivate and end; no child is started any more."""
        self._closed.set()
        for mailbox in self._mailboxes.values():
            mailbox.close()

    def statistics(self) -> FamilyStatistics:
        return FamilyStatistics(alive=len(self._mailboxes), started=self._started)

    async def _run_child(self, key: K, mailbox: Mailbox[M]) -> None:
        crash: Exception | None = None
        try:
            child = self._make(key)
            await self._serve(key, child, mailbox)
        except Exception as error:  # reported to the owner, who decides what a crash means
            crash = error
        finally:
            # No checkpoint between the last look at the mailbox and this line, so nothing slips
            # in between: a message either woke the child or finds no child and starts a new one.
            del self._mailboxes[key]
            self._on_end(key, crash, mailbox.drain_nowait())

    async def _serve(self, key: K, child: FamilyChild[M], mailbox: Mailbox[M]) -> None:
        receive: Callable[[list[M]], Awaitable[None]] = child.receive
        while True:
            batch: list[M] = []
            try:
                with trio.move_on_after(self._idle) as scope:
                    if not len(mailbox):
                        self._idling[key] = scope
                    batch = await mailbox.drain()
            except MailboxClosed:
                await child.passivate()
                return
            finally:
                self._idling.pop(key, None)
            if batch:
                await receive(batch)
                continue
            await child.passivate()
            if not len(mailbox):
                return
