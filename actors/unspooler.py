"""Brings what was spooled to the journal, in order, as soon as that is there again."""

from __future__ import annotations

from collections.abc import Callable

import trio

from .errors import JournalRefused, JournalUnavailable, SpoolUnavailable
from .ingress import Ingress
from .messages import Delivery, Spooled
from .ports import Spool

_FEW = 100  # bodies that may be brought while whatever is accepted waits for them
_LONGEST_WAIT = 1.0  # seconds between two looks whether the journal is back


class Unspooler:
    """One per process. `split` makes a delivery of a body; None: the database has not been reached yet. While
    anything waits in the spool nobody else in this process writes to the journal: whatever is accepted
    meanwhile comes after it. `on_trouble` is told of the first of several failures in a row, `on_emptied` how
    many bodies were brought.
    """

    def __init__(
        self,
        spool: Spool,
        ingress: Ingress,
        *,
        split: Callable[[Spooled], Delivery | None],
        on_trouble: Callable[[Exception], None],
        on_emptied: Callable[[int], None],
        retry_after: float = 0.1,
    ) -> None:
        self._spool = spool
        self._ingress = ingress
        self._split = split
        self._on_trouble = on_trouble
        self._on_emptied = on_emptied
        self._brought = 0
        self._retry_after = retry_after
        self._scope = trio.CancelScope()
        self._stopped = False

    def stop(self) -> None:
        """What still waits is for the next process."""
        self._stopped = True
        self._scope.cancel()

    async def run(self) -> None:
        """Until `stop`."""
        with trio.CancelScope() as self._scope:
            wait, in_trouble = self._retry_after, False
            while not self._stopped:
                await self._spool.filled()
                try:
                    await self.empty()
                except (JournalUnavailable, SpoolUnavailable) as trouble:
                    if not in_trouble:
                        self._on_trouble(trouble)
                    in_trouble = True
                    await trio.sleep(wait)
                    wait = min(wait * 2, _LONGEST_WAIT)
                else:
                    if self._brought:
                        self._on_emptied(self._brought)
                    self._brought = 0
                    wait, in_trouble = self._retry_after, False

    async def empty(self) -> None:
        """Bring what waits, once. Raises JournalUnavailable, SpoolUnavailable."""
        try:
            await self._bring()
        finally:
            self._spool.release()

    async def _bring(self) -> None:
        at_once: int | None = None  # fewer after one that was refused
        flows = held = False
        while bodies := await self._spool.read():
            if flows and not held and len(bodies) <= _FEW:
                # Else, under load, some more would have come each time, and it would never end.
                await self._spool.hold()
                held = True
                continue
            deliveries = []
            for body in bodies[:at_once]:
                delivery = self._split(body)
                if delivery is None:
                    raise JournalUnavailable("the database has not been reached yet")
                deliveries.append(delivery)
            flush = next(self._ingress.flushes(deliveries))
            try:
                stored = await self._ingress.append(flush)
            except JournalRefused:
                # One body's data must not hold up the others: halves, until it is alone.
                if len(flush) > 1:
                    at_once = len(flush) // 2
                else:
                    await self._spool.refused()
                    at_once = None
                continue
            self._spool.done(len(flush))
            self._brought += len(flush)
            flows = True
            self._ingress.hand_on(stored)
