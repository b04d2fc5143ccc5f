"""The hot listener: HTTP/1.1 on trio and llhttp. Small, strict and hostile to bad input; what a request
means is not its business.
"""

from __future__ import annotations

import contextlib
import email.utils
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httptools
import trio

from router.accept import JSON, Request, Respond, Response, error_body
from router.config import LimitsConfig

Accept = Callable[[Request, Respond], Awaitable[None]]

_READ_SIZE = 65_536
_PIPELINED = 32  # requests of one connection that may wait for their answers
_LINGER_SECONDS = 2.0  # how long a refused sender is read on, so that it sees the answer and not a reset
_LINGER_BYTES = 4_194_304
_SWEEP_SECONDS = 0.5
_NEVER = float("inf")

REASONS = {
    200: b"OK",
    400: b"Bad Request",
    401: b"Unauthorized",
    403: b"Forbidden",
    404: b"Not Found",
    405: b"Method Not Allowed",
    408: b"Request Timeout",
    413: b"Content Too Large",
    417: b"Expectation Failed",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
    505: b"HTTP Version Not Supported",
}


@dataclass(slots=True)
class ListenerStatistics:
    """Open now, and since start: connections taken and refused, requests, deadlines missed."""

    connections: int = 0
    accepted: int = 0
    refused: int = 0
    requests: int = 0
    timed_out: int = 0
    body_bytes_in_flight: int = 0


