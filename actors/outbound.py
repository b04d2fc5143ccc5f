"""Sends replies from the outbox: those of one conversation in order and one at a time, several conversations
at once over the sender's lanes. The outbox is the queue: in memory is what the lanes have in hand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import trio

from .breaker import Breaker
from .errors import JournalUnavailable
from .messages import Later, OutboundMessage, Refused, SendOutcome, SendRecord, Sent, Unsent
from .ports import Clock, Outbox, ResendPolicy, Sender

OpenSender = Callable[[], AbstractAsyncContextManager[Sender]]

_OF_EACH = 8  # replies of one conversation that a lane sends before it takes another one
_IN_HAND = 8  # conversations for each lane, with those whose attempts are being put on record
_LOOK_EVERY = 30.0  # seconds at most: what nobody told of
_LOOK_AGAIN = (
    1.0  # seconds until the next look while the lease is not known to be held, or the outbox is away
)


@dataclass(slots=True)
class OutboundStatistics:
    """Since start: replies sent, refused for good or given up, and attempts that have to be repeated."""

    sent: int = 0
    refused: int = 0
    put_off: int = 0


class Outbound:
    """One per owner. `lanes` conversations are sent to at once, each attempt for at most `timeout` seconds. A
    reply that could not be sent within `max_age` has failed. While the breaker is open nothing is sent, but
    for the one reply that tries. What was sent and not put on record is sent again by the next owner.
    """

    def __init__(
        self,
        outbox: Outbox,
        *,
        epoch: int,
        open_sender: OpenSender,
        lanes: int,
        timeout: float,
        max_age: timedelta,
        policy: ResendPolicy,
        breaker: Breaker,
        may_attempt: Callable[[], bool],
        clock: Clock,
        on_unavailable: Callable[[JournalUnavailable], None],
        retry_after: float = 0.2,
    ) -> None:
        self.breaker = breaker
        self.statistics = OutboundStatistics()
        self._outbox = outbox
        self._epoch = epoch
        self._open_sender = open_sender
        self._lanes = lanes
        self._timeout = timeout
        self._max_age = max_age
        self._policy = policy
        self._may_attempt = may_attempt
        self._clock = clock
        self._on_unavailable = on_unavailable
        self._retry_after = retry_after
        self._busy: set[str] = set()  # conversations in the queue, with a lane, or not yet recorded
        self._queue: deque[list[OutboundMessage]] = deque()  # each of one conversation, in order
        self._idle = trio.lowlevel.ParkingLot()  # lanes
        self._records: list[SendRecord] = []
        self._released: list[str] = []  # conversations whose lane has gone on, behind their records
        self._to_record = trio.Event()
        self._wake = trio.Event()
        self._closing = False
        self._sent_all = False

    def committed(self) -> None:
        """There are replies in the outbox that were not there before."""
        self._wake.set()

    def drain(self) -> None:
        """Attempts that have begun are finished and put on record; the rest is for the next owner."""
        self._closing = True
        self._wake.set()
        self._idle.unpark_all()

    async def run(self) -> None:
        """Until `drain`.

        Raises:
            LeaseLost: the epoch is over.
        """
        async with trio.open_nursery() as recording:
            recording.start_soon(self._record)
            async with trio.open_nursery() as sending:
                for number in range(self._lanes):
                    sending.start_soon(self._lane, name=f"outbound/{number}")
                await self._feed()
            self._sent_all = True
            self._to_record.set()

    async def _feed(self) -> None:
        """Bring the lanes replies, as long as they have room for them."""
        while not self._closing:
            self._wake = trio.Event()
            wait = _LOOK_EVERY
            room = self._room()
            if room:
                look = partial(
                    self._outbox.unsent, conversations=room, of_each=_OF_EACH, busy=sorted(self._busy)
                )
                try:
                    found = await look()
                except JournalUnavailable as error:
                    self._on_unavailable(error)
                    found = Unsent([], _LOOK_AGAIN)
                self._take_in(found.messages)
                wait = min(wait, wait if found.next_in is None else found.next_in)
            if not self._closing:
                with trio.move_on_after(min(wait, self._breaker_wait() or wait)):
                    await self._wake.wait()

    def _breaker_wait(self) -> float | None:
        return self.breaker.probe_in() if self._may_attempt() else _LOOK_AGAIN

    def _room(self) -> int:
        """For how many more conversations; none while the sender is left alone or lanes have next ones."""
        if self._breaker_wait() != 0.0 or len(self._queue) >= self._lanes:
            return 0
        return max(0, _IN_HAND * self._lanes - len(self._busy))

    def _take_in(self, messages: list[OutboundMessage]) -> None:
        of: dict[str, list[OutboundMessage]] = {}
        for message in messages:
            of.setdefault(message.session_key, []).append(message)
        self._busy.update(of)
        self._queue.extend(of.values())
        self._idle.unpark(count=len(of))

    async def _lane(self) -> None:
        async with self._open_sender() as sender:
            while not self._closing:
                if not self._queue:
                    await self._idle.park()
                    continue
                messages = self._queue.popleft()
                if len(self._queue) == self._lanes - 1:
                    self._wake.set()
                for message in messages:
                    if self._closing or not await self._send(sender, message):
                        break
                self._released.append(messages[0].session_key)
                self._to_record.set()

    async def _send(self, sender: Sender, message: OutboundMessage) -> bool:
        """False: the replies behind it have to wait."""
        if self._clock() - message.created_at > self._max_age:
            return self._ended(message, Refused("it could not be sent in time"))
        ticket = self.breaker.admit() if self._may_attempt() else None
        if ticket is None:
            return False
        outcome: SendOutcome | None = None
        try:
            with trio.move_on_after(self._timeout) as bound:
                outcome = await sender.send(message)
            if bound.cancelled_caught:
                outcome = Later(f"no answer within {self._timeout:g} s")
        finally:
            self.breaker.record(ticket, *_verdict(outcome))
        assert outcome is not None
        return self._ended(message, outcome)

    def _ended(self, message: OutboundMessage, outcome: SendOutcome) -> bool:
        retry_in = None
        if isinstance(outcome, Later):
            self.statistics.put_off += 1
            retry_in = self._policy.send_again_in(message.attempts + 1, outcome.after)
        elif isinstance(outcome, Sent):
            self.statistics.sent += 1
        else:
            self.statistics.refused += 1
        self._records.append(SendRecord(message=message, outcome=outcome, retry_in=retry_in))
        self._to_record.set()
        return retry_in is None

    async def _record(self) -> None:
        """What ended while the last commit ran goes into the next one."""
        while self._records or self._released or not self._sent_all:
            await self._to_record.wait()
            self._to_record = trio.Event()
            records, self._records = self._records, []
            released, self._released = self._released, []
            if records:
                await self._put_on_record(records)
            self._busy.difference_update(released)
            if released:
                self._wake.set()
            if self._sent_all:
                self._to_record.set()

    async def _put_on_record(self, records: list[SendRecord]) -> None:
        """An unreachable database is waited for: only here is it known what was sent."""
        wait = self._retry_after
        while True:
            try:
                return await self._outbox.record(records, epoch=self._epoch)
            except JournalUnavailable as error:
                self._on_unavailable(error)
                await trio.sleep(wait)
                wait = min(wait * 2, 5.0)


def _verdict(outcome: SendOutcome | None) -> tuple[bool | None, str]:
    """What an attempt says about the sender. One that refuses a message, or spares a phone, is well."""
    if isinstance(outcome, Later) and not outcome.only_this_one:
        return False, outcome.reason
    return (None if outcome is None else True), ""
