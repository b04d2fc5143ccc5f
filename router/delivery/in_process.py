"""Services that are functions of the embedding program."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from actors.messages import Ack, Envelope, Outcome, Reject, Retry
from actors.ports import Handler, Unreadable
from actors.service import OpenLane
from router.observe.logs import get_logger

from .contract import KnownDomain, checked

HandlerFunction = Callable[[Envelope], Awaitable[Outcome]]

_log = get_logger("postroom.delivery")


class InProcess:
    """One lane to a handler function. What the function raises is a failed attempt, as a 500 would be."""

    def __init__(self, name: str, function: HandlerFunction, known_domain: KnownDomain) -> None:
        self._name = name
        self._function = function
        self._known_domain = known_domain

    async def attempt(self, envelope: Envelope) -> Outcome | Unreadable:
        try:
            outcome: object = await self._function(envelope)
        except Exception as error:  # an edge: the handler is the user's code
            _log.exception("handler raised", service=self._name, id=envelope.id, exc_info=error)
            return Retry(reason=f"handler raised {type(error).__name__}")
        if isinstance(outcome, Ack):
            return checked(outcome, self._known_domain)
        if isinstance(outcome, Retry):
            after = outcome.after
            if after is not None and not (isinstance(after, int | float) and math.isfinite(after)):
                return Retry(reason="handler returned a Retry whose `after` is no number of seconds")
            return Retry(after, str(outcome.reason))
        if isinstance(outcome, Reject):
            return Reject(str(outcome.reason))
        return Retry(reason=f"handler returned {type(outcome).__name__}, not Ack, Retry or Reject")


def open_lane(name: str, function: HandlerFunction, known_domain: KnownDomain) -> OpenLane:
    """Lanes to a function cost nothing to open."""

    @asynccontextmanager
    async def lane() -> AsyncIterator[Handler]:
        yield InProcess(name, function, known_domain)

    return lane