class Listener:
    """One listening socket and its connections. It listens from `bind` on, and reads from `serve` on:
    who connects in between waits, and is not refused.
    """

    def __init__(self, limits: LimitsConfig) -> None:
        self.limits = limits
        self.accept: Accept = _not_serving
        self.statistics = ListenerStatistics()
        self.draining = False
        self.date = b""
        self.room = trio.lowlevel.ParkingLot()  # connections that wait for body bytes to be freed
        self._connections: set[_Connection] = set()
        self._socket: socket.socket | None = None
        self._accepting = trio.CancelScope()
        self._drained = trio.Event()

    def bind(self, host: str, port: int) -> int:
        """Listen; returns the port, which port 0 leaves to the system.

        Raises:
            OSError: the address is taken, not ours or not an address.
        """
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind(address)
            listener.listen(1024)
        except BaseException:
            listener.close()
            raise
        self._socket = listener
        bound: int = listener.getsockname()[1]
        return bound

    async def serve(self, accept: Accept) -> None:
        """Until `drain` has been called and the last connection has ended. `accept` gets every complete
        request and answers each exactly once.
        """
        self.accept = accept
        listener = self._socket
        if listener is None:
            raise RuntimeError("bind before serve")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sweep)
                with self._accepting:
                    await self._accept_connections(listener, nursery)
                listener.close()
                if not self._connections:
                    self._drained.set()
                await self._drained.wait()
                nursery.cancel_scope.cancel()
        finally:
            listener.close()
            for connection in list(self._connections):
                connection.abort()

    def drain(self) -> None:
        """Take no more connections; idle ones end now, the others after the answer they wait for."""
        self.draining = True
        self._accepting.cancel()
        for connection in list(self._connections):
            connection.drain()

    async def drained(self) -> None:
        """Return when, after `drain`, the last connection has ended."""
        await self._drained.wait()

    def ended(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        self.statistics.connections = len(self._connections)
        if self.draining and not self._connections:
            self._drained.set()

    def release(self, size: int) -> None:
        """These body bytes have been answered."""
        self.statistics.body_bytes_in_flight -= size
        if self.room and self.statistics.body_bytes_in_flight < self.limits.body_bytes_in_flight:
            self.room.unpark_all()

    async def _accept_connections(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            for _ in range(64):
                try:
                    sock, _address = listener.accept()
                except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                    break
                except OSError:
                    # Out of file descriptors: the connection waits in the backlog for one to be freed.
                    await trio.sleep(_SWEEP_SECONDS)
                    break
                sock.setblocking(False)
                if len(self._connections) >= self.limits.max_connections:
                    self._refuse(sock)
                    continue
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = _Connection(self, sock, nursery)
                self._connections.add(connection)
                self.statistics.accepted += 1
                self.statistics.connections = len(self._connections)
                nursery.start_soon(connection.run)

    def _refuse(self, sock: socket.socket) -> None:
        self.statistics.refused += 1
        body = error_body("too_many_connections", "try again later")
        with contextlib.suppress(OSError):
            sock.send(self.encode(Response(503, JSON, body, ((b"Retry-After", b"1"),)), close=True))
        sock.close()

    async def _sweep(self) -> None:
        """One timer for all deadlines: a scope for each read would cost more than the read."""
        while True:
            self.date = email.utils.formatdate(time.time(), usegmt=True).encode()
            now = trio.current_time()
            for connection in list(self._connections):
                if connection.deadline <= now:
                    self.statistics.timed_out += 1
                    connection.expire()
            await trio.sleep(_SWEEP_SECONDS)

    def encode(self, response: Response, *, close: bool, head: bool = False) -> bytes:
        """The bytes of a response; `head` leaves the body out."""
        parts = [
            b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nDate: %s\r\n"
            % (
                response.status,
                REASONS.get(response.status, b"Unknown"),
                response.content_type,
                len(response.body),
                self.date,
            )
        ]
        for pair in response.headers:
            parts.append(b"%s: %s\r\n" % pair)
        if close:
            parts.append(b"Connection: close\r\n")
        parts.append(b"\r\n")
        if not head:
            parts.append(response.body)
        return b"".join(parts)


async def _not_serving(_: Request, respond: Respond) -> None:
    raise RuntimeError("serve has not been called")


class _Slot:
    """The place of one answer in the order of its connection's requests."""

    __slots__ = ("connection", "encoded", "head", "keep_alive", "size")

    def __init__(self, connection: _Connection, keep_alive: bool, head: bool, size: int) -> None:
        self.connection = connection
        self.encoded: bytes | None = None
        self.keep_alive = keep_alive
        self.head = head
        self.size = size

    def respond(self, response: Response) -> None:
        connection = self.connection
        if connection.closed or self.encoded is not None:
            return
        close = not self.keep_alive or connection.listener.draining
        self.encoded = connection.listener.encode(response, close=close, head=self.head)
        if close:
            connection.last = self
        if connection.slots[0] is self:
            connection.write_ready()


class _Connection:
    """One sender. llhttp calls the `on_...` methods while bytes are fed."""

    def __init__(self, listener: Listener, sock: socket.socket, nursery: trio.Nursery) -> None:
        self.listener = listener
        self.limits = listener.limits
        self.slots: deque[_Slot] = deque()
        self.last: _Slot | None = None  # after its answer the connection is closed
        self.closed = False
        self.deadline = trio.current_time() + self.limits.idle_timeout_ms / 1000
        self._sock = sock
        self._nursery = nursery
        self._scope = trio.CancelScope()
        self._parser = httptools.HttpRequestParser(self)
        self._out = bytearray()
        self._writing = False
        self._wake = trio.lowlevel.ParkingLot()  # the reader, waiting for answers to be written
        self._complete: list[tuple[Request, _Slot]] = []
        self._refusal: Response | None = None
        self._begun = 0.0
        self._reset()
        self._in_message = False

    def _reset(self) -> None:
        self._in_message = True
        self._in_body = False
        self._head_bytes = 0
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._reserved = 0
        self._continue = False

    # llhttp's callbacks

    def on_message_begin(self) -> None:
        self._reset()
        self._begun = time.perf_counter()
        self.deadline = trio.current_time() + self.limits.read_timeout_ms / 1000

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in self._headers:
            if name in _SINGLE:
                self._refuse(400, "bad_request", f"more than one {name.decode('latin-1')} header")
                return
            value = self._headers[name] + b", " + value
        self._headers[name] = value
        if len(self._headers) > 100:
            self._refuse(431, "too_many_headers", "at most 100 header fields")

    def on_headers_complete(self) -> None:
        self._in_body = True
        headers = self._headers
        length = headers.get(b"content-length")
        coding = headers.get(b"transfer-encoding")
        if self._parser.get_http_version() not in ("1.1", "1.0"):
            self._refuse(505, "http_version", "HTTP/1.1 only")
        elif b"host" not in headers and self._parser.get_http_version() == "1.1":
            self._refuse(400, "bad_request", "no Host header")
        elif length is not None and coding is not None:
            self._refuse(400, "bad_request", "Content-Length and Transfer-Encoding together")
        elif coding is not None and coding.lower() != b"chunked":
            self._refuse(400, "bad_request", "the only Transfer-Encoding is chunked")
        elif length is not None and not (length.isdigit() and len(length) <= 18):
            self._refuse(400, "bad_request", "Content-Length is not a number")
        elif length is not None and int(length) > self.limits.body_max_bytes:
            self._refuse_size()
        elif (expect := headers.get(b"expect")) is not None and expect.lower() != b"100-continue":
            self._refuse(417, "expectation_failed", "the only expectation is 100-continue")
        else:
            self._reserve(self.limits.body_max_bytes if coding is not None else int(length or 0))
            self._continue = expect is not None and (coding is not None or length is not None)

    def on_body(self, data: bytes) -> None:
        if self._refusal is None:
            self._body_bytes += len(data)
            if self._body_bytes > self.limits.body_max_bytes:
                self._refuse_size()
            else:
                self._body.append(data)

    def on_message_complete(self) -> None:
        if self._refusal is not None:
            return
        self._in_message = False
        path, _, query = self._url.partition(b"?")
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        method = self._parser.get_method()
        self._reserve(self._body_bytes)
        slot = _Slot(self, self._parser.should_keep_alive(), method == b"HEAD", self._reserved)
        self._reserved = 0
        self.slots.append(slot)
        self._complete.append((Request(method, path, query, self._headers, body, self._begun), slot))

    def _reserve(self, size: int) -> None:
        self.listener.statistics.body_bytes_in_flight += size - self._reserved
        self._reserved = size

    def _refuse_size(self) -> None:
        self._refuse(413, "body_too_large", f"at most {self.limits.body_max_bytes} bytes")

    def _refuse(self, status: int, code: str, detail: str) -> None:
        if self._refusal is None:
            self._refusal = Response(status, JSON, error_body(code, detail), ())

    # The reading task

    async def run(self) -> None:
        try:
            with self._scope:
                await self._read()
        finally:
            self.abort()

    async def _read(self) -> None:
        statistics = self.listener.statistics
        limits = self.limits
        while self.last is None:
            if not self._in_message and not self.slots:
                if self.listener.draining:
                    return
                self.deadline = trio.current_time() + limits.idle_timeout_ms / 1000
            await trio.lowlevel.wait_readable(self._sock)
            try:
                data = self._sock.recv(_READ_SIZE)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError:
                return
            if not data:
                await self._until_answered()
                return
            if not self._in_body:
                self._head_bytes += len(data)
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade:
                self._refuse(400, "bad_request", "no protocol upgrades here")
            except httptools.HttpParserError:
                self._refuse(400, "bad_request", "not HTTP/1.1")
            if self._in_message and not self._in_body and self._head_bytes > limits.header_max_bytes:
                self._refuse(431, "headers_too_large", f"at most {limits.header_max_bytes} bytes")
            complete, self._complete = self._complete, []
            for request, slot in complete:
                statistics.requests += 1
                if not self._in_message:
                    self.deadline = _NEVER
                await self.listener.accept(request, slot.respond)
            if self._refusal is not None:
                await self._say_no(self._refusal)
                return
            if self._continue:
                self._continue = False
                await self._until_answered()
                self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
            while len(self.slots) >= _PIPELINED and not self.closed:
                await self._wake.park()
            if statistics.body_bytes_in_flight > limits.body_bytes_in_flight:
                await self._until_room()
        await self._until_answered()

    async def _until_room(self) -> None:
        """Read nothing more while too many body bytes wait; who has a reserved place goes on."""
        statistics = self.listener.statistics
        while (
            statistics.body_bytes_in_flight - self._reserved > self.limits.body_bytes_in_flight
            and not self.closed
        ):
            await self.listener.room.park()

    async def _until_answered(self) -> None:
        """Every request so far has been answered, and the answers are written."""
        while (self.slots or self._out) and not self.closed:
            await self._wake.park()

    async def _say_no(self, refusal: Response) -> None:
        """Answer in turn, then read on a little: a reset would take the answer away from the sender."""
        await self._until_answered()
        self.deadline = trio.current_time() + _LINGER_SECONDS
        self._send(self.listener.encode(refusal, close=True))
        await self._until_answered()
        try:
            self._sock.shutdown(socket.SHUT_WR)
            left = _LINGER_BYTES
            while left > 0:
                await trio.lowlevel.wait_readable(self._sock)
                data = self._sock.recv(_READ_SIZE)
                if not data:
                    return
                left -= len(data)
        except OSError:
            return

    # Writing, also from the flusher

    def write_ready(self) -> None:
        """Write the answers whose turn it is."""
        slots = self.slots
        ready: list[bytes] = []
        freed = 0
        while slots and (encoded := slots[0].encoded) is not None:
            slot = slots.popleft()
            ready.append(encoded)
            freed += slot.size
            if slot is self.last:
                break
        if freed:
            self.listener.release(freed)
        if ready:
            self._send(ready[0] if len(ready) == 1 else b"".join(ready))
        if not slots and not self._in_message:
            self.deadline = trio.current_time() + self.limits.idle_timeout_ms / 1000
        if self._wake:
            self._wake.unpark_all()
        if self.last is not None and self.last.encoded is not None and self.last not in slots:
            self._finish()

    def _send(self, data: bytes) -> None:
        if self._out:
            self._out += data
            return
        try:
            sent = self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self._scope.cancel()
            return
        if sent < len(data):
            self._out += data[sent:]
            if not self._writing:
                self._writing = True
                self._nursery.start_soon(self._write_rest)

    async def _write_rest(self) -> None:
        """The sender reads slowly: keep writing, each step within the write deadline."""
        try:
            while self._out and not self.closed:
                with trio.move_on_after(self.limits.write_timeout_ms / 1000) as timely:
                    await trio.lowlevel.wait_writable(self._sock)
                if timely.cancelled_caught:
                    self.listener.statistics.timed_out += 1
                    self._scope.cancel()
                    return
                try:
                    del self._out[: self._sock.send(self._out)]
                except (BlockingIOError, InterruptedError):
                    continue
        except (OSError, trio.ClosedResourceError):
            self._scope.cancel()
        finally:
            self._writing = False
            self._wake.unpark_all()
            if self.last is not None and self.last.encoded is not None and self.last not in self.slots:
                self._finish()

    def _finish(self) -> None:
        """The last answer has been handed to the kernel: the reader has nothing more to wait for."""
        if not self._out:
            self._scope.cancel()

    # The end

    def drain(self) -> None:
        if not self.slots and not self._in_message and not self._out:
            self._scope.cancel()

    def expire(self) -> None:
        """A deadline has passed. A sender in the middle of a request is told so, if it can be."""
        self.deadline = _NEVER
        if self._in_message and not self.slots and not self._out:
            body = error_body("request_timeout", "the request took too long to arrive")
            self._send(self.listener.encode(Response(408, JSON, body, ()), close=True))
        self._scope.cancel()

    def abort(self) -> None:
        """Close the socket and give back what was reserved; idempotent."""
        if self.closed:
            return
        self.closed = True
        held = self._reserved + sum(slot.size for slot in self.slots)
        self._reserved = 0
        self.slots.clear()
        if held:
            self.listener.release(held)
        self._wake.unpark_all()
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()
        self.listener.ended(self)


_SINGLE = frozenset(
    {
        b"content-length",
        b"transfer-encoding",
        b"host",
        b"x-hub-signature-256",
        b"expect",
        b"traceparent",
        b"x-correlation-id",
    }
)
