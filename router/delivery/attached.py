"""Services that come to us: each opens connections, takes as many deliveries at once as it has given credit
for, and answers each. Knows nothing of sockets: whoever has one gives it frames, and sends what it is told.

A conversation has one delivery under way at a time, whatever connection that is on, so that a connection that
is lost costs no order: what was not answered on it is tried again before anything later of its conversation.
"""

from __future__ import annotations

import secrets
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
    """One connection of a service. `send` takes a frame at once, and sends it when it can."""

    def __init__(self, send: Callable[[str], None], *, known_domain: KnownDomain) -> None:
        self._send = send
        self._known_domain = known_domain
        self._credit = trio.Semaphore(0)
        self._under_way: dict[str, _UnderWay] = {}
        self.gone = trio.Event()

    @property
    def free(self) -> int:
        """How many deliveries it would take at once now."""
        return self._credit.value

    async def deliver(self, envelope: Envelope) -> Outcome | Unreadable:
        """One attempt. Raises Detached. Cancelled, an answer that comes later is nobody's."""
        await self._credit.acquire()
        if self.gone.is_set():
            raise Detached
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
        for _ in range(min(credit, MAX_CREDIT - self._credit.value)):
            self._credit.release()

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
        self.gone.set()
        for one in self._under_way.values():
            one.answered.set()
        for _ in range(MAX_CREDIT):  # who waits for credit is told
            if not self._credit.statistics().tasks_waiting:
                break
            self._credit.release()


class AttachedService:
    """A domain that is reached over the connections that it opens. `token` is what each has to show."""

    def __init__(self, name: str, token: str, *, known_domain: KnownDomain) -> None:
        self.name = name
        self._token = token.encode()
        self._known_domain = known_domain
        self._attached: list[Attachment] = []
        self._last: OrderedDict[str, Attachment] = OrderedDict()
        self._came = trio.Event()

    def is_authorized(self, token: str) -> bool:
        """Compared in constant time."""
        return secrets.compare_digest(token.encode("utf-8", "replace"), self._token)

    @property
    def connections(self) -> int:
        return len(self._attached)

    def attach(self, send: Callable[[str], None]) -> Attachment:
        """A new connection, until `detach`."""
        attachment = Attachment(send, known_domain=self._known_domain)
        self._attached.append(attachment)
        self._came.set()
        return attachment

    def detach(self, attachment: Attachment) -> None:
        self._attached.remove(attachment)
        if not self._attached:
            self._came = trio.Event()
        attachment.detach()

    async def attempt(self, envelope: Envelope) -> Outcome | Unreadable:
        with trio.move_on_after(_PATIENCE):
            await self._came.wait()
        if not self._attached:
            return Retry(reason="the service is not attached")
        try:
            return await self._connection_of(envelope.session.key).deliver(envelope)
        except Detached:
            return Retry(reason="the service's connection was closed")

    def _connection_of(self, key: str) -> Attachment:
        """That which the conversation had last; else the one with the most credit."""
        attachment = self._last.pop(key, None)
        if attachment is None or attachment.gone.is_set():
            attachment = max(self._attached, key=lambda one: one.free)
        self._last[key] = attachment
        if len(self._last) > _REMEMBERED:
            self._last.popitem(last=False)
        return attachment

    def open_lane(self) -> OpenLane:
        """Lanes share the connections; there are as many of them as deliveries may be under way."""

        @asynccontextmanager
        async def lane() -> AsyncIterator[Handler]:
            yield self

        return lane


def frame(said: Mapping[str, Any]) -> str:
    """A frame as text."""
    return orjson.dumps(said).decode()
