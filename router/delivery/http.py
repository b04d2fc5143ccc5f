"""Services over HTTP: a lane is one persistent connection that one task owns, so there is no pool to
wait for and no lock to take.
"""

from __future__ import annotations

import email.utils
import select
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import urlsplit

import httptools
import trio

from actors.messages import Envelope, Outcome, Reject, Retry
from actors.ports import Clock, Handler, Unreadable
from actors.service import OpenLane

from . import signing
from .contract import KnownDomain, body_of, read_answer

MAX_ANSWER_BYTES = 1_048_576
MAX_HEAD_BYTES = 65_536  # of an answer, interim ones before it included
_READ_SIZE = 65_536
_REJECTED = frozenset({400, 410, 422})
_LATER = frozenset({429, 503})


@dataclass(frozen=True, slots=True)
class Target:
    """Where a service is. `secret` is its whsec_ secret, or None: then nothing is signed."""

    host: str
    port: int
    tls: bool
    path: str
    authority: str
    key: bytes | None

    @classmethod
    def of(cls, url: str, secret: str | None) -> Target:
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        host = parts.hostname or ""
        return cls(host, port, tls, path, parts.netloc, None if secret is None else signing.key_of(secret))


class _Response:
    """Collects one response; interim ones (1xx) are passed over, and what follows it is nobody's."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.status = 0  # until the head of the response has been read
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.complete = False
        self.reusable = False

    @property
    def too_large(self) -> bool:
        return len(self.body) > MAX_ANSWER_BYTES

    @property
    def ends_with_connection(self) -> bool:
        """Whether the end of the connection is the end of the body."""
        return self.status > 0 and not self.headers.keys() & {"content-length", "transfer-encoding"}

    def on_message_begin(self) -> None:
        self.reusable = False  # a second answer that nobody asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.complete:
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        if self.complete:
            return
        if status < 200:
            self.headers.clear()
        else:
            self.status = status

    def on_body(self, data: bytes) -> None:
        if not self.complete:
            self.body += data

    def on_message_complete(self) -> None:
        if self.status and not self.complete:
            self.complete = True
            # Asked here: afterwards the parser has forgotten how the body was framed.
            self.reusable = self.parser.should_keep_alive()


class _BrokenConnection(Exception):
    """The connection failed at a point where the service may or may not have the message."""


class HttpLane:
    """One connection at most. Cancelled in the middle of an exchange, it is closed: a late answer must
    not be taken for the next one's.
    """

    def __init__(
        self,
        target: Target,
        *,
        clock: Clock,
        known_domain: KnownDomain,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._target = target
        self._tls = tls
        self._clock = clock
        self._known_domain = known_domain
        self._stream: trio.SocketStream | trio.SSLStream[trio.SocketStream] | None = None
        self._fd = -1

    async def attempt(self, envelope: Envelope) -> Outcome | Unreadable:
        request = self._request(envelope)
        try:
            response = await self._exchange(request)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as error:
            return Retry(reason=f"connection failed: {_cause(error)}")
        except _BrokenConnection as error:
            return Retry(reason=str(error))
        return self._outcome(response)

    def _outcome(self, response: _Response) -> Outcome | Unreadable:
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
        body = body_of(envelope)
        target, now = self._target, int(self._clock().timestamp())
        head = (
            f"POST {target.path} HTTP/1.1\r\nHost: {target.authority}\r\nUser-Agent: postroom\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"webhook-id: {envelope.id}\r\nwebhook-timestamp: {now}\r\nIdempotency-Key: {envelope.id}\r\n"
            f"X-Correlation-ID: {envelope.correlation_id}\r\ntraceparent: {traceparent(envelope)}\r\n"
        )
        if target.key is not None:
            head += f"webhook-signature: {signing.sign(target.key, envelope.id, now, body)}\r\n"
        return head.encode("latin-1") + b"\r\n" + body

    async def _exchange(self, request: bytes) -> _Response:
        stream = await self._connected()
        response = _Response()
        try:
            await stream.send_all(request)
            head = 0
            while not response.complete and not response.too_large:
                data = await stream.receive_some(_READ_SIZE)
                if not data:
                    if response.ends_with_connection:
                        break
                    raise _BrokenConnection("connection closed before the end of an answer")
                try:
                    response.parser.feed_data(bytes(data))
                except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
                    if not response.complete:
                        raise _BrokenConnection(f"not an HTTP answer: {type(error).__name__}") from None
                head += 0 if response.status else len(data)
                if head > MAX_HEAD_BYTES:
                    raise _BrokenConnection(f"the head of the answer is longer than {MAX_HEAD_BYTES} bytes")
        except BaseException:
            await self.close()
            raise
        finally:
            del response.parser  # it refers to the response
        if not response.reusable:
            await self.close()
        return response

    async def _connected(self) -> trio.SocketStream | trio.SSLStream[trio.SocketStream]:
        if self._stream is not None:
            # Readable while idle: closed, or talking out of turn. Finding that now costs no attempt.
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            if not poll.poll(0):
                return self._stream
            await self.close()
        tcp = await trio.open_tcp_stream(self._target.host, self._target.port)
        self._fd = tcp.socket.fileno()
        if self._target.tls:
            if self._tls is None:
                self._tls = ssl.create_default_context()
            self._stream = trio.SSLStream(
                tcp, self._tls, server_hostname=self._target.host, https_compatible=True
            )
        else:
            self._stream = tcp
        return self._stream

    async def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with trio.CancelScope(shield=True):  # closing forcefully does not wait
                await trio.aclose_forcefully(stream)


def open_lane(target: Target, *, clock: Clock, known_domain: KnownDomain) -> OpenLane:
    """Lanes to one service; a connection is made when the first delivery needs it."""
    tls = ssl.create_default_context() if target.tls else None  # once: it reads every trusted root

    @asynccontextmanager
    async def lane() -> AsyncIterator[Handler]:
        handler = HttpLane(target, clock=clock, known_domain=known_domain, tls=tls)
        try:
            yield handler
        finally:
            await handler.close()

    return lane


def _cause(error: BaseException) -> str:
    """The name of what trio translated: a refused connection, a certificate that is not trusted."""
    cause = error.__cause__ or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return type(cause).__name__


def retry_after(value: str | None, now: datetime) -> float | None:
    """Seconds of a Retry-After header (RFC 9110: seconds or a date); None when there is none to read."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(min(int(value[:12]), 10**9))
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max((date - now).total_seconds(), 0.0)


def traceparent(envelope: Envelope) -> str:
    """W3C trace context of one attempt: the sender's trace, else one made of the idempotency key, so
    that every attempt of a message is in one trace.
    """
    trace, flags = envelope.id[4:36], "01"
    if envelope.traceparent is not None:
        _, trace, _, flags = envelope.traceparent.split("-")
    span_id = format((int(envelope.id[4:20], 16) + envelope.attempt) & (2**64 - 1) or 1, "016x")
    return f"00-{trace}-{span_id}-{flags}"
