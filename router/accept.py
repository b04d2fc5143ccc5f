"""The one way in: a request of either edge becomes an answer here. No policy lives in an edge.

The answer to a stored body is given by the flush that stored it, through `respond`, so that no task has
to be woken for it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Final
from urllib.parse import parse_qsl

import trio

from actors.kernel import Address, MailboxClosed, MailboxFull
from actors.messages import Delivery, Spooled
from router.channels import whatsapp
from router.channels.tombstones import Tombstones
from router.channels.whatsapp import AppSecret, Splitter
from router.config import AppConfig

JSON: Final = b"application/json"
TEXT: Final = b"text/plain; charset=utf-8"
ROOM_TIMEOUT: Final = 5.0  # seconds that a request waits for room in the ingress before it is answered 503

_CORRELATION_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}", re.ASCII)
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)


@dataclass(slots=True)
class Request:
    """What an edge read: header names in lower case, the path without its query."""

    method: bytes
    path: bytes
    query: bytes
    headers: Mapping[bytes, bytes]
    body: bytes
    started: float  # time.perf_counter() when its first byte was read


@dataclass(slots=True)
class Response:
    """What an edge writes. `fields` are the header fields that come after content-type and
    content-length, each `name: value` with CRLF at its end.
    """

    status: int
    content_type: bytes
    body: bytes
    fields: bytes = b""


Respond = Callable[[Response], None]

ACCEPTED: Final = b'{"status":"accepted"}'
INVALID_SIGNATURE: Final = b'{"error":"invalid_signature"}'


def error_body(code: str, detail: str) -> bytes:
    """`{"error": code, "detail": detail}`; both are our own words, without quotes or backslashes."""
    return b'{"error":"%s","detail":"%s"}' % (code.encode(), detail.encode())


class Webhooks:
    """Every route that takes outside input, one per app: POST verifies the signature before anything
    else, GET is Meta's handshake, which carries none.
    """

    def __init__(
        self,
        apps: Iterable[AppConfig],
        ingress: Address[Delivery],
        *,
        dedup_key: Callable[[], bytes | None],
        tombstones: Tombstones | None = None,
        spools: bool = False,
    ) -> None:
        """Without the key of the ledger nothing can be split: with `spools` it is taken all the same."""
        self._ingress = ingress
        self._dedup_key = dedup_key
        self._spools = spools
        apps = tuple(apps)
        claimed = {number: app.name for app in apps for number in app.numbers}
        self._routes = {app.path.encode(): _App(app, claimed, tombstones or Tombstones()) for app in apps}
        self._apps = {app.config.name: app for app in self._routes.values()}
        self._id_prefix = os.urandom(6).hex()
        self._ids = count(1)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that take webhooks."""
        return tuple(path.decode() for path in self._routes)

    def splitter_for(self, number: str, dedup_key: bytes) -> Splitter:
        """The splitter of the app that may sign for this number; the first app's when none may."""
        apps = list(self._routes.values())
        app = next((app for app in apps if app.is_ours(number)), apps[0])
        splitter = app.splitter(dedup_key)
        assert splitter is not None
        return splitter

    def owns(self, number: str) -> bool:
        """Whether one of the apps speaks for this phone_number_id."""
        return any(app.is_ours(number) for app in self._routes.values())

    def splitter_of(self, app: str) -> Splitter | None:
        """The splitter of that app; None when the configuration does not have it."""
        found = self._apps.get(app)
        return None if found is None else found.splitter(self._dedup_key())

    def split_again(self, spooled: Spooled) -> Delivery | None:
        """What was spooled, as it is journaled; None while the key of the ledger is not known. A body of an
        app that was taken out of the configuration is split as the first one's."""
        app = self._apps.get(spooled.app) or next(iter(self._apps.values()))
        splitter = app.splitter(self._dedup_key())
        if splitter is None:
            return None
        return splitter.delivery(
            spooled.body,
            correlation_id=spooled.correlation_id,
            traceparent=spooled.traceparent,
            settle=lambda stored: None,
        )

    async def accept(self, request: Request, respond: Respond) -> None:
        """Answer through `respond`, exactly once: at once, or when the body has been stored (or could
        not be). Returns as soon as the request is in the ingress; it waits only for room there.
        """
        wait = self.accept_nowait(request, respond)
        if wait is not None:
            await wait()

    def accept_nowait(self, request: Request, respond: Respond) -> Callable[[], Awaitable[None]] | None:
        """As `accept`; with no room in the ingress, returns what has to be awaited for it."""
        headers = request.headers
        asked, trace = headers.get(b"x-correlation-id"), headers.get(b"traceparent")
        exchange = _Exchange(
            f"{self._id_prefix}{next(self._ids):08x}",
            _matching(_CORRELATION_ID, asked) if asked is not None else None,
            _matching(_TRACEPARENT, trace) if trace is not None else None,
            request.started,
            respond,
        )
        app = self._routes.get(request.path)
        if app is None:
            exchange.answer(404, error_body("not_found", "no webhook at this path"))
        elif request.method == b"POST":
            signature = headers.get(b"x-hub-signature-256")
            if whatsapp.signature_is_valid(signature, request.body, app.live_secrets):
                return self._take(app, request.body, exchange)
            exchange.answer(401, INVALID_SIGNATURE)
        elif request.method == b"GET":
            query = parse_qsl(request.query.decode("latin-1"), keep_blank_values=True)
            challenge = whatsapp.challenge(query, app.config.verify_token)
            if challenge is None:
                detail = "hub.mode or hub.verify_token is not right"
                exchange.answer(403, error_body("verification_failed", detail))
            else:
                exchange.answer(200, challenge.encode("utf-8", "replace"), TEXT)
        else:
            body = error_body("method_not_allowed", "use GET or POST")
            exchange.answer(405, body, JSON, b"Allow: GET, POST\r\n")
        return None

    def _take(self, app: _App, body: bytes, exchange: _Exchange) -> Callable[[], Awaitable[None]] | None:
        splitter = app.splitter(self._dedup_key())
        if splitter is not None:
            delivery = splitter.delivery(
                body,
                correlation_id=exchange.correlation_id,
                traceparent=exchange.traceparent,
                settle=exchange.settle,
            )
        elif self._spools:
            delivery = _unsplit(
                app.config.name, body, exchange.correlation_id, exchange.traceparent, exchange.settle
            )
        else:
            exchange.answer(503, error_body("unavailable", "the database has not been reached yet"))
            return None
        try:
            self._ingress.tell_nowait(delivery)
        except MailboxFull:
            return partial(self._wait_for_room, delivery, trio.current_time() + ROOM_TIMEOUT)
        except MailboxClosed:
            exchange.settle(False)
        return None

    async def _wait_for_room(self, delivery: Delivery, deadline: float) -> None:
        with trio.move_on_at(deadline) as waited:
            try:
                await self._ingress.tell(delivery)
            except MailboxClosed:
                delivery.settle(False)
        if waited.cancelled_caught:
            delivery.settle(False)


