"""The actor of one domain: takes deliveries from sessions and makes attempts over its lanes. The
number of lanes bounds the concurrency of that service.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace

import trio

from .breaker import Breaker, BreakerState, RetryBudget
from .concurrency import Concurrency
from .errors import NotOwner
from .histogram import Histogram
from .kernel import Address, MailboxClosed, Promise
from .messages import Ack, Envelope, Outcome, Reject, Retry
from .ports import Gated, Handler, RedeliveryPolicy, RetryPolicy, Unreadable


@dataclass(frozen=True, slots=True)
class Delivered:
    """It has the message. `answer` is what it said, empty when that could not be read."""

    answer: Ack
    attempts: int
    unreadable: bool = False


@dataclass(frozen=True, slots=True)
class Rejected:
    """It will never take the message."""

    reason: str
    attempts: int


@dataclass(frozen=True, slots=True)
class Undelivered:
    """The deadline or the attempts are used up. `put_off`: the service asked for it again in so many
    seconds."""

    reason: str
    attempts: int
    put_off: float | None = None


@dataclass(frozen=True, slots=True)
class Deferred:
    """It has to wait: for a service that is known to be unable, or for an earlier message."""

    reason: str
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Unserved:
    """Nobody serves that domain, or nobody does any more."""

    reason: str
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Moved:
    """This actor makes no more attempts: whoever serves the domain now is to be asked."""

    attempts: int = 0


Result = Delivered | Rejected | Undelivered | Deferred | Unserved


@dataclass(frozen=True, slots=True)
class Deliver:
    """What a session asks."""

    envelope: Envelope
    promise: Promise[Result | Moved]


@dataclass(frozen=True, slots=True)
class TimedOut(Retry):
    """There was no answer in time."""


@dataclass(slots=True)
class ServiceStatistics:
    """Since this process began to deliver: attempts made, those that did not end in 2xx, and how long each
    took that was not broken off."""

    attempts: int = 0
    failures: int = 0
    latency: Histogram = field(default_factory=Histogram)


OpenLane = Callable[[], AbstractAsyncContextManager[Handler]]


class Service:
    """As many tasks as `concurrency` has at most take deliveries from one mailbox, and as many as it allows
    now make attempts. `may_attempt` is asked before every attempt: it is false while the lease is not known
    to be held. `strict`: a conversation waits behind its dead letters. `paused`: nobody may bring it
    anything. `waiting` deliveries may wait for a lane, and beyond them as many dead letters as there are
    lanes: however many messages come, these get their share. `on_taken` is told when a lane takes a delivery,
    and how many more may wait now.
    """

    def __init__(
        self,
        name: str,
        *,
        open_lane: OpenLane,
        concurrency: Concurrency,
        waiting: int,
        timeout: float,
        deadline: float,
        policy: RetryPolicy,
        redelivery: RedeliveryPolicy,
        strict: bool,
        paused: bool,
        breaker: Breaker,
        statistics: ServiceStatistics,
        may_attempt: Callable[[], bool],
        on_taken: Callable[[str, int], None],
    ) -> None:
        self.name = name
        self.address: Address[Deliver] = Address(f"service/{name}", waiting + concurrency.most)
        self.redelivery = redelivery
        self.strict = strict
        self.paused = paused
        self.concurrency = concurrency
        self.patience = timeout / 4  # seconds that a session waits for it while it takes nothing
        self.breaker = breaker
        self.statistics = statistics
        self._open_lane = open_lane
        self._waiting = waiting
        self._timeout = timeout
        self._deadline = deadline
        self._policy = policy
        self._may_attempt = may_attempt
        self._on_taken = on_taken
        self._budget = RetryBudget()
        self._gates: set[trio.CancelScope] = set()
        self._running = 0
        self._waiting_lanes = trio.lowlevel.ParkingLot()  # those whose attempt is beyond the limit
        self._draining = False
        self._retired = trio.Event()

    @property
    def room(self) -> int:
        """How many more deliveries may wait for a lane, dead letters apart."""
        return max(0, self._waiting - len(self.address.mailbox))

    def opens_in(self) -> float | None:
        """Seconds until it may be tried, 0 when it may now; None: nobody knows."""
        return None if self.paused else self.breaker.probe_in()

    async def run(self) -> None:
        """Until the mailbox is closed and every lane has finished what it held."""
        try:
            async with trio.open_nursery() as nursery:
                for number in range(self.concurrency.most):
                    nursery.start_soon(self._lane, name=f"lane/{self.name}/{number}")
        except BaseException:
            self.address.abandon_taken()
            raise

    async def _lane(self) -> None:
        async with self._open_lane() as handler:
            gated = handler if isinstance(handler, Gated) else None
            while True:
                if gated is not None:
                    await self._until_ready(gated)
                try:
                    [delivery] = await self.address.mailbox.drain(1)
                except MailboxClosed:
                    return
                self._on_taken(self.name, self.room)
                try:
                    delivery.promise.answer(await self._deliver(handler, delivery.envelope))
                except NotOwner as refusal:
                    delivery.promise.fail(refusal)

    async def _until_ready(self, handler: Gated) -> None:
        with trio.CancelScope() as scope:
            self._gates.add(scope)
            if self._draining:
                scope.cancel()
            await handler.ready()
        self._gates.discard(scope)

    def drain(self) -> None:
        """Take no more; what waits is attempted still."""
        self._draining = True
        for scope in self._gates:
            scope.cancel()
        self.address.mailbox.close()

    def retire(self) -> None:
        """Begin no more attempts: what waits is told so, what runs is finished."""
        self._retired.set()
        self._running += len(self._waiting_lanes)
        self._waiting_lanes.unpark_all()
        self.drain()
        for delivery in self.address.mailbox.drain_nowait():
            delivery.promise.answer(Moved())

    async def _deliver(self, handler: Handler, envelope: Envelope) -> Result | Moved:
        attempts = counted = 0
        reason, started = "", float("inf")
        self._budget.delivery()
        while True:
            await self._take_place()
            try:
                started = min(started, trio.current_time())
                if self._retired.is_set():
                    return Moved(attempts)
                if trio.current_time() - started >= self._deadline:
                    return Undelivered(reason, attempts)
                if not self._may_attempt():
                    raise NotOwner(self.name)
                ticket = self.breaker.admit()
                if ticket is None:
                    return self._deferred(attempts)
                attempts += 1
                outcome = await self._attempt(handler, envelope, attempts, started, ticket)
            finally:
                self._give_place()
            if isinstance(outcome, Ack):
                return Delivered(outcome, attempts)
            if isinstance(outcome, Unreadable):
                return Delivered(Ack(), attempts, unreadable=True)
            self.statistics.failures += 1
            if isinstance(outcome, Reject):
                return Rejected(outcome.reason, attempts)
            reason = outcome.reason
            if outcome.after is None:
                counted += 1
                if self.breaker.state is not BreakerState.CLOSED:
                    return self._deferred(attempts)
            elapsed = trio.current_time() - started
            wait = self._policy.next_attempt(counted, elapsed, self._deadline, outcome.after)
            if wait is None or (outcome.after is None and not self._budget.spend()):
                asked = outcome.after
                put_off = None if asked is None else self._policy.put_off(asked)
                return Undelivered(reason, attempts, put_off)
            with trio.move_on_after(wait):
                await self._retired.wait()

    async def _take_place(self) -> None:
        """A place for one attempt: no more run at once than the limit, and who waits has its turn."""
        is_free = self._running < self.concurrency.limit and not self._waiting_lanes
        if is_free or self._retired.is_set():
            self._running += 1
        else:
            await self._waiting_lanes.park()  # whoever wakes it has counted it

    def _give_place(self) -> None:
        self._running -= 1
        free = self.concurrency.limit - self._running
        if free > 0 and self._waiting_lanes:
            count = min(free, len(self._waiting_lanes))
            self._running += count
            self._waiting_lanes.unpark(count=count)

    def _measure(self, ticket: int, outcome: Outcome | Unreadable | None, began: float) -> None:
        now = trio.current_time()
        self.breaker.record(ticket, *verdict(outcome), seconds=now - began)
        if isinstance(outcome, TimedOut):
            self.concurrency.timed_out(began=began, now=now)
        elif not isinstance(outcome, Retry | None):
            self.concurrency.answered(now - began, running=self._running)
        if outcome is not None:
            self.statistics.latency.observe(now - began)

    def _deferred(self, attempts: int) -> Deferred:
        return Deferred(f"the service is left alone for a while: {self.breaker.reason}", attempts)

    async def _attempt(
        self, handler: Handler, envelope: Envelope, attempt: int, started: float, ticket: int
    ) -> Ack | Retry | Reject | Unreadable:
        self.statistics.attempts += 1
        if attempt > 1:
            envelope = replace(envelope, attempt=attempt, redelivered=True)
        began = trio.current_time()
        outcome: Ack | Retry | Reject | Unreadable | None = None
        try:
            with trio.move_on_after(min(self._timeout, self._deadline - (began - started))) as bound:
                outcome = await handler.attempt(envelope)
            if outcome is None:
                assert bound.cancelled_caught
                outcome = TimedOut(reason=f"no answer within {self._timeout:g} s")
            return outcome
        finally:
            self._measure(ticket, outcome, began)


def verdict(outcome: Outcome | Unreadable | None) -> tuple[bool | None, str]:
    """What an attempt says about the service, and why. One that refuses a message is well."""
    if isinstance(outcome, Retry):
        return (False if outcome.after is None else None), outcome.reason
    return (None if outcome is None else True), ""
