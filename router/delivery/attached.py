"""Services that come to us: each opens connections, takes as many deliveries at once as it has given credit
for, and answers each. Knows nothing of sockets: whoever has one gives it frames, and sends what it is told.

A conversation has one delivery under way at a time, whatever connection that is on, so that a connection that
is lost costs no order: what was not answered on it is tried again before anything later of its conversation.
"""

from __future__ import annotations

import hmac
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
import trio

from actors.messages import Envelope, Outcome, Reject, Retry
from actors.ports import Handler, Unreadable
from actors.service import OpenLane
from router.credentials import digest_of
from router.json_text import encode, parse

from .contract import KnownDomain, as_object, read_object

MAX_CREDIT: Final = 1_024
"""Deliveries under way on one connection; credit beyond it is not given."""
MAX_REASON: Final = 200
_PATIENCE = 1.0  # seconds that an attempt waits for somebody to attach: as long as one needs to come back
_REMEMBERED = 10_000  # conversations and the connection that each had last


class BadFrame(Exception):
    """What came is no frame of this protocol; the message says why, in words of ours."""


class Detached(Exception):
    """The connection is gone: whether the service has the message is not known."""


@dataclass(eq=False, slots=True)
class _UnderWay:
    answered: trio.Event = field(default_factory=trio.Event)
    outcome: Outcome | Unreadable | None = None


class Attachment:
    """One connection of a service. `send` takes a frame at once and sends it when it can; `on_credit` is
    told when there is more.
    """

    def __init__(
        self, send: Callable[[str], None], *, known_domain: KnownDomain, on_credit: Callable[[], None]
    ) -> None:
        self._send = send
        self._known_domain = known_domain
        self._on_credit = on_credit
        self._under_way: dict[str, _UnderWay] = {}
        self.free = 0
        """How many deliveries it takes now."""

    async def deliver(self, envelope: Envelope) -> Outcome | Unreadable:
        """One attempt, for which there has to be credit. Raises Detached. Cancelled, an answer that comes
        later is nobody's."""
        self.free -= 1
        mine = self._under_way[envelope.id] = _UnderWay()
        try:
            self._send(encode({"type": "deliver", "delivery": as_object(envelope)}).decode())
            await mine.answered.wait()
        finally:
            if self._under_way.get(envelope.id) is mine:
                del self._under_way[envelope.id]
        if mine.outcome is None:
            raise Detached
        return mine.outcome

    def receive(self, frame: str | bytes) -> None:
        """What the service says. Raises BadFrame: the connection has to be closed."""
        try:
            said = parse(frame.encode("utf-8", "surrogatepass") if isinstance(frame, str) else frame)
        except ValueError:
            raise BadFrame("it is not JSON") from None
        if not isinstance(said, dict):
            raise BadFrame("it is not an object")
        kind = said.get("type")
        if kind == "credit":
            self._grant(said.get("credit"))
        elif kind in ("ack", "retry", "reject"):
            identity = said.get("id")
            if not isinstance(identity, str):
                raise BadFrame(f"{kind} has no id")
            waiting = self._under_way.get(identity)
            if waiting is not None:  # else it is late
                waiting.outcome = self._outcome(kind, said)
                waiting.answered.set()
        else:
            raise BadFrame('its type is none of "credit", "ack", "retry", "reject"')

    def _grant(self, credit: Any) -> None:
        if not isinstance(credit, int) or isinstance(credit, bool) or credit < 1:
            raise BadFrame("credit is not a number of deliveries, 1 or more")
        self.free = min(self.free + credit, MAX_CREDIT)
        self._on_credit()

    def _outcome(self, kind: str, said: Mapping[str, Any]) -> Outcome | Unreadable:
        if kind == "ack":
            return read_object(said.get("answer") or {}, self._known_domain)
        reason = said.get("reason")
        words = reason[:MAX_REASON] if isinstance(reason, str) and reason else kind
        if kind == "reject":
            return Reject(words)
        after = said.get("after")
        if after is None:
            return Retry(reason=words)
        if not isinstance(after, int | float) or isinstance(after, bool) or not 0 <= after < 10**9:
            return Retry(reason="the service said `after`, and it is no number of seconds")
        return Retry(float(after), words)

    def detach(self) -> None:
        """It is gone: nothing of what is under way is answered any more."""
        self.free = 0
        for one in self._under_way.values():
            one.answered.set()


