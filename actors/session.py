"""The actor of one conversation: decides its messages one at a time, in journal order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Protocol

from .kernel import Address, MailboxClosed, MailboxFull
from .messages import (
    UNCHANGED,
    Ack,
    Completion,
    DeadLetter,
    Envelope,
    Item,
    JsonObject,
    Place,
    Session,
    SessionChange,
    Turn,
)
from .ports import Clock, Route, RoutePolicy
from .service import Deferred, Deliver, Delivered, Moved, Rejected, Result, Service, Undelivered, Unserved


class Conversations(Protocol):
    """What a session needs of whoever feeds it."""

    def turn(self, key: str, service: str) -> Turn:
        """Whether a delivery to this service may be tried now."""

    def park(self, key: str, service: str) -> None:
        """The session stands in line; what it was given goes back to the journal's backlog."""

    def finished(self, key: str, item: Item) -> None:
        """The session is through with this item."""

    async def drained(self, key: str, before: int) -> None:
        """Return when nothing of that session older than `before` is undelivered."""


class Waiting(Protocol):
    """Who waits behind dead letters that keep the order."""

    def holds(self, key: str, service: str) -> bool:
        """A message of that session for this service has to wait for an earlier one."""

    def hold(self, key: str, service: str, seq: int) -> None:
        """The message `seq` becomes such a dead letter."""


