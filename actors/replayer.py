"""Gives dead letters that are to be retried back to their sessions."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import trio

from .errors import JournalUnavailable
from .messages import Item
from .ports import Journal

PAGE = 50
_LOOK_EVERY = 30.0  # seconds; a wake-up call that was lost with its connection costs no more
_NO_ROOM = 0.2  # seconds until a session that had no room is offered its dead letter again


class Replayer:
    """Claims a page, offers each item to its session through `offer`, and claims again when all of it
    found room. Whatever it holds when it ends is claimed again by the next epoch.
    """

    def __init__(self, journal: Journal, *, epoch: int, offer: Callable[[Item], bool]) -> None:
        self._journal = journal
        self._epoch = epoch
        self._offer = offer
        self._waiting: deque[Item] = deque()
        self._wake = trio.Event()

    def wake(self) -> None:
        """Somebody asked for a retry."""
        self._wake.set()

    def lost(self, item: Item) -> None:
        """A session could not go through with this one; it is offered again."""
        self._waiting.append(item)
        self._wake.set()

    async def run(self) -> None:
        while True:
            try:
                claimed = await self._journal.claim_dead_letters(self._epoch, PAGE)
                items = {item.seq: item for item in await self._journal.read([c[1] for c in claimed])}
            except JournalUnavailable:
                await trio.sleep(_NO_ROOM)
                continue
            for identity, seq, service, revision in claimed:
                if seq in items:
                    self._waiting.append(
                        replace(
                            items[seq],
                            dead_letter=identity,
                            domain=service,
                            revision=revision,
                            redelivered=True,
                            joins=None,
                        )
                    )
            while self._waiting:
                if self._offer(self._waiting[0]):
                    self._waiting.popleft()
                else:
                    await trio.sleep(_NO_ROOM)
                    self._waiting.rotate(-1)
            if not claimed:
                with trio.move_on_after(_LOOK_EVERY):
                    await self._wake.wait()
                self._wake = trio.Event()