def _unsplit(
    app: str, body: bytes, correlation_id: str, traceparent: str | None, settle: Callable[[bool], None]
) -> Delivery:
    """A body that can be spooled, and not yet be journaled."""
    return Delivery(app, body, [], correlation_id, traceparent, lambda whole, positions: None, settle)


class _Exchange:
    """One request's ids and the way to answer it."""

    __slots__ = ("_respond", "_started", "correlation_id", "request_id", "traceparent")

    def __init__(
        self,
        request_id: str,
        correlation_id: str | None,
        traceparent: str | None,
        started: float,
        respond: Respond,
    ) -> None:
        self.request_id = request_id
        self.traceparent = traceparent
        if correlation_id is None:
            correlation_id = request_id if traceparent is None else traceparent.split("-")[1]
        self.correlation_id = correlation_id
        self._started = started
        self._respond = respond

    def answer(
        self,
        status: int,
        body: bytes,
        content_type: bytes = JSON,
        more: bytes = b"",
    ) -> None:
        fields = b"X-Request-ID: %s\r\nX-Correlation-ID: %s\r\nX-WA-Core-Latency: %.3f\r\n%s" % (
            self.request_id.encode(),
            self.correlation_id.encode(),
            (time.perf_counter() - self._started) * 1000,
            more,
        )
        self._respond(Response(status, content_type, body, fields))

    def settle(self, stored: bool) -> None:
        """Answer for the flush."""
        if stored:
            self.answer(200, ACCEPTED)
        else:
            self.answer(503, error_body("unavailable", "could not be stored durably, send it again"))


class _App:
    """One app's secrets and splitter; the splitter needs the ledger's key, which is in the database."""

    def __init__(self, config: AppConfig, claimed: Mapping[str, str], tombstones: Tombstones) -> None:
        self.config = config
        self.live_secrets = tuple(AppSecret(secret.encode()) for secret in config.live_secrets)
        self._claimed = claimed
        self._tombstones = tombstones
        self._splitter: Splitter | None = None

    def splitter(self, dedup_key: bytes | None) -> Splitter | None:
        if self._splitter is None and dedup_key is not None:
            self._splitter = Splitter(
                self.config.name, dedup_key=dedup_key, is_ours=self.is_ours, tombstones=self._tombstones
            )
        return self._splitter

    def is_ours(self, number: str) -> bool:
        """An app with numbers signs for those alone, one without for all that no other app claims."""
        if self.config.numbers:
            return number in self.config.numbers
        return self._claimed.get(number, self.config.name) == self.config.name


def is_correlation_id(text: str) -> bool:
    """Whether a correlation id is taken over as it is: it goes into headers and logs."""
    return _CORRELATION_ID.fullmatch(text) is not None


def is_traceparent(text: str) -> bool:
    """Whether this is a traceparent of W3C Trace Context, version 00."""
    return _TRACEPARENT.fullmatch(text) is not None


def _matching(pattern: re.Pattern[str], value: bytes) -> str | None:
    text = value.decode("latin-1")
    return text if pattern.fullmatch(text) else None