class SessionActor:
    """One incarnation of one conversation. Its state is ahead of the database by what the completer
    holds; it passivates only when that has been committed.
    """

    def __init__(
        self,
        key: str,
        *,
        load: Callable[[str], Awaitable[Session | None]],
        routes: RoutePolicy,
        services: Mapping[str, Service],
        completer: Address[Completion],
        conversations: Conversations,
        deferrals: Waiting,
        committed: Callable[[str], Awaitable[None]],
        next_version: Callable[[], int],
        session_ttl: timedelta,
        erasures: Callable[[], int],
        clock: Clock,
    ) -> None:
        self._key = key
        self._load = load
        self._routes = routes
        self._services = services
        self._completer = completer
        self._conversations = conversations
        self._deferrals = deferrals
        self._committed = committed
        self._next_version = next_version
        self._ttl = session_ttl
        self._erasures = erasures
        self._read_after = 0  # so many erasures
        self._clock = clock
        self._session: Session | None = None
        self._touched = clock()

    async def receive(self, batch: list[Item]) -> None:
        for item in batch:
            if not await self._decide(item):
                return

    async def passivate(self) -> None:
        await self._committed(self._key)

    async def _decide(self, item: Item) -> bool:
        """False: the session is parked and the rest of its batch went back to the journal."""
        if item.joins is not None:
            await self._conversations.drained(item.joins, item.seq)
        session = await self._current(item)
        if item.domain is not None:
            route = Route(rule="replay", domain=item.domain, reason="a dead letter goes where it was going")
        else:
            route = self._routes.decide(item, session)
        if route.domain is None:
            after = session
            if route.leave and session.active_service is not None:
                after = replace(session, active_service=None, state={}, version=self._next_version())
            completion = Completion(
                item=item,
                place=Place.HANDLED,
                service=None,
                rule=route.rule,
                attempts=0,
                session=after,
                replies=tuple(reply.as_message() for reply in route.replies),
            )
        else:
            result = await self._deliver(item, session, route.domain)
            if result is None:
                return False
            completion = self._completion(item, session, route.domain, route.rule, result)
        if completion.session is not None:
            self._session = completion.session
        self._touched = self._clock()
        letter = completion.dead_letter
        if letter is not None and letter.keeps_order:
            self._deferrals.hold(self._key, completion.service or "", item.seq)
        try:
            self._completer.tell_nowait(completion)
        except MailboxFull:
            await self._completer.tell(completion)
        self._conversations.finished(self._key, item)
        return True

    async def _current(self, item: Item) -> Session:
        if self._session is None or self._read_after != self._erasures():
            await self._committed(self._key)  # also by the incarnation before this one, if it crashed
            self._read_after = self._erasures()
            self._session = await self._load(self._key)
            if self._session is None and item.joins is not None:
                absorbed = await self._load(item.joins)
                if absorbed is not None:
                    self._session = replace(absorbed, key=self._key, version=self._next_version())
        elif self._clock() - self._touched > self._ttl:
            self._session = None
        if self._session is None:
            self._session = Session(
                key=self._key,
                phone_number_id=item.phone_number_id,
                wa_id=item.wa_id,
                user_id=item.user_id,
                version=self._next_version(),
            )
        session = self._session
        if (item.wa_id and item.wa_id != session.wa_id) or (item.user_id and item.user_id != session.user_id):
            self._session = session = replace(
                session, wa_id=item.wa_id or session.wa_id, user_id=item.user_id or session.user_id
            )
        return session

    async def _deliver(self, item: Item, session: Session, domain: str) -> Result | None:
        """The service's result; None when parked."""
        service = self._services.get(domain)
        if service is None:
            return _unserved(domain)
        if service.paused:
            return Deferred("the service is paused")
        if item.dead_letter is None:  # a letter has a place of its own
            if self._deferrals.holds(self._key, domain):
                return Deferred("an earlier message of the conversation waits")
            turn = self._conversations.turn(self._key, domain)
            if turn is Turn.TOO_LATE and not service.room:
                return Deferred("the service takes nothing")
            if turn is Turn.IN_LINE or (turn is Turn.FREE and not service.room):
                self._conversations.park(self._key, domain)
                return None
        envelope = Envelope(
            id=item.key if not item.revision else f"{item.key}_r{item.revision}",
            message_id=item.message_id,
            domain=domain,
            session=session,
            message=item.message,
            contact=item.contact,
            received_at=item.received_at,
            correlation_id=item.correlation_id,
            traceparent=item.traceparent,
            redelivered=item.redelivered,
            replay=item.overtaken,
        )
        try:
            # NotOwner and ActorDied end this incarnation: the journal still has the message.
            result: Result | Moved = await service.address.ask_nowait(partial(Deliver, envelope))
        except MailboxFull:
            self._conversations.park(self._key, domain)
            return None
        if isinstance(result, Moved):
            result = await self._move(envelope, domain, result.attempts)
        if isinstance(result, Undelivered | Deferred) and domain not in self._services:
            return _unserved(domain, result.attempts)
        return result

    async def _move(self, envelope: Envelope, domain: str, attempts: int) -> Result:
        """The service was replaced while it had the delivery, which had its turn: on to the new one."""
        while (service := self._services.get(domain)) is not None and not service.paused:
            envelope = replace(envelope, redelivered=envelope.redelivered or attempts > 0)
            try:
                result: Result | Moved = await service.address.ask(partial(Deliver, envelope))
            except MailboxClosed:
                if service is self._services.get(domain):
                    raise
                continue  # replaced again
            if not isinstance(result, Moved):
                return replace(result, attempts=result.attempts + attempts)
            attempts += result.attempts
        return Deferred("the service is paused", attempts)

    def _completion(self, item: Item, session: Session, domain: str, rule: str, result: Result) -> Completion:
        place, attempts, letter = Place.DEAD_LETTER, 0, None
        replies: tuple[JsonObject, ...] = ()
        unreadable = False
        # A conversation is with the service that it was last routed to, delivered or not.
        after = session
        if session.active_service != domain and item.dead_letter is None:
            after = replace(session, active_service=domain, state={}, version=self._next_version())
        if isinstance(result, Unserved):
            attempts = result.attempts
            letter = DeadLetter(
                status="pending", resolution="no_service", error=result.reason, retry_in=None, counted=False
            )
            after = session
        elif isinstance(result, Delivered):
            place, attempts, unreadable = Place.DELIVERED, result.attempts, result.unreadable
            after = self._apply(after, result.answer)
            replies = tuple(reply.as_message() for reply in result.answer.replies)
        elif isinstance(result, Rejected):
            place, attempts = Place.REJECTED, result.attempts
            letter = DeadLetter(status="failed", resolution="rejected", error=result.reason, retry_in=None)
        elif isinstance(result, Undelivered):
            attempts = result.attempts
            letter = self._undelivered(item, domain, result)
        else:
            place, attempts, letter = self._deferred(item, domain, result)
        return Completion(
            item=item,
            place=place,
            service=domain,
            rule=rule,
            attempts=attempts,
            session=after,
            replies=replies,
            dead_letter=letter,
            unreadable_answer=unreadable,
        )

    def _undelivered(self, item: Item, domain: str, result: Undelivered) -> DeadLetter:
        first = item.dead_letter is None or item.deferred
        due_in = result.put_off
        if due_in is None:
            due_in = self._services[domain].redelivery.due_in(0 if first else item.retries + 1)
        if due_in is None:
            return DeadLetter(status="failed", resolution="exhausted", error=result.reason, retry_in=None)
        return DeadLetter(
            status="pending",
            resolution=None,
            error=result.reason,
            retry_in=due_in,
            counted=result.put_off is None,
            keeps_order=self._services[domain].strict,
        )

    def _deferred(self, item: Item, domain: str, result: Deferred) -> tuple[Place, int, DeadLetter]:
        """A first delivery waits in its turn; a retry stays the dead letter that it is."""
        first = item.dead_letter is None or item.deferred
        letter = DeadLetter(
            status="pending",
            resolution="deferred" if first else None,
            error=result.reason,
            retry_in=0.0,
            counted=False,
            keeps_order=first or self._services[domain].strict,
        )
        return Place.DEFERRED if first else Place.DEAD_LETTER, result.attempts, letter

    def _apply(self, session: Session, answer: Ack) -> Session:
        change = answer.session or SessionChange()
        active, state = change.active_service, change.state
        if active is UNCHANGED and state is UNCHANGED:
            return session
        return replace(
            session,
            active_service=session.active_service if active is UNCHANGED else active,
            state=session.state if state is UNCHANGED else state,
            version=self._next_version(),
        )


def _unserved(domain: str, attempts: int = 0) -> Unserved:
    return Unserved(f"no service for domain {domain!r}", attempts)
