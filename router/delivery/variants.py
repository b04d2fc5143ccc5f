"""A service at more than one URL: a canary that has a share of the conversations, and a shadow that gets
copies. Both choose conversations, not messages: a conversation is always with the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import trio

from actors.breaker import Breaker
from actors.messages import Ack, Envelope, Outcome, Reject, Retry
from actors.ports import Handler, Unreadable
from actors.service import OpenLane, verdict
from router.observe.logs import get_logger

_log = get_logger("postroom.delivery")

_COPIES = 16  # that wait for the shadow's answer to the one before, for each lane; more are not sent
_SHARE_OF_TIME = 0.5  # of an attempt that a canary has: the rest is for the stable URL, should it need it


def is_in_share(key: str, share: float, domain: str) -> bool:
    """Whether the conversation is in that share of the domain's (0 to 1): the same each time, and a larger
    share has all conversations of a smaller one.
    """
    digest = hashlib.blake2b(f"{domain}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


@dataclass(slots=True)
class CanaryStatistics:
    """Since it began: attempts, and those of them that failed."""

    attempts: int = 0
    failures: int = 0


class Canary:
    """What it does not take, or not in half of the time that an attempt has, goes to the stable URL in the
    same attempt; while its breaker is not closed its conversations are there. So it says nothing about the
    service.
    """

    def __init__(self, domain: str, share: float, open_lane: OpenLane, *, breaker: Breaker) -> None:
        self.breaker = breaker
        self.statistics = CanaryStatistics()
        self._domain = domain
        self._share = share
        self._open_lane = open_lane

    def beside(self, stable: OpenLane) -> OpenLane:
        """Lanes to both."""

        @asynccontextmanager
        async def lane() -> AsyncIterator[Handler]:
            async with stable() as usual, self._open_lane() as canary:
                yield _CanaryLane(self, usual, canary)

        return lane

    def admit(self, key: str) -> int | None:
        """A ticket of the breaker, when the conversation is for the canary and it may be tried."""
        return self.breaker.admit() if is_in_share(key, self._share, self._domain) else None

    async def attempt(self, ticket: int, canary: Handler, envelope: Envelope) -> Outcome | Unreadable | None:
        """None: it did not take it. What it refuses may be nobody's to take, and says nothing about it."""
        began = trio.current_time()
        patience = (trio.current_effective_deadline() - began) * _SHARE_OF_TIME
        outcome: Outcome | Unreadable | None = None
        self.statistics.attempts += 1
        try:
            with trio.move_on_after(patience) as bound:
                outcome = await canary.attempt(envelope)
            if bound.cancelled_caught:
                outcome = Retry(reason=f"no answer within {patience:.3g} s")
        finally:
            succeeded, reason = verdict(outcome)
            if isinstance(outcome, Retry):
                succeeded = False  # also one that asks for later: it is not what the stable one would say
            elif isinstance(outcome, Reject):
                succeeded = None
            self.breaker.record(ticket, succeeded, reason, seconds=trio.current_time() - began)
            self.statistics.failures += succeeded is False
        return outcome if isinstance(outcome, Ack | Unreadable) else None


class _CanaryLane:
    def __init__(self, canary: Canary, stable: Handler, handler: Handler) -> None:
        self._canary = canary
        self._stable = stable
        self._handler = handler

    async def attempt(self, envelope: Envelope) -> Outcome | Unreadable:
        ticket = self._canary.admit(envelope.session.key)
        if ticket is not None:
            outcome = await self._canary.attempt(ticket, self._handler, envelope)
            if outcome is not None:
                return outcome
            envelope = replace(envelope, redelivered=True)
        return await self._stable.attempt(envelope)


@dataclass(slots=True)
class ShadowStatistics:
    """Since it began: copies that were sent, those of them that were not taken, and those never sent because
    too many waited.
    """

    copies: int = 0
    failures: int = 0
    dropped: int = 0


class Shadow:
    """Gets a copy of the first attempt at each message of its conversations. Nothing waits for it, and what
    it answers counts for nothing.
    """

    def __init__(self, domain: str, share: float, open_lane: OpenLane, *, timeout: float) -> None:
        self.statistics = ShadowStatistics()
        self._domain = domain
        self._share = share
        self._open_lane = open_lane
        self._timeout = timeout

    def beside(self, usual: OpenLane) -> OpenLane:
        """Lanes to it, and beside each a lane to the shadow."""

        @asynccontextmanager
        async def lane() -> AsyncIterator[Handler]:
            send, receive = trio.open_memory_channel[Envelope](_COPIES)
            async with usual() as handler, trio.open_nursery() as nursery:
                nursery.start_soon(self._copy, receive)
                yield _ShadowLane(handler, lambda envelope: self._offer(send, envelope))
                nursery.cancel_scope.cancel()

        return lane

    def _offer(self, send: trio.MemorySendChannel[Envelope], envelope: Envelope) -> None:
        if envelope.attempt == 1 and is_in_share(envelope.session.key, self._share, self._domain):
            try:
                send.send_nowait(envelope)
            except trio.WouldBlock:
                self.statistics.dropped += 1

    async def _copy(self, envelopes: trio.MemoryReceiveChannel[Envelope]) -> None:
        async with self._open_lane() as shadow:
            async for envelope in envelopes:
                self.statistics.copies += 1
                outcome: Outcome | Unreadable = Retry()
                try:
                    with trio.move_on_after(self._timeout):
                        outcome = await shadow.attempt(envelope)
                except Exception as error:  # nothing that happens here is the service's business
                    _log.exception("a copy failed", service=self._domain, exc_info=error)
                self.statistics.failures += isinstance(outcome, Retry)


class _ShadowLane:
    def __init__(self, handler: Handler, offer: Callable[[Envelope], None]) -> None:
        self._handler = handler
        self._offer = offer

    async def attempt(self, envelope: Envelope) -> Outcome | Unreadable:
        self._offer(envelope)
        return await self._handler.attempt(envelope)
