"""One persistent connection to an HTTP server that one task owns: a request out, its response in. What they
mean is known to those who use it.
"""

from __future__ import annotations

import email.utils
import select
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import urlsplit

import httptools
import trio

from .guard import refusal

MAX_ANSWER_BYTES = 1_048_576
MAX_HEAD_BYTES = 65_536  # of an answer, interim ones before it included
MAX_AGE = 60.0
"""Seconds after which a connection is made anew: where a name resolves to something else, that is followed.
"""
_READ_SIZE = 65_536


class NoAnswer(Exception):
    """The exchange failed at a point where the server may or may not have the request."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a server is, and the path that its URL has."""

    host: str
    port: int
    tls: bool
    path: str
    authority: str

    @classmethod
    def of(cls, url: str) -> Origin:
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(parts.hostname or "", port, tls, path, parts.netloc)

    def tls_context(self) -> ssl.SSLContext | None:
        """To be made once for all connections: it reads every trusted root."""
        return ssl.create_default_context() if self.tls else None


class Response:
    """One response; interim ones (1xx) are passed over, and what follows it is nobody's."""

    __slots__ = ("body", "complete", "fields", "reusable", "status")

    def __init__(self) -> None:
        self.status = 0  # until the head of the response has been read
        self.fields: list[tuple[bytes, bytes]] = []  # of its header, as they came
        self.body = bytearray()
        self.complete = False
        self.reusable = False

    @property
    def headers(self) -> dict[str, str]:
        """By name in lower case; made when somebody asks, which hardly anybody does."""
        return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self.fields}

    @property
    def too_large(self) -> bool:
        return len(self.body) > MAX_ANSWER_BYTES

    @property
    def ends_with_connection(self) -> bool:
        """Whether the end of the connection is the end of the body."""
        return self.status > 0 and not self.headers.keys() & {"content-length", "transfer-encoding"}


class _Reader:
    """Collects the responses of one connection, one after the other, with one parser for all."""

    __slots__ = ("_parser", "_response")

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._response = Response()

    def begin(self) -> Response:
        """The response that is read from now on."""
        self._response = response = Response()
        return response

    def feed(self, data: bytes) -> None:
        """Raises NoAnswer: it is none of HTTP."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self._response.complete:
                raise NoAnswer(f"not an HTTP answer: {type(error).__name__}") from None
            self._response.reusable = False

    def on_message_begin(self) -> None:
        self._response.reusable = False  # where it is complete: a second answer that nobody asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._response.complete:
            self._response.fields.append((name, value))

    def on_headers_complete(self) -> None:
        response = self._response
        if response.complete:
            return
        status = self._parser.get_status_code()
        if status < 200:
            response.fields.clear()
        else:
            response.status = status

    def on_body(self, data: bytes) -> None:
        if not self._response.complete:
            self._response.body += data

    def on_message_complete(self) -> None:
        response = self._response
        if response.status and not response.complete:
            response.complete = True
            # Asked here: afterwards the parser has forgotten how the body was framed.
            response.reusable = self._parser.should_keep_alive()


class _Tcp(trio.abc.AsyncResource):
    """A plain socket that one task has to itself. It spares what trio's stream does beside sending and
    receiving, a checkpoint for each: a request mostly fits into the socket's buffer and is sent without
    waiting, an answer is never there at once and is waited for before anybody looks.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        """Takes the socket out of `stream`, which is closed by that."""
        self._socket = socket.socket(fileno=stream.socket.detach())
        self._socket.setblocking(False)

    async def send_all(self, data: bytes) -> None:
        sent = 0
        while True:
            try:
                sent += self._socket.send(data if not sent else memoryview(data)[sent:])
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._socket)
            if sent == len(data):
                return

    async def receive_some(self, max_bytes: int) -> bytes:
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                return self._socket.recv(max_bytes)
            except BlockingIOError:
                pass

    async def aclose(self) -> None:
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()


class HttpConnection:
    """At most one connection, opened when it is needed, and anew when it is older than `max_age` seconds.
    Cancelled in the middle of an exchange, it is closed: a late answer must not be taken for the next one's.
    """

    def __init__(
        self,
        origin: Origin,
        *,
        tls: ssl.SSLContext | None = None,
        allow_private: bool = True,
        max_age: float = MAX_AGE,
    ) -> None:
        self._origin = origin
        self._max_age = max_age
        self._old_at = 0.0  # trio's clock
        self._allow_private = allow_private
        self._tls = tls
        self._stream: _Tcp | trio.SSLStream[trio.SocketStream] | None = None
        self._reader = _Reader()
        self._idle = select.poll()

    async def exchange(self, request: bytes) -> Response:
        """Send `request`, head and body, and read its response. Raises NoAnswer."""
        try:
            return await self._exchange(request)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as error:
            raise NoAnswer(f"connection failed: {_cause(error)}") from error

    async def _exchange(self, request: bytes) -> Response:
        stream = await self._connected()
        response = self._reader.begin()
        try:
            await stream.send_all(request)
            head = 0
            while not response.complete and not response.too_large:
                data = await stream.receive_some(_READ_SIZE)
                if not data:
                    if response.ends_with_connection:
                        break
                    raise NoAnswer("connection closed before the end of an answer")
                self._reader.feed(bytes(data))
                head += 0 if response.status else len(data)
                if head > MAX_HEAD_BYTES:
                    raise NoAnswer(f"the head of the answer is longer than {MAX_HEAD_BYTES} bytes")
        except BaseException:
            await self.close()
            raise
        if not response.reusable:
            await self.close()
        return response

    async def _connected(self) -> _Tcp | trio.SSLStream[trio.SocketStream]:
        if self._stream is not None:
            # Readable while idle: closed, or talking out of turn. Finding that now costs no attempt.
            if trio.current_time() < self._old_at and not self._idle.poll(0):
                return self._stream
            await self.close()
        tcp = await self._open()
        self._reader = _Reader()
        fd = tcp.socket.fileno()
        if self._origin.tls:
            if self._tls is None:
                self._tls = self._origin.tls_context()
                assert self._tls is not None
            self._stream = trio.SSLStream(
                tcp, self._tls, server_hostname=self._origin.host, https_compatible=True
            )
        else:
            self._stream = _Tcp(tcp)
        self._idle = select.poll()
        self._idle.register(fd, select.POLLIN)
        self._old_at = trio.current_time() + self._max_age
        return self._stream

    async def _open(self) -> trio.SocketStream:
        """To an address that was looked at: a name that is asked for again may resolve to another one."""
        host, port = self._origin.host, self._origin.port
        found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
        refused = [refusal(one, allow_private=self._allow_private) for one in addresses]
        allowed = [one for one, why in zip(addresses, refused, strict=True) if why is None]
        if not allowed:
            raise NoAnswer(f"it may not be reached: {refused[0] if refused else 'its name has no address'}")
        trouble: OSError | None = None
        for address in allowed:
            try:
                return await trio.open_tcp_stream(address, port)
            except OSError as error:
                trouble = error
        assert trouble is not None
        raise trouble

    async def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with trio.CancelScope(shield=True):  # closing forcefully does not wait
                await trio.aclose_forcefully(stream)


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


def _cause(error: BaseException) -> str:
    """The name of what trio translated: a refused connection, a certificate that is not trusted."""
    cause = error.__cause__ or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return type(cause).__name__
