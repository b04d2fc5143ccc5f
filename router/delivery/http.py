"""Services over HTTP: a lane is one persistent connection that one task owns, so there is no pool to
wait for and no lock to take.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from actors.messages import Envelope, Outcome, Reject, Retry
from actors.ports import Clock, Handler, Unreadable
from actors.service import OpenLane
from router.mac import HmacSha256

from . import signing
from .connection import MAX_ANSWER_BYTES, HttpConnection, NoAnswer, Origin, Response, retry_after
from .contract import KnownDomain, body_of, read_answer, request_of

_REJECTED = frozenset({400, 410, 422})
_LATER = frozenset({429, 503})


@dataclass(frozen=True, slots=True)
class Target:
    """A service: where it is, and the key of its whsec_ secret; None: nothing is signed. `allow_private`: it
    may have an address that is not public. A `shadow` is told that it is one.
    """

    origin: Origin
    key: HmacSha256 | None
    allow_private: bool = True
    shadow: bool = False

    @classmethod
    def of(cls, url: str, secret: str | None, *, allow_private: bool = True, shadow: bool = False) -> Target:
        key = None if secret is None else signing.key_of(secret)
        return cls(Origin.of(url), key, allow_private, shadow)


class HttpLane:
    """Attempts at one service over one connection."""

    def __init__(
        self,
        target: Target,
        *,
        clock: Clock,
        known_domain: KnownDomain,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._target = target
        self._connection = HttpConnection(target.origin, tls=tls, allow_private=target.allow_private)
        self._clock = clock
        self._known_domain = known_domain

    async def attempt(self, envelope: Envelope) -> Outcome | Unreadable:
        try:
            return self._outcome(await self._connection.exchange(self._request(envelope)))
        except NoAnswer as error:
            return Retry(reason=str(error))

    async def close(self) -> None:
        await self._connection.close()

    def _outcome(self, response: Response) -> Outcome | Unreadable:
        status = response.status
        if 200 <= status < 300:
            if response.too_large:
                return Unreadable(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
            return read_answer(bytes(response.body), self._known_domain)
        if status in _REJECTED:
            return Reject(f"answered {status}")
        if status in _LATER:
            after = retry_after(response.headers.get("retry-after"), self._clock())
            return Retry(after, reason=f"answered {status}")
        return Retry(reason=f"answered {status}")

    def _request(self, envelope: Envelope) -> bytes:
        body, now, key = body_of(envelope), int(self._clock().timestamp()), self._target.key
        signature = None if key is None else signing.sign(key, envelope.id, now, body)
        target = self._target
        return request_of(
            target.origin, envelope, body, timestamp=now, signature=signature, shadow=target.shadow
        )


def open_lane(target: Target, *, clock: Clock, known_domain: KnownDomain) -> OpenLane:
    """Lanes to one service; a connection is made when the first delivery needs it."""
    tls = target.origin.tls_context()

    @asynccontextmanager
    async def lane() -> AsyncIterator[Handler]:
        handler = HttpLane(target, clock=clock, known_domain=known_domain, tls=tls)
        try:
            yield handler
        finally:
            await handler.close()

    return lane
