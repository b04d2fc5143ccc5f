"""Group commit: everything that waits is journaled in one transaction, then answered. A flush starts
when the one before it has committed; no timer sits in the path of a lone message. What is being read at
that moment joins it, which is the `linger` of its address.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import trio

from .errors import JournalRefused, JournalUnavailable, SpoolUnavailable
from .kernel import Actor
from .messages import Appended, Delivery, Duplicates, Item
from .ports import Journal, Spool

Feed = Callable[[int, int, list[Item]], None]
"""Told of every committed flush: its first seq, its last seq, and the items that sessions take."""


@dataclass(slots=True)
class IngressStatistics:
    """Since start: flushes committed, items journaled, duplicates found, deliveries spooled and refused.
    `refused_at`: when the last flush was refused, on trio's clock, if none was durable since."""

    flushes: int = 0
    items: int = 0
    duplicates: int = 0
    spooled: int = 0
    refused: int = 0
    refused_at: float | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """What is left of a flush without its duplicates, and where it stands; None: only the journal knows."""

    deliveries: list[Delivery]
    appended: Appended | None


class Ingress(Actor[Delivery]):
    """Owns the journal's writing end. `max_rows` and `max_bytes` bound one flush. `is_fed`: whether
    anybody in this process takes what `feed` is told; another one finds it in the journal. What the journal
    cannot take goes to the `spool`, and everything after it, until that is empty.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        feed: Feed,
        is_fed: Callable[[], bool] = lambda: True,
        look: Callable[[], None],
        max_rows: int,
        max_bytes: int,
        on_refused: Callable[[Exception], None],
        spool: Spool | None = None,
    ) -> None:
        self._journal = journal
        self._feed = feed
        self._is_fed = is_fed
        self._look = look
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._on_refused = on_refused
        self._spool = spool
        self.statistics = IngressStatistics()

    async def receive(self, batch: list[Delivery]) -> None:
        unsettled = deque(batch)
        try:
            for flush in self.flushes(batch):
                await self._flush(flush, unsettled)
        except BaseException:
            _settle(unsettled, len(unsettled), False)
            raise

    def flushes(self, batch: list[Delivery]) -> Iterator[list[Delivery]]:
        """The batch in parts that one transaction may hold."""
        flush: list[Delivery] = []
        rows = size = 0
        for delivery in batch:
            if flush and (
                rows + len(delivery.items) > self._max_rows or size + len(delivery.body) > self._max_bytes
            ):
                yield flush
                flush, rows, size = [], 0, 0
            flush.append(delivery)
            rows += len(delivery.items)
            size += len(delivery.body)
        yield flush

    async def _flush(self, flush: list[Delivery], unsettled: deque[Delivery]) -> None:
        if self._spool is not None:
            split = all(one.items for one in flush)
            if not (self._spool.is_empty and split) and await self._to_spool(
                self._spool, flush, unsettled, only_behind=split
            ):
                return
        try:
            stored = await self.append(flush)
        except JournalUnavailable as error:
            if isinstance(error, JournalRefused) and len(flush) > 1:
                # One body's data must not fail the others: halves, until it is alone.
                middle = len(flush) // 2
                await self._flush(flush[:middle], unsettled)
                await self._flush(flush[middle:], unsettled)
                return
            if self._spool is not None and not isinstance(error, JournalRefused):
                await self._to_spool(self._spool, flush, unsettled)
                return
            self._refuse(error, flush, unsettled)
            return
        self.statistics.refused_at = None
        # Answer first: the phones' side waits for nothing that delivery does.
        _settle(unsettled, len(flush), True)
        self.hand_on(stored)

    async def _to_spool(
        self, spool: Spool, flush: list[Delivery], unsettled: deque[Delivery], *, only_behind: bool = False
    ) -> bool:
        """False: the spool was emptied meanwhile, and the journal takes it."""
        try:
            if not await spool.append(flush, only_behind=only_behind):
                return False
        except SpoolUnavailable as error:
            self._refuse(error, flush, unsettled)
            return True
        self.statistics.spooled += len(flush)
        self.statistics.refused_at = None
        _settle(unsettled, len(flush), True)
        return True

    def _refuse(self, error: Exception, flush: list[Delivery], unsettled: deque[Delivery]) -> None:
        self._on_refused(error)
        self.statistics.refused += len(flush)
        self.statistics.refused_at = trio.current_time()
        _settle(unsettled, len(flush), False)

    async def append(self, flush: list[Delivery]) -> Stored:
        """Store a flush without the duplicates that it has.

        Raises:
            JournalUnavailable: nothing of it was stored.
        """
        left, duplicates = _cut_repeats(flush)
        while True:
            result = await self._journal.append(left, duplicates=duplicates)
            if not isinstance(result, Duplicates):
                break
            duplicates += len(result.positions)
            left = _cut(left, result.positions)
        self.statistics.flushes += 1
        self.statistics.duplicates += duplicates
        return Stored(left, result)

    def hand_on(self, stored: Stored) -> None:
        """To the sessions of this process, if it delivers."""
        if stored.appended is None or not stored.deliveries:
            # Committed, but only the journal knows as what; or before, by a flush whose commit was in doubt.
            self._look()
        else:
            self.statistics.items += len(stored.appended.session_keys)
            if self._is_fed():
                self._hand_on(stored.deliveries, stored.appended)

    def _hand_on(self, stored: list[Delivery], result: Appended) -> None:
        seq = first = result.first_seq
        items: list[Item] = []
        for delivery in stored:
            for incoming in delivery.items:
                session_key = result.session_keys[seq - first]
                if session_key is not None and incoming.message is not None:
                    items.append(
                        Item(
                            seq=seq,
                            key=f"msg_{incoming.key.hex()}",
                            message_id=incoming.message_id,
                            session_key=session_key,
                            phone_number_id=incoming.phone_number_id or "",
                            wa_id=incoming.wa_id,
                            user_id=incoming.user_id,
                            received_at=result.received_at,
                            correlation_id=delivery.correlation_id,
                            traceparent=delivery.traceparent,
                            message=incoming.message,
                            contact=incoming.contact,
                            joins=result.joins.get(seq - first),
                        )
                    )
                seq += 1
        self._feed(first, seq - 1, items)


def _settle(unsettled: deque[Delivery], count: int, stored: bool) -> None:
    """Answer the first `count` of them."""
    for _ in range(count):
        unsettled.popleft().settle(stored)


def _cut_repeats(flush: list[Delivery]) -> tuple[list[Delivery], int]:
    """Cut what one flush holds twice: the same body on two connections at the same moment."""
    seen: set[bytes] = set()
    repeats: list[int] = []
    position = 0
    for delivery in flush:
        for incoming in delivery.items:
            if incoming.deduplicated:
                if incoming.key in seen:
                    repeats.append(position)
                else:
                    seen.add(incoming.key)
            position += 1
    return (_cut(flush, repeats), len(repeats)) if repeats else (flush, 0)


def _cut(flush: list[Delivery], positions: list[int]) -> list[Delivery]:
    """The flush without the items at these positions, counted over the whole flush."""
    gone = set(positions)
    left: list[Delivery] = []
    start = 0
    for delivery in flush:
        end = start + len(delivery.items)
        mine = frozenset(position - start for position in gone if start <= position < end)
        if not mine:
            left.append(delivery)
        elif len(mine) < len(delivery.items):
            cut = delivery.without(mine)
            if cut is not None:
                left.append(cut)
        start = end
    return left