class AttachedService:
    """A domain that is reached over the connections that it opens. `credential` is the SHA-256, in
    hexadecimal digits, of the token that each has to show.
    """

    def __init__(self, name: str, credential: str, *, known_domain: KnownDomain) -> None:
        self.name = name
        self.credential = credential
        self.ended = trio.Event()
        """The service is another one now, or gone: whoever is attached is sent away."""
        self._known_domain = known_domain
        self._attached: list[Attachment] = []
        self._last: OrderedDict[str, Attachment] = OrderedDict()
        self._places = 0  # that lanes hold, for which credit is kept
        self._changed = trio.Event()

    def is_authorized(self, token: str) -> bool:
        """Compared in constant time."""
        return hmac.compare_digest(digest_of(token), self.credential)

    @property
    def connections(self) -> int:
        return len(self._attached)

    def attach(self, send: Callable[[str], None]) -> Attachment:
        """A new connection, until `detach`."""
        attachment = Attachment(send, known_domain=self._known_domain, on_credit=self._wake)
        self._attached.append(attachment)
        return attachment

    def detach(self, attachment: Attachment) -> None:
        self._attached.remove(attachment)
        attachment.detach()

    def open_lane(self) -> OpenLane:
        """Lanes share the connections; there are as many of them as deliveries may be under way."""

        @asynccontextmanager
        async def lane() -> AsyncIterator[Handler]:
            one = AttachedLane(self)
            try:
                yield one
            finally:
                one.done()

        return lane

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def place(self) -> None:
        """Return when there is credit that no other lane waits to use. `give_back` ends it."""
        while sum(one.free for one in self._attached) <= self._places:
            await self._changed.wait()
        self._places += 1

    def give_back(self) -> None:
        self._places -= 1
        self._wake()

    async def attempt(self, envelope: Envelope) -> Outcome | Unreadable:
        """An attempt that was given its place back."""
        with trio.move_on_after(_PATIENCE):
            while not any(one.free for one in self._attached):
                await self._changed.wait()
        if not self._attached:
            return Retry(reason="the service is not attached")
        attachment = self._connection_of(envelope.session.key)
        if attachment is None:
            return Retry(_PATIENCE, "the service takes no more at the moment")
        try:
            return await attachment.deliver(envelope)
        except Detached:
            return Retry(reason="the service's connection was closed")
        except trio.Cancelled:
            self._last.pop(envelope.session.key, None)  # it hangs: the next attempt goes to another one
            raise

    def _connection_of(self, key: str) -> Attachment | None:
        """That which the conversation had last, if it has credit; else the one with the most, if any has."""
        attachment = self._last.pop(key, None)
        if attachment is None or not attachment.free:
            attachment = max(self._attached, key=lambda one: one.free)
            if not attachment.free:
                return None
        self._last[key] = attachment
        if len(self._last) > _REMEMBERED:
            self._last.popitem(last=False)
        return attachment


class AttachedLane:
    """One delivery at a time, and none before there is credit for it: it waits where others can go past."""

    def __init__(self, service: AttachedService) -> None:
        self._service = service
        self._has_place = False

    async def ready(self) -> None:
        if not self._has_place:
            await self._service.place()
            self._has_place = True

    def done(self) -> None:
        if self._has_place:
            self._has_place = False
            self._service.give_back()

    async def attempt(self, envelope: Envelope) -> Outcome | Unreadable:
        self.done()  # the credit that was kept is used now
        return await self._service.attempt(envelope)


def frame(said: Mapping[str, Any]) -> str:
    """A frame as text."""
    return orjson.dumps(said).decode()
