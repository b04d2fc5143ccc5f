"""Group commit: everything that waits is journaled in one transaction, then answered. A flush starts
when the one before it has committed; no timer sits in the path of a lone message. What is being read at
that moment joins it, which is the `linger` of its address.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .errors import JournalRefused, JournalUnavailable
from .kernel import Actor
from .messages import Appended, Delivery, Duplicates, Item
from .ports import Journal

Feed = Callable[[int, int, list[Item]], None]
"""Told of every committed flush: its first seq, its last seq, and the items that sessions take."""


@dataclass(slots=True)
class IngressStatistics:
    """Since start: flushes committed, items journaled, duplicates found, deliveries refused."""

    flushes: int = 0
    items: int = 0
    duplicates: int = 0
    refused: int = 0


class Ingress(Actor[Delivery]):
    """Owns the journal's writing end. `max_rows` and `max_bytes` bound one flush. `is_fed`: whether
    anybody in this process takes what `feed` is told; another one finds it in the journal.
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
        on_refused: Callable[[JournalUnavailable], None],
    ) -> None:
        self._journal = journal
        self._feed = feed
        self._is_fed = is_fed
        self._look = look
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._on_refused = on_refused
        self.statistics = IngressStatistics()

    async def receive(self, batch: list[Delivery]) -> None:
        unsettled = deque(batch)
        try:
            for flush in self._flushes(batch):
                await self._flush(flush, unsettled)
        except BaseException:
            _settle(unsettled, len(unsettled), False)
            raise

    def _flushes(self, batch: list[Delivery]) -> Iterator[list[Delivery]]:
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
        try:
            stored, duplicates, result = await self._append(flush)
        except JournalUnavailable as error:
            if isinstance(error, JournalRefused) and len(flush) > 1:
                # One body's data must not fail the others: halves, until it is alone.
                middle = len(flush) // 2
                await self._flush(flush[:middle], unsettled)
                await self._flush(flush[middle:], unsettled)
                return
            self._on_refused(error)
            self.statistics.refused += len(flush)
            _settle(unsettled, len(flush), False)
            return
        self.statistics.flushes += 1
        self.statistics.duplicates += duplicates
        # Answer first: the phones' side waits for nothing that delivery does.
        _settle(unsettled, len(flush), True)
        if result is None:
            self._look()  # committed, but only the journal knows as what
        elif stored:
            self.statistics.items += len(result.session_keys)
            if self._is_fed():
                self._hand_on(stored, result)

    async def _append(self, flush: list[Delivery]) -> tuple[list[Delivery], int, Appended | None]:
        """What was stored of the flush, how many duplicates it had, and where the rest stands."""
        stored, duplicates = _cut_repeats(flush)
        while True:
            result = await self._journal.append(stored, duplicates=duplicates)
            if not isinstance(result, Duplicates):
                return stored, duplicates, result
            duplicates += len(result.positions)
            stored = _cut(stored, result.positions)

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
