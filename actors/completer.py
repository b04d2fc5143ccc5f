"""Records what became of messages, in batches: whatever finished while the last commit ran, or within a few
milliseconds of its beginning, goes into the next one.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from .errors import JournalUnavailable
from .kernel import Actor
from .messages import Completion
from .ports import Journal

# Seconds from one commit to the next. A commit costs the database as much as several rows, and nobody waits
# for it but replies and, where it is of a dead letter, the retrier. The first after a pause goes at once.
_APART = 0.01


class Completer(Actor[Completion]):
    """Commits completions in the order they came. An unreachable database is waited for: the outcome
    is known only here, and losing it would repeat a delivery. LeaseLost is a crash on purpose; it
    ends the whole delivering side of this process.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        epoch: int,
        marks: Callable[[], tuple[int, list[int]]],
        on_committed: Callable[[list[Completion], list[int]], None],
        on_unavailable: Callable[[JournalUnavailable], None],
        max_rows: int,
        retry_after: float = 0.2,
    ) -> None:
        self._journal = journal
        self._epoch = epoch
        self._marks = marks
        self._on_committed = on_committed
        self._on_unavailable = on_unavailable
        self._max_rows = max_rows
        self._retry_after = retry_after

    async def receive(self, batch: list[Completion]) -> None:
        next_one = trio.current_time() + _APART
        for start in range(0, len(batch), self._max_rows):
            await self._commit(batch[start : start + self._max_rows])
        if all(completion.item.dead_letter is None for completion in batch):
            await trio.sleep_until(next_one)

    async def _commit(self, batch: list[Completion]) -> None:
        wait = self._retry_after
        while True:
            low_water, stragglers = self._marks()
            try:
                await self._journal.complete(
                    batch, epoch=self._epoch, low_water=low_water, stragglers=stragglers
                )
                break
            except JournalUnavailable as error:
                self._on_unavailable(error)
                await trio.sleep(wait)
                wait = min(wait * 2, 5.0)
        self._on_committed(batch, stragglers)
