"""The actor of one domain: takes deliveries from sessions and makes attempts over its lanes. The
number of lanes is the concurrency of that service.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace

import trio

from .breaker import Breaker, BreakerState, RetryBudget
from .errors import NotOwner
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


Result = Delivered | Rejected | Undelivered | Deferred


@dataclass(frozen=True, slots=True)
class Deliver:
    """What a session asks."""

    envelope: Envelope
    promise: Promise[Result]


@dataclass(slots=True)
class ServiceStatistics:
    """Since start: attempts made, and those that did not end in 2xx."""

    attempts: int = 0
    failures: int = 0


OpenLane = Callable[[], AbstractAsyncContextManager[Handler]]


class Service:
    """`lanes` tasks take deliveries from one mailbox. `may_attempt` is asked before every attempt: it
    is false while the lease is not known to be held. `strict`: a conversation waits behind its dead letters.
    `waiting` deliveries may wait for a lane, and beyond them as many dead letters as there are lanes: however
    many messages come, these get their share. `on_taken` is told when a lane takes a delivery, and how
    many more may wait now.
    """

    def __init__(
        self,
        name: str,
        *,
        open_lane: OpenLane,
        lanes: int,
        waiting: int,
        timeout: float,
        deadline: float,
        policy: RetryPolicy,
        redelivery: RedeliveryPolicy,
        strict: bool,
        breaker: Breaker,
        may_attempt: Callable[[], bool],
        on_taken: Callable[[str, int], None],
    ) -> None:
        self.name = name
        self.address: Address[Deliver] = Address(f"service/{name}", waiting + lanes)
        self.redelivery = redelivery
        self.strict = strict
        self.lanes = lanes
        self.patience = timeout / 4  # seconds that a session waits for it while it takes nothing
        self.breaker = breaker
        self.statistics = ServiceStatistics()
        self._open_lane = open_lane
        self._waiting = waiting
        self._timeout = timeout
        self._deadline = deadline
        self._policy = policy
        self._may_attempt = may_attempt
        self._on_taken = on_taken
        self._budget = RetryBudget()
        self._gates: set[trio.CancelScope] = set()
        self._draining = False

    @property
    def room(self) -> int:
        """How many more deliveries may wait for a lane, dead letters apart."""
        return max(0, self._waiting - len(self.address.mailbox))

    async def run(self) -> None:
        """Until the mailbox is closed and every lane has finished what it held."""
        try:
            async with trio.open_nursery() as nursery:
                for number in range(self.lanes):
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

    async def _deliver(self, handler: Handler, envelope: Envelope) -> Result:
        started = trio.current_time()
        attempts = counted = 0
        self._budget.delivery()
        while True:
            if not self._may_attempt():
                raise NotOwner(self.name)
            ticket = self.breaker.admit()
            if ticket is None:
                return self._deferred(attempts)
            attempts += 1
            outcome, began = None, trio.current_time()
            try:
                outcome = await self._attempt(handler, envelope, attempts, started)
            finally:
                self.breaker.record(ticket, *_verdict(outcome), seconds=trio.current_time() - began)
            if isinstance(outcome, Ack):
                return Delivered(outcome, attempts)
            if isinstance(outcome, Unreadable):
                return Delivered(Ack(), attempts, unreadable=True)
            self.statistics.failures += 1
            if isinstance(outcome, Reject):
                return Rejected(outcome.reason, attempts)
            if outcome.after is None:
                counted += 1
                if self.breaker.state is not BreakerState.CLOSED:
                    return self._deferred(attempts)
            elapsed = trio.current_time() - started
            wait = self._policy.next_attempt(counted, elapsed, self._deadline, outcome.after)
            if wait is None or (outcome.after is None and not self._budget.spend()):
                asked = outcome.after
                put_off = None if asked is None else self._policy.put_off(asked)
                return Undelivered(outcome.reason, attempts, put_off)
            await trio.sleep(wait)

    def _deferred(self, attempts: int) -> Deferred:
        return Deferred(f"the service is left alone for a while: {self.breaker.reason}", attempts)

    async def _attempt(
        self, handler: Handler, envelope: Envelope, attempt: int, started: float
    ) -> Ack | Retry | Reject | Unreadable:
        self.statistics.attempts += 1
        if attempt > 1:
            envelope = replace(envelope, attempt=attempt, redelivered=True)
        left = self._deadline - (trio.current_time() - started)
        with trio.move_on_after(min(self._timeout, left)):
            return await handler.attempt(envelope)
        return Retry(reason=f"no answer within {self._timeout:g} s")


def _verdict(outcome: Outcome | Unreadable | None) -> tuple[bool | None, str]:
    """What an attempt says about the service, and why. One that refuses a message is well."""
    if isinstance(outcome, Retry):
        return (False if outcome.after is None else None), outcome.reason
    return (None if outcome is None else True), ""
