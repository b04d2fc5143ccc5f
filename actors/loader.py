"""Loads sessions for those that wake up, all that ask at the same time in one read."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from .errors import JournalUnavailable
from .kernel import Actor, Promise
from .messages import Session
from .ports import Clock, Journal


@dataclass(frozen=True, slots=True)
class Load:
    """What a session asks: its stored state, or None when there is none or it is too old to count."""

    key: str
    promise: Promise[Session | None]


class SessionLoader(Actor[Load]):
    """A session older than `session_ttl` counts as absent."""

    def __init__(self, journal: Journal, *, session_ttl: timedelta, clock: Clock) -> None:
        self._journal = journal
        self._ttl = session_ttl
        self._clock = clock

    async def receive(self, batch: list[Load]) -> None:
        try:
            stored = await self._journal.load_sessions([load.key for load in batch])
        except JournalUnavailable as error:
            for load in batch:
                load.promise.fail(error)
            return
        oldest = self._clock() - self._ttl
        for load in batch:
            session, touched = stored.get(load.key, (None, oldest))
            load.promise.answer(session if touched >= oldest else None)
