"""One sender's connection, as a state: what is being read, what is being answered, when it has taken too
long. It never waits; the listener tells it what happened.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from typing import TYPE_CHECKING

import httptools

from router.accept import JSON, Request, Response, error_body
from router.edge.heads import Head

if TYPE_CHECKING:
    from router.edge.http1 import Listener

_READ_SIZE = 65_536
_UNKNOWN = 3  # heads in a row that were not known, after which no more are learned
_PIPELINED = 32  # requests of one connection that may wait for their answers
_MAX_HEADERS = 100
_MAX_PIECES = 1_024  # a body in small chunks would take many times its size in objects
_LINGER_SECONDS = 2.0  # how long a refused sender is read on, so that it sees the answer and not a reset
_LINGER_BYTES = 4_194_304
_NEVER = float("inf")

REASONS = {
    200: b"OK",
    202: b"Accepted",
    400: b"Bad Request",
    401: b"Unauthorized",
    403: b"Forbidden",
    404: b"Not Found",
    405: b"Method Not Allowed",
    408: b"Request Timeout",
    413: b"Content Too Large",
    417: b"Expectation Failed",
    422: b"Unprocessable Content",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    503: b"Service Unavailable",
}

# The header fields that anybody here reads; the others are counted and dropped. Each may come once: more
# of them could be read in two ways, by us and by whatever stands in front of us. The usual spellings are
# looked up as they come, which is cheaper than lowering every name.
_READ = (
    b"content-length",
    b"transfer-encoding",
    b"host",
    b"expect",
    b"x-hub-signature-256",
    b"traceparent",
    b"x-correlation-id",
    b"authorization",
    b"idempotency-key",
)
_NOT_READ = (b"user-agent", b"accept", b"accept-encoding", b"content-type", b"connection")  # that often come
_SPELLINGS = {
    spelling: name if name in _READ else None
    for name in (*_READ, *_NOT_READ)
    for spelling in (name, name.title(), name.upper())
}


def encode(response: Response, date: bytes, *, close: bool, head: bool = False) -> bytes:
    """The bytes of a response; `head` leaves the body out."""
    return b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nDate: %s\r\n%s%s\r\n%s" % (
        response.status,
        REASONS.get(response.status, b"Unknown"),
        response.content_type,
        len(response.body),
        date,
        response.fields,
        b"Connection: close\r\n" if close else b"",
        b"" if head else response.body,
    )


class _Slot:
    """The place of one answer in the order of its connection's requests."""

    __slots__ = ("connection", "encoded", "head", "last", "size")

    def __init__(self, connection: Connection, last: bool, head: bool, size: int) -> None:
        self.connection = connection
        self.encoded: bytes | None = None
        self.last = last  # the connection ends after it
        self.head = head
        self.size = size

    def respond(self, response: Response) -> None:
        connection = self.connection
        if connection.closed or self.encoded is not None:
            return
        self.encoded = encode(response, connection.listener.date, close=self.last, head=self.head)
        if connection.slots[0] is self:
            connection.listener.write_soon(connection)


