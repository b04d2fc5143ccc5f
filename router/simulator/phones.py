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
from typing import Literal

import trio

from router.simulator.deliveries import MESSAGE, PLAIN, STATUS, Delivery, SentItem
from router.simulator.faults import MOST_UPDATES, Faults, forgery, strikes
from router.simulator.statuses import further
from router.simulator.writing import MALFORMED, NAMES, Author, Part, Phone, encoded, in_body_order

FIRST_RETRY = 0.2
"""Seconds from an answer that is not 200 to the next attempt; doubled each time, give or take a tenth."""

REMEMBERED = 512
"""How many recent bodies, messages and statuses may come again as duplicates."""

MOST_REPORTS = 20_000
REPORTING_SHARE = 0.5
"""Of new deliveries, while statuses of messages that the Graph API took wait to be reported."""

REPORTS_IN_BODY = 20
BESIDE = 10
"""The statuses, malformed messages and errors that may stand beside a batch, at most."""


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

    `kinds` is the share of messages after a phone's first that are of any kind that Meta has, or "all"; the
    text of an item is what `payloads.text_of` finds in its message. `other_share` of new deliveries have an
    error or a change of another field beside their messages. `faults` says what goes wrong, and how large a
    batch may be; a forged body is never redelivered.

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
        kinds: float | Literal["all"] = 0.0,
        other_share: float = 0.0,
        faults: Faults | None = None,
        backlog: int = 1_000,
        longest_pause: float = 30.0,
        clock: Callable[[], float] = trio.current_time,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        if senders < 1 or not numbers or not texts or not all(texts.values()):
            raise ValueError("a population needs senders, numbers, and texts for every domain")
        self._rng = rng
        self._author = Author(
            rng,
            {domain: tuple(written) for domain, written in texts.items()},
            unix_time,
            1.0 if kinds == "all" else kinds,
        )
        self._duplicate_share = duplicate_share
        self._batch_share = batch_share
        self._status_share = status_share
        self._other_share = other_share
        self._faults = faults or Faults()
        self._backlog = backlog
        self._longest_pause = longest_pause
        self._clock = clock
        self._accounts = {
            number: (str(10**15 + index), f"1555{index:07d}") for index, number in enumerate(numbers)
        }
        self._phones = [self._phone(index, user_id_share, unnumbered_share) for index in range(senders)]
        self._idle = list(self._phones)
        self._phone_of = {(phone.phone_number_id, phone.sender): phone for phone in self._phones}
        self._unacknowledged: dict[str, Part] = {}
        self._acknowledged: deque[Part] = deque(maxlen=REMEMBERED)
        self._statuses: deque[Part] = deque(maxlen=REMEMBERED)
        self._bodies: deque[Delivery] = deque(maxlen=REMEMBERED)
        self._history: list[Delivery] = []
        self._bodies_given = 0
        self._reports: deque[list[Part]] = deque()
        self._furthest: dict[tuple[str, str], str] = {}
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
        if strikes(self._faults.forged, self._rng):
            return self._forged()
        if self._history and strikes(self._faults.late, self._rng):
            return self._again(self._rng.choice(self._history))
        if self._bodies and self._rng.random() < self._duplicate_share:
            return self._duplicate()
        parts = self._new_parts()
        if not parts:
            return None
        if strikes(self._faults.malformed, self._rng):
            parts = self._with_malformed(parts)
        delivery = self._give_parts(parts, duplicate=False)
        self._bodies.append(delivery)
        self._remember(delivery)
        return delivery

    def next_redelivery(self) -> Delivery | None:
        """The longest due of the deliveries that were not answered 200, or None."""
        if not self._waiting or self._waiting[0][0] > self._clock():
            return None
        _, _, delivery = heapq.heappop(self._waiting)
        manner = self._faults.manner(self._rng)
        again = replace(delivery, attempt=delivery.attempt + 1, twin=False, manner=manner)
        self._in_flight[again.serial] = again
        return again

    def answered(self, delivery: Delivery, status: int | None) -> None:
        """`delivery` came back with `status`, or with None when no complete answer came.

        Raises ValueError if it was not in flight.
        """
        if self._in_flight.pop(delivery.serial, None) is None:
            raise ValueError(f"delivery {delivery.serial} is not in flight")
        if delivery.forged:
            return
        if status != 200:
            self._put_back(delivery)
            return
        for item in delivery.items:
            if item.kind == STATUS:
                named = (item.phone_number_id, item.message_id)
                self._furthest[named] = further(self._furthest.get(named), item.text)
            part = self._unacknowledged.pop(item.message_id, None) if item.kind == MESSAGE else None
            if part is not None:
                self._acknowledged.append(part)
                self._idle.append(part.phone)

    def took(self, message_id: str, phone_number_id: str, recipient: str) -> None:
        """The Graph API took this message: its statuses come soon, in one of many orders.

        At most `MOST_REPORTS` bodies of statuses wait to be given out; beyond that none are made. Raises
        ValueError if no phone of this population is `recipient` (its number, or the user id of one that hides
        it) at `phone_number_id`.
        """
        phone = self._phone_of.get((phone_number_id, recipient))
        if phone is None:
            raise ValueError(f"no phone of this population writes to {phone_number_id} under that name")
        if len(self._reports) < MOST_REPORTS:
            self._reports.extend(self._author.reports(phone, message_id))

    def furthest_statuses(self) -> Mapping[tuple[str, str], str]:
        """(phone_number_id, message_id) -> the status that must stand now, by all bodies answered 200.

        While a delivery is unanswered, what the webhook knows may be further.
        """
        return dict(self._furthest)

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
        if self._reports and self._rng.random() < REPORTING_SHARE:
            return self._some_reports() + self._messages(self._rng.randint(0, 1))
        with_statuses = self._rng.random() < self._status_share
        if self._rng.random() < self._batch_share:
            count = self._rng.randint(2, self._faults.largest_batch)
            parts = self._messages(min(count, MOST_UPDATES - BESIDE))
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

    def _some_reports(self) -> list[Part]:
        """Several of those that wait, oldest first, so that other bodies may overtake them."""
        count = min(len(self._reports), self._rng.randint(1, REPORTS_IN_BODY))
        return [part for _ in range(count) for part in self._reports.popleft()]

    def _with_malformed(self, parts: Sequence[Part]) -> list[Part]:
        """Malformed messages anywhere between these parts, for the numbers that these parts are for."""
        mixed = list(parts)
        for _ in range(self._rng.randint(1, 3)):
            beside = self._rng.choice(parts).phone
            mixed.insert(self._rng.randint(0, len(mixed)), self._author.malformed(beside))
        return mixed

    def _forged(self) -> Delivery:
        part = self._author.forged(self._rng.choice(self._phones))
        body = encoded([part], self._accounts)
        self._serial += 1
        return self._fly(Delivery(self._serial, body, (part.item,), manner=forgery(self._rng)))

    def _remember(self, delivery: Delivery) -> None:
        """Keep a fair sample of all bodies of the run (reservoir sampling, Vitter's algorithm R)."""
        if self._faults.late == 0.0:
            return
        self._bodies_given += 1
        if len(self._history) < self._faults.history:
            self._history.append(delivery)
            return
        place = self._rng.randrange(self._bodies_given)
        if place < len(self._history):
            self._history[place] = delivery

    def _again(self, earlier: Delivery) -> Delivery:
        return self._give(earlier.body, earlier.items, earlier.malformed, duplicate=True)

    def _duplicate(self) -> Delivery:
        """An earlier body to the byte, or acknowledged messages in one body with new ones."""
        if not self._acknowledged or self._rng.random() < 0.5:
            return self._again(self._rng.choice(self._bodies))
        known = min(self._rng.randint(1, 3), len(self._acknowledged))
        parts = self._rng.sample(self._acknowledged, known) + self._messages(self._rng.randint(1, 5))
        self._rng.shuffle(parts)
        return self._give_parts(parts, duplicate=True)

    def _give_parts(self, parts: Sequence[Part], *, duplicate: bool) -> Delivery:
        ordered = in_body_order(parts)
        items = tuple(part.item for part in ordered if part.item.kind != MALFORMED)
        malformed = tuple(
            part.item.message_id for part in ordered if part.item.kind == MALFORMED and part.item.message_id
        )
        between = {}
        if strikes(self._other_share, self._rng):
            number = self._rng.choice(ordered).item.phone_number_id
            between[number] = self._author.between(number, self._accounts[number][1])
        return self._give(encoded(ordered, self._accounts, between), items, malformed, duplicate=duplicate)

    def _give(
        self, body: bytes, items: tuple[SentItem, ...], malformed: tuple[str, ...], *, duplicate: bool
    ) -> Delivery:
        self._serial += 1
        twin = strikes(self._faults.twins, self._rng)
        manner = PLAIN if twin else self._faults.manner(self._rng)
        return self._fly(
            Delivery(
                self._serial, body, items, duplicate=duplicate, twin=twin, manner=manner, malformed=malformed
            )
        )

    def _fly(self, delivery: Delivery) -> Delivery:
        self._in_flight[delivery.serial] = delivery
        return delivery

    def _put_back(self, delivery: Delivery) -> None:
        pause = min(FIRST_RETRY * 2.0 ** min(delivery.attempt - 1, 30), self._longest_pause)
        due = self._clock() + pause * self._rng.uniform(0.9, 1.1)
        heapq.heappush(self._waiting, (due, delivery.serial, delivery))
