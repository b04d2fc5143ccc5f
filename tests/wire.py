"""A raw HTTP/1.1 sender on a real socket, and a hot listener whose `accept` a test decides."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from unittest import mock

import trio
import trio.testing

from router.accept import JSON, Request, Respond, Response
from router.config import LimitsConfig
from router.edge import http1
from router.edge.http1 import Listener

GUARD = 20.0  # generous: only what hangs reaches it
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Ended(Exception):
    """The other side has closed; `received` is what came before."""

    def __init__(self, received: bytes) -> None:
        self.received = received
        super().__init__(received[:200])


GONE = (OSError, trio.BrokenResourceError, Ended)  # what sending to, or reading from, the dead may raise


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def closes(self) -> bool:
        return self.headers.get("connection", "").lower() == "close"


class Wire:
    """One connection. Reads answers by their Content-Length and nothing else."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.received = b""

    async def send(self, *parts: bytes) -> None:
        await self.stream.send_all(b"".join(parts))

    async def _more(self) -> None:
        data = await self.stream.receive_some(1_000_000)
        if not data:
            raise Ended(self.received)
        self.received += data

    async def answer(self, *, to_head: bool = False) -> Answer:
        """The next answer; an interim one has no body."""
        with trio.fail_after(GUARD):
            while b"\r\n\r\n" not in self.received:
                await self._more()
            head, _, self.received = self.received.partition(b"\r\n\r\n")
            line, *fields = head.decode("latin-1").split("\r\n")
            headers: dict[str, str] = {}
            for one in fields:
                name, _, value = one.partition(": ")
                assert name.lower() not in headers, f"{name} twice"
                headers[name.lower()] = value
            version, code = line.split(" ")[:2]
            assert version == "HTTP/1.1"
            length = 0 if to_head or code.startswith("1") else int(headers["content-length"])
            while len(self.received) < length:
                await self._more()
            body, self.received = self.received[:length], self.received[length:]
            return Answer(int(code), headers, body)

    async def ended(self) -> None:
        """The other side closes without a byte more, and without a reset."""
        with trio.fail_after(GUARD):
            data = await self.stream.receive_some(65_536)
        assert self.received + data == b""

    async def gone(self) -> None:
        """As `ended`, but a reset will do, and what comes before does not matter."""
        with trio.fail_after(GUARD), suppress(trio.BrokenResourceError):
            while await self.stream.receive_some(65_536):
                pass


@asynccontextmanager
async def connected(port: int, *, receive_buffer: int | None = None) -> AsyncIterator[Wire]:
    with trio.socket.socket() as sock:
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        with trio.fail_after(GUARD):
            await sock.connect(("127.0.0.1", port))
        yield Wire(trio.SocketStream(sock))


def post(body: bytes = b"hello", *headers: bytes, path: bytes = b"/", length: bytes | None = None) -> bytes:
    """A POST with Content-Length."""
    length = b"%d" % len(body) if length is None else length
    more = b"".join(one + b"\r\n" for one in headers)
    return b"POST %s HTTP/1.1\r\nHost: here\r\nContent-Length: %s\r\n%s\r\n%s" % (path, length, more, body)


def get(path: bytes = b"/", *headers: bytes) -> bytes:
    more = b"".join(one + b"\r\n" for one in headers)
    return b"GET %s HTTP/1.1\r\nHost: here\r\n%s\r\n" % (path, more)


def chunked(*pieces: bytes, headers: bytes = b"", trailers: bytes = b"") -> bytes:
    """A POST in chunks."""
    head = b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n" + headers + b"\r\n"
    body = b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in pieces)
    return head + body + b"0\r\n" + trailers + b"\r\n"


def response(body: bytes = b"{}", status: int = 200) -> Response:
    return Response(status, JSON, body)


@dataclass
class Taker:
    """What `accept` saw. It answers with the request's path at once, unless told to hold or to raise."""

    hold: bool = False
    crash: bool = False
    body: bytes | None = None
    seen: list[Request] = field(default_factory=list)
    held: list[Respond] = field(default_factory=list)

    def __call__(self, request: Request, respond: Respond) -> None:
        self.seen.append(request)
        if self.crash:
            raise ArithmeticError("accept is broken")
        if self.hold:
            self.held.append(respond)
        else:
            respond(response(request.path if self.body is None else self.body))

    @property
    def paths(self) -> list[bytes]:
        return [request.path for request in self.seen]


@dataclass
class Edge:
    """A listener that serves."""

    listener: Listener
    port: int
    taker: Taker

    def connect(self, *, receive_buffer: int | None = None) -> AbstractAsyncContextManager[Wire]:
        return connected(self.port, receive_buffer=receive_buffer)

    @property
    def in_flight(self) -> int:
        return self.listener.statistics.body_bytes_in_flight

    async def seen(self, count: int) -> None:
        """Wait until `accept` has seen that many requests."""
        await until(lambda: len(self.taker.seen) >= count)

    async def is_alive(self) -> None:
        """A good request on a fresh connection is answered."""
        async with connected(self.port) as wire:
            await wire.send(get(b"/alive"))
            assert (await wire.answer()).status == 200


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(GUARD):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event
            await trio.sleep(0.0005)


async def settled() -> None:
    """Whatever was going to happen by itself has happened: both sides run in this loop, and it is idle."""
    await trio.testing.wait_all_tasks_blocked(0.01)


Accept = Callable[[Request, Respond], Callable[[], Awaitable[None]] | None]


@asynccontextmanager
async def listening(
    accept: Accept | None = None, *, failed: int = 0, limits: LimitsConfig | None = None, **some: int
) -> AsyncIterator[Edge]:
    """A listener with these limits. Afterwards nothing may be left: no connection, no reserved byte, and
    no failure but `failed` of them.
    """
    taker = Taker()
    listener = Listener(limits or LimitsConfig(**some))
    edge = Edge(listener, listener.bind("127.0.0.1", 0), taker)
    with mock.patch.object(http1, "_SWEEP_SECONDS", 0.02):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, accept or taker)
            await until(lambda: listener.date != b"")
            yield edge
            statistics = listener.statistics
            for respond in taker.held:
                respond(response())
            with trio.fail_after(GUARD):
                listener.drain()
                await listener.drained()
            assert (statistics.connections, statistics.body_bytes_in_flight) == (0, 0)
            assert statistics.failed == failed