class Connection:
    """llhttp calls the `on_...` methods of HTTP while bytes are fed, the listener the other ones."""

    __slots__ = (
        "_begun",
        "_body",
        "_body_bytes",
        "_continue",
        "_events",
        "_head_bytes",
        "_head_size",
        "_header_count",
        "_headers",
        "_in_body",
        "_in_message",
        "_known",
        "_linger",
        "_out",
        "_parser",
        "_paused",
        "_read_timeout",
        "_refusal",
        "_reserved",
        "_shared_read",
        "_sock",
        "_unknown",
        "_url",
        "closed",
        "deadline",
        "listener",
        "slots",
        "wanted",
    )

    def __init__(self, listener: Listener, sock: socket.socket) -> None:
        self.listener = listener
        self.slots: deque[_Slot] = deque()
        self.closed = False
        self.deadline = listener.now + listener.limits.idle_timeout_ms / 1000
        self._read_timeout = listener.limits.read_timeout_ms / 1000
        self._sock = sock
        self._events = select.EPOLLIN
        self._parser = httptools.HttpRequestParser(self)
        self._known: Head | None = None  # of the request before, when it came alone
        self._unknown = 0  # heads in a row that were another one than that
        self._out = bytearray()
        self._refusal: bytes | None = None  # waits for its turn; nothing is parsed any more
        self._linger = -1  # bytes that are still read and dropped, once refused
        self._in_message = False
        self._in_body = False
        self.wanted = 0  # bytes of the body that is announced and for which there was no room yet
        self._paused = False  # in the listener's queue for room
        self._reserved = 0
        self._continue = False
        self._head_bytes = 0  # read of this message without getting on in its body
        self._body_bytes = 0
        self._shared_read = False  # what was read last had the end of a message in it

    # What llhttp calls

    def on_message_begin(self) -> None:
        self._in_message = True
        self._in_body = False
        self._head_bytes = 0
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._header_count = 0
        self._head_size = 0
        self._body: list[bytes | bytearray] = []
        self._body_bytes = 0
        self._begun = time.perf_counter()
        self.deadline = self.listener.now + self._read_timeout

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_body:
            return  # a trailer; nothing may be said after the body that changes what the head said
        self._header_count += 1
        self._head_size += len(name) + len(value) + 4
        try:
            known = _SPELLINGS[name]
        except KeyError:
            known = _SPELLINGS.get(name.lower())
        if known is None:
            return
        if known in self._headers:
            self._refuse(400, "bad_request", f"more than one {known.decode('ascii')} header")
        self._headers[known] = value

    def on_headers_complete(self) -> None:
        self._in_body = True
        if self._refusal is not None or self.closed:
            return
        headers = self._headers
        version = self._parser.get_http_version()
        length = headers.get(b"content-length")
        coding = headers.get(b"transfer-encoding")
        expect = headers.get(b"expect")
        limit = self.listener.limits.body_max_bytes
        if self._header_count > _MAX_HEADERS:
            self._refuse(431, "too_many_headers", f"at most {_MAX_HEADERS} header fields")
        elif version != "1.1" and version != "1.0":
            self._refuse(400, "bad_request", "HTTP/1.1 only")
        elif self._parser.should_upgrade():
            self._refuse(400, "bad_request", "no protocol upgrades here")
        elif self._head_size + len(self._url) > self.listener.limits.header_max_bytes:
            self._refuse_head()
        elif version == "1.1" and b"host" not in headers:
            self._refuse(400, "bad_request", "no Host header")
        elif length is not None and coding is not None:
            self._refuse(400, "bad_request", "Content-Length and Transfer-Encoding together")
        elif coding is not None and (coding.lower() != b"chunked" or version == "1.0"):
            self._refuse(400, "bad_request", "the only Transfer-Encoding is chunked, in HTTP/1.1")
        elif length is not None and not (length.isdigit() and len(length) <= 18):
            self._refuse(400, "bad_request", "Content-Length is not a number")
        elif length is not None and int(length) > limit:
            self._refuse_size()
        elif expect is not None and expect.lower() != b"100-continue":
            self._refuse(417, "expectation_failed", "the only expectation is 100-continue")
        else:
            size = limit if coding is not None else int(length or 0)
            if self.listener.has_room(size):
                self._reserve(size)
            else:
                self.wanted = size
            self._continue = expect is not None and version == "1.1" and size > 0

    def on_body(self, data: bytes) -> None:
        if self._refusal is None:
            self._continue = False  # it did not wait to be asked
            self._body_bytes += len(data)
            if self._body_bytes > self.listener.limits.body_max_bytes:
                self._refuse_size()
            else:
                self._body.append(data)
                if len(self._body) > _MAX_PIECES:
                    self._merge()

    def on_message_complete(self) -> None:
        self._shared_read = True
        if self._refusal is not None or self.closed:
            return
        self._in_message = False
        self._continue = False
        self.wanted = 0
        self.deadline = _NEVER
        if self._linger >= 0 or (self.slots and self.slots[-1].last):
            return  # asked after the last one that is answered
        body = bytes(self._body[0]) if len(self._body) == 1 else b"".join(self._body)
        self._reserve(self._body_bytes)
        self._give(body, last=self.listener.draining or not self._parser.should_keep_alive())

    def _give(self, body: bytes, *, last: bool) -> None:
        path, _, query = self._url.partition(b"?")
        method = self._parser.get_method()
        slot = _Slot(self, last, method == b"HEAD", self._reserved)
        self._reserved = 0
        self.slots.append(slot)
        request = Request(method, path, query, self._headers, body, self._begun)
        self.listener.give(request, slot.respond)

    def _reserve(self, size: int) -> None:
        if size != self._reserved:
            self.listener.reserve(size - self._reserved)
            self._reserved = size

    def _merge(self) -> None:
        whole = self._body[0]
        if not isinstance(whole, bytearray):
            whole = bytearray(whole)
        whole += b"".join(self._body[1:])
        self._body = [whole, b""]

    def _refuse_head(self) -> None:
        self._refuse(431, "headers_too_large", f"at most {self.listener.limits.header_max_bytes} bytes")

    def _refuse_size(self) -> None:
        self._refuse(413, "body_too_large", f"at most {self.listener.limits.body_max_bytes} bytes")

    def _refuse(self, status: int, code: str, detail: str) -> None:
        if self._refusal is None:
            response = Response(status, JSON, error_body(code, detail))
            self._refusal = encode(response, self.listener.date, close=True)

    # What the listener calls

    def on_readable(self) -> None:
        if self.closed:
            return
        try:
            data = self._sock.recv(_READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        if self._linger >= 0:
            self._linger -= len(data)
            if not data or self._linger < 0:
                self.close()
        elif data:
            self._feed(data)
        elif self.slots or self._out:
            self._watch(0)  # it has said all it wants to say, and still listens
        else:
            self.close()

    def _feed(self, data: bytes) -> None:
        if not self._take_known(data):
            self._parse(data)
        if self.closed:
            return
        if self._refusal is not None:
            self._watch(0)
            if not self.slots:
                self._say_no()
            else:
                self.deadline = _NEVER
            return
        if self.wanted or (not self._reserved and not self.listener.has_room(0)):
            self._paused = True
            self._watch(0)
            if self._in_message:
                self.deadline = _NEVER
            self.listener.resume_with_room(self)
        if self._out:
            self.deadline = self.listener.now + self.listener.limits.write_timeout_ms / 1000
        elif self._continue and not self.slots and not self._paused:
            self._continue = False
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if len(self.slots) >= _PIPELINED or (self.slots and self.slots[-1].last):
            self._watch(0)

    def _parse(self, data: bytes) -> None:
        self._known = None  # what the parser reads now is the request before the next one
        was_between, count = not self._in_message, len(self.slots)
        was_in_body = self._in_message and self._in_body
        body_bytes = self._body_bytes
        self._shared_read = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # not the sender's fault
        except httptools.HttpParserUpgrade:
            self._refuse(400, "bad_request", "no protocol upgrades here")
        except httptools.HttpParserError:
            self._refuse(400, "bad_request", "not HTTP/1.1")
        if self.closed:
            return
        if (
            self._in_message
            and not self._shared_read
            and (not self._in_body or (was_in_body and self._body_bytes == body_bytes))
        ):
            # A head, or chunk extensions and trailers.
            self._head_bytes += len(data)
            if self._head_bytes > self.listener.limits.header_max_bytes:
                self._refuse_head()
        if was_between and not self._in_message and self._refusal is None and len(self.slots) == count + 1:
            self._learn(data)

    def _take_known(self, data: bytes) -> bool:
        """Whether this is one request with a head that is known. Everything of it but what varies is then as
        it was when the parser read it."""
        known = self._known
        if known is None or (self.slots and self.slots[-1].last):
            return False
        size = len(data) - known.size
        headers = known.headers(data) if 0 <= size <= self.listener.limits.body_max_bytes else None
        if headers is None:
            return False
        self._begun = time.perf_counter()
        self._headers = headers
        self._unknown = 0
        self.deadline = _NEVER
        self._reserve(size)
        self._give(data[known.size :], last=self.listener.draining)
        return True

    def _learn(self, data: bytes) -> None:
        """Know the head of the one request that this was, unless its sender says another one each time."""
        self._unknown += 1
        if self._unknown <= _UNKNOWN:
            self._known = Head.of(data, self._headers)

    def on_writable(self) -> None:
        if self.closed:
            return
        try:
            del self._out[: self._sock.send(self._out)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        limits = self.listener.limits
        self.deadline = self.listener.now + limits.write_timeout_ms / 1000
        if not self._out:
            if self._in_message and not self._paused:
                self.deadline = self.listener.now + self._read_timeout
            else:
                self.deadline = _NEVER
            self._events &= ~select.EPOLLOUT
            self.listener.watch(self._sock, self._events)
            self._after_writing()

    def resume(self) -> None:
        """There is room for body bytes again, for those that it wanted too."""
        self._paused = False
        if self.closed or self._refusal is not None or self._linger >= 0:
            return
        if self.wanted:
            self._reserve(self.wanted)
            self.wanted = 0
        if self._in_message and not self._out:
            self.deadline = self.listener.now + self._read_timeout
        if self._continue and not self.slots:
            self._continue = False
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._read_on()

    def drain(self) -> None:
        """End now when idle, else after the answers that are waited for, and after the one to what is
        half read."""
        if self._in_message:
            return
        if self.slots:
            self.slots[-1].last = True
            self._watch(0)
        elif not self._out and self._linger < 0:
            self.close()

    def expire(self) -> None:
        """Its deadline has passed. A sender in the middle of a request is told so, if it can be."""
        self.listener.statistics.timed_out += 1
        if self._in_message and not self.slots and not self._out and self._refusal is None:
            body = error_body("request_timeout", "the request took too long to arrive")
            self._send(encode(Response(408, JSON, body), self.listener.date, close=True))
        self.close()

    def close(self) -> None:
        """Close the socket and give back what was reserved; idempotent."""
        if self.closed:
            return
        self.closed = True
        held = self._reserved + sum(slot.size for slot in self.slots)
        self._reserved = 0
        self.slots.clear()
        self.listener.forget(self._sock, self)
        self._sock.close()
        if held:
            self.listener.reserve(-held)

    # Answering

    def write_ready(self) -> None:
        """Write the answers whose turn it is."""
        if self.closed:
            return
        slots = self.slots
        ready: list[bytes] = []
        size = 0
        last = False
        while slots and not last and (encoded := slots[0].encoded) is not None:
            slot = slots.popleft()
            ready.append(encoded)
            size += slot.size
            last = slot.last
        if last:
            for slot in slots:  # asked after the last one that is answered
                size += slot.size
            slots.clear()
            self._linger = _LINGER_BYTES
        self._send(ready[0] if len(ready) == 1 else b"".join(ready))
        if size:
            self.listener.reserve(-size)
        if not self.closed and not self._out:
            self._after_writing()

    def _send(self, data: bytes) -> None:
        if self._out:
            self._out += data
            return
        try:
            sent = self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.close()
            return
        if sent < len(data):
            self._out += data[sent:]
            self.deadline = self.listener.now + self.listener.limits.write_timeout_ms / 1000
            self._events = select.EPOLLOUT  # who does not read is not read from
            self.listener.watch(self._sock, self._events)

    def _after_writing(self) -> None:
        """Everything that could be answered has been written."""
        if self._refusal is not None and not self.slots and self._linger < 0:
            self._say_no()
        elif self._linger >= 0:
            self._hang_up()
        elif not self.slots:
            limits = self.listener.limits
            if self._continue and not self._paused:
                self._continue = False
                self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
            if not self._in_message:
                if self.listener.draining:
                    self.close()
                    return
                self.deadline = self.listener.now + limits.idle_timeout_ms / 1000
            self._read_on()
        else:
            self._read_on()

    def _say_no(self) -> None:
        refusal = self._refusal or b""
        self._linger = _LINGER_BYTES
        self._send(refusal)
        if not self.closed and not self._out:
            self._hang_up()

    def _hang_up(self) -> None:
        """Say that nothing more comes, and read on a little: closing with unread bytes would send a
        reset, which takes the answer away from the sender."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self.deadline = self.listener.now + _LINGER_SECONDS
        self._watch(select.EPOLLIN)

    def _read_on(self) -> None:
        """Read, unless something else is to be done first."""
        slots = self.slots
        if not (
            self.closed or self._paused or self._out or len(slots) >= _PIPELINED or (slots and slots[-1].last)
        ):
            self._watch(select.EPOLLIN)

    def _watch(self, reading: int) -> None:
        events = (self._events & select.EPOLLOUT) | reading
        if events != self._events:
            self._events = events
            self.listener.watch(self._sock, events)
