"""The population: which phone writes next, what shares a body, what comes twice, what is redelivered when.

No sockets and no hidden clock. What the messages contain is written in writing.py.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random

import trio

from router.simulator.deliveries import MESSAGE, Delivery, SentItem
from router.simulator.writing import NAMES, Author, Part, Phone, encoded, in_body_order

FIRST_RETRY = 0.2
"""Seconds from an answer that is not 200 to the next attempt; doubled each time, give or take a tenth."""

LARGEST_BATCH = 20
REMEMBERED = 512
"""How many recent bodies, messages and statuses may come again as duplicates."""


class Population:
    """`senders` phones, each writing to one of `numbers` (phone_number_ids) about one domain of `texts`.

    `texts` maps a domain to what its phones write. The first text of each domain must be a keyword of it: a
    phone opens with exactly that. Everything later ends in ` #N`, N being the phone's running number, or is
    a pressed button or list row or an image with such a title or caption, or a voice message.

    A phone's next message is given out only when all earlier ones were answered 200, so any number of
    connections may carry deliveries at once without disturbing the order per phone. Every delivery that was
    given out must come back through `answered`.

    Shares are between 0 and 1: of deliveries that repeat something, that are batches of 2 to 20 messages
    (fewer when fewer phones may write), that carry statuses. Of the phones, `user_id_share` show a
    business-scoped user id beside their number and `unnumbered_share` show only that. While `backlog`
    bodies wait for redelivery nothing new is given out. `longest_pause` bounds the seconds between two
    attempts.

    `clock` times redeliveries (seconds), `unix_time` stamps messages. Equal arguments and answers give
    equal bodies.
    """

    def __init__(
        self,
        senders: int,
        numbers: Sequence[str],
        rng: Random,
        texts: Mapping[str, Sequence[str]],
        *,
        duplicate_share: float = 0.05,
        batch_share: float = 0.1,
        status_share: float = 0.1,
        user_id_share: float = 0.5,
        unnumbered_share: float = 0.0,
        backlog: int = 1_000,
        longest_pause: float = 30.0,
        clock: Callable[[], float] = trio.current_time,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        if senders < 1 or not numbers or not texts or not all(texts.values()):
            raise ValueError("a population needs senders, numbers, and texts for every domain")
        self._rng = rng
        self._author = Author(rng, {domain: tuple(written) for domain, written in texts.items()}, unix_time)
        self._duplicate_share = duplicate_share
        self._batch_share = batch_share
        self._status_share = status_share
        self._backlog = backlog
        self._longest_pause = longest_pause
        self._clock = clock
        self._accounts = {
            number: (str(10**15 + index), f"1555{index:07d}") for index, number in enumerate(numbers)
        }
        self._phones = [self._phone(index, user_id_share, unnumbered_share) for index in range(senders)]
        self._idle = list(self._phones)
        self._unacknowledged: dict[str, Part] = {}
        self._acknowledged: deque[Part] = deque(maxlen=REMEMBERED)
        self._statuses: deque[Part] = deque(maxlen=REMEMBERED)
        self._bodies: deque[Delivery] = deque(maxlen=REMEMBERED)
        self._in_flight: dict[int, Delivery] = {}
        self._waiting: list[tuple[float, int, Delivery]] = []
        self._serial = 0

    @property
    def unanswered(self) -> int:
        """How many deliveries are in flight or wait for redelivery."""
        return len(self._in_flight) + len(self._waiting)

    @property
    def next_due(self) -> float | None:
        """When, on `clock`, the next redelivery falls due; None when none waits."""
        return self._waiting[0][0] if self._waiting else None

    def next_delivery(self) -> Delivery | None:
        """What to send now: a redelivery that is due, else something new or repeated.

        None means that nothing may be sent before an answer comes or a redelivery falls due.
        """
        due = self.next_redelivery()
        if due is not None:
            return due
        if len(self._waiting) >= self._backlog:
            return None
        if self._bodies and self._rng.random() < self._duplicate_share:
            return self._duplicate()
        parts = self._new_parts()
        if not parts:
            return None
        delivery = self._give_parts(parts, duplicate=False)
        self._bodies.append(delivery)
        return delivery

    def next_redelivery(self) -> Delivery | None:
        """The longest due of the deliveries that were not answered 200, or None."""
        if not self._waiting or self._waiting[0][0] > self._clock():
            return None
        _, _, delivery = heapq.heappop(self._waiting)
        again = replace(delivery, attempt=delivery.attempt + 1)
        self._in_flight[again.serial] = again
        return again

    def answered(self, delivery: Delivery, status: int | None) -> None:
        """`delivery` came back with `status`, or with None when no complete answer came.

        Raises ValueError if it was not in flight.
        """
        if self._in_flight.pop(delivery.serial, None) is None:
            raise ValueError(f"delivery {delivery.serial} is not in flight")
        if status != 200:
            self._put_back(delivery)
            return
        for item in delivery.items:
            part = self._unacknowledged.pop(item.message_id, None) if item.kind == MESSAGE else None
            if part is not None:
                self._acknowledged.append(part)
                self._idle.append(part.phone)

    def _phone(self, index: int, user_id_share: float, unnumbered_share: float) -> Phone:
        # No country has the code 999, so these numbers belong to nobody.
        number = f"999{self._rng.randrange(1_000):03d}{index:06d}"
        user_id = f"US.{self._rng.randrange(10**13, 10**14)}{index:06d}"
        hidden = self._rng.random() < unnumbered_share
        has_user_id = hidden or self._rng.random() < user_id_share
        domains = list(self._author.texts)
        return Phone(
            number=number,
            wa_id=None if hidden else number,
            user_id=user_id if has_user_id else None,
            name=self._rng.choice(NAMES),
            phone_number_id=self._rng.choice(list(self._accounts)),
            domain=domains[index % len(domains)],
        )

    def _new_parts(self) -> list[Part]:
        with_statuses = self._rng.random() < self._status_share
        if self._rng.random() < self._batch_share:
            parts = self._messages(self._rng.randint(2, LARGEST_BATCH))
            return parts + self._some_statuses() if parts and with_statuses else parts
        return self._some_statuses() if with_statuses else self._messages(1)

    def _messages(self, count: int) -> list[Part]:
        """New messages of at most `count` different phones, fewer when fewer may write."""
        parts = []
        for _ in range(min(count, len(self._idle))):
            chosen = self._rng.randrange(len(self._idle))
            self._idle[chosen], self._idle[-1] = self._idle[-1], self._idle[chosen]
            part = self._author.message(self._idle.pop())
            self._unacknowledged[part.item.message_id] = part
            parts.append(part)
        return parts

    def _some_statuses(self) -> list[Part]:
        """Statuses of one outbound message, sometimes with one that was reported before."""
        parts = self._author.statuses(self._rng.choice(self._phones))
        known = [self._rng.choice(self._statuses)] if self._statuses and self._rng.random() < 0.2 else []
        self._statuses.extend(parts)
        return parts + known

    def _duplicate(self) -> Delivery:
        """An earlier body to the byte, or acknowledged messages in one body with new ones."""
        if not self._acknowledged or self._rng.random() < 0.5:
            earlier = self._rng.choice(self._bodies)
            return self._give(earlier.body, earlier.items, duplicate=True)
        known = min(self._rng.randint(1, 3), len(self._acknowledged))
        parts = self._rng.sample(self._acknowledged, known) + self._messages(self._rng.randint(1, 5))
        self._rng.shuffle(parts)
        return self._give_parts(parts, duplicate=True)

    def _give_parts(self, parts: Sequence[Part], *, duplicate: bool) -> Delivery:
        ordered = in_body_order(parts)
        items = tuple(part.item for part in ordered)
        return self._give(encoded(ordered, self._accounts), items, duplicate=duplicate)

    def _give(self, body: bytes, items: tuple[SentItem, ...], *, duplicate: bool) -> Delivery:
        self._serial += 1
        delivery = Delivery(self._serial, body, items, duplicate=duplicate)
        self._in_flight[delivery.serial] = delivery
        return delivery

    def _put_back(self, delivery: Delivery) -> None:
        pause = min(FIRST_RETRY * 2.0 ** min(delivery.attempt - 1, 30), self._longest_pause)
        due = self._clock() + pause * self._rng.uniform(0.9, 1.1)
        heapq.heappush(self._waiting, (due, delivery.serial, delivery))
