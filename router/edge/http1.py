"""The hot listener: HTTP/1.1 on trio and llhttp. Small, strict and hostile to bad input; what a request
means is not its business.

One task serves all connections from an epoll set of its own: a task, a wake-up and an epoll_ctl for
each request would cost more than the request (docs/decisions/0002-listener.md). So nothing in a
connection waits; what it waits for is a state, and an event or the sweep moves it on.
"""

from __future__ import annotations

import contextlib
import email.utils
import select
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from router.accept import JSON, Request, Respond, Response, error_body
from router.config import LimitsConfig
from router.edge.connection import Connection, encode
from router.observe.logs import get_logger

Wait = Callable[[], Awaitable[None]]
Accept = Callable[[Request, Respond], Wait | None]
"""Takes a request at once, or gives back what to await until it has been taken."""

_MAX_EVENTS = 512
_SWEEP_SECONDS = 0.5

_log = get_logger("postroom.edge")


@dataclass(slots=True)
class ListenerStatistics:
    """Open now, and since start: connections taken and refused, requests, deadlines missed, connections
    given up because of an error of ours."""

    connections: int = 0
    accepted: int = 0
    refused: int = 0
    requests: int = 0
    timed_out: int = 0
    failed: int = 0
    body_bytes_in_flight: int = 0


class Listener:
    """One listening socket and its connections. It listens from `bind` on, and reads from `serve` on:
    who connects in between waits, and is not refused. Without a socket of its own (`adopts`) it has the
    connections that somebody else took.
    """

    def __init__(self, limits: LimitsConfig, *, adopts: bool = False) -> None:
        self.limits = limits
        self._adopts = adopts
        self.statistics = ListenerStatistics()
        self.draining = False
        self.date = b""
        self.now = 0.0  # trio's clock, read once for all events that are there
        self._accept: Accept | None = None
        self._socket: socket.socket | None = None
        self._epoll: select.epoll | None = None
        self._connections: dict[int, Connection] = {}
        self._short_of_room: dict[Connection, None] = {}  # oldest first
        self._waits: deque[Wait] = deque()
        self._answered: list[Connection] = []
        self._writer = trio.lowlevel.ParkingLot()
        self._listening = False
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
        """Until `drain` has been called and the last connection has ended. Every complete request is
        given to `accept`, which answers each exactly once.

        Raises:
            RuntimeError: `bind` has not been called.
        """
        if self._socket is None and not self._adopts:
            raise RuntimeError("bind before serve")
        if self.draining:
            return
        self._accept = accept
        self._epoll = epoll = select.epoll()
        try:
            if self._socket is not None:
                self._listen(epoll, self._socket)
            self.now = trio.current_time()
            self._set_date()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sweep, epoll)
                nursery.start_soon(self._serve, epoll)
                nursery.start_soon(self._write)
                await self._drained.wait()
                nursery.cancel_scope.cancel()
        finally:
            for connection in list(self._connections.values()):
                connection.close()
            if self._socket is not None:
                self._socket.close()
            self._listening = False
            trio.lowlevel.notify_closing(epoll)
            epoll.close()

    def drain(self) -> None:
        """Take no more connections; idle ones end now, the others after the answer they wait for."""
        self.draining = True
        if self._socket is not None:
            if self._epoll is not None and self._listening:
                self._epoll.unregister(self._socket.fileno())
                self._listening = False
            self._socket.close()
        for connection in list(self._connections.values()):
            connection.drain()
        if not self._connections:
            self._drained.set()

    async def drained(self) -> None:
        """Return when, after `drain`, the last connection has ended."""
        await self._drained.wait()

    async def _serve(self, epoll: select.epoll) -> None:
        while True:
            await trio.lowlevel.wait_readable(epoll)
            self.now = trio.current_time()
            # What comes while others are read is read at once: a pass of the scheduler costs as much as
            # several requests. So many at most, for the other tasks have to run too.
            left = _MAX_EVENTS
            while left and not self._waits and (events := epoll.poll(0, left)):
                self._handle(events, epoll)
                left -= len(events)
            # The ingress is full: nothing more is read until what was read has found room there.
            while self._waits:
                await self._waits.popleft()()

    def _handle(self, events: list[tuple[int, int]], epoll: select.epoll) -> None:
        for fd, event in events:
            connection = self._connections.get(fd)
            if connection is None:
                if self._socket is not None and fd == self._socket.fileno():
                    self._take_connections(epoll, self._socket)
                continue
            try:
                if event & select.EPOLLOUT:
                    connection.on_writable()
                if event & ~select.EPOLLOUT:
                    connection.on_readable()
            except Exception as error:  # an edge: one connection's trouble must not be all others'
                self._give_up(connection, error)

    async def _write(self) -> None:
        """Answers go out in bursts, a whole flush's at once: one at a time, in between other work, each
        would wake its reader anew, and to wake it costs more than to send."""
        while True:
            answered, self._answered = self._answered, []
            for connection in answered:
                try:
                    connection.write_ready()
                except Exception as error:  # an edge, as in _serve
                    self._give_up(connection, error)
            if not self._answered:
                await self._writer.park()

    def _give_up(self, connection: Connection, error: Exception) -> None:
        self.statistics.failed += 1
        _log.exception("connection given up", exc_info=error)
        connection.close()

    def _listen(self, epoll: select.epoll, listener: socket.socket) -> None:
        epoll.register(listener.fileno(), select.EPOLLIN)
        self._listening = True

    def _take_connections(self, epoll: select.epoll, listener: socket.socket) -> None:
        for _ in range(64):
            try:
                sock, _address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError:
                # Out of file descriptors: who connects waits in the backlog until the next sweep.
                epoll.unregister(listener.fileno())
                self._listening = False
                return
            self.adopt(sock)

    def adopt(self, sock: socket.socket) -> None:
        """Have a connection that was taken, while `serve` runs."""
        sock.setblocking(False)
        if self._epoll is None or self.draining or len(self._connections) >= self.limits.max_connections:
            self._refuse(sock)
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections[sock.fileno()] = Connection(self, sock)
        self.watch(sock, select.EPOLLIN, new=True)
        self.statistics.accepted += 1
        self.statistics.connections = len(self._connections)

    def _refuse(self, sock: socket.socket) -> None:
        self.statistics.refused += 1
        body = error_body("too_many_connections", "try again later")
        response = Response(503, JSON, body, b"Retry-After: 1\r\n")
        with contextlib.suppress(OSError):
            sock.send(encode(response, self.date, close=True))
        sock.close()

    async def _sweep(self, epoll: select.epoll) -> None:
        """One timer for all deadlines: a scope for each read would cost more than the read."""
        while True:
            await trio.sleep(_SWEEP_SECONDS)
            self._set_date()
            if self._socket is not None and not self._listening and not self.draining:
                self._listen(epoll, self._socket)
            self.now = trio.current_time()
            for connection in list(self._connections.values()):
                if connection.deadline <= self.now:
                    connection.expire()

    def _set_date(self) -> None:
        self.date = email.utils.formatdate(time.time(), usegmt=True).encode()

    # What connections call

    def give(self, request: Request, respond: Respond) -> None:
        """A complete request."""
        assert self._accept is not None
        self.statistics.requests += 1
        wait = self._accept(request, respond)
        if wait is not None:
            self._waits.append(wait)

    def write_soon(self, connection: Connection) -> None:
        """It has answers whose turn it is."""
        if not self._answered:
            self._writer.unpark()
        self._answered.append(connection)

    def watch(self, sock: socket.socket, events: int, *, new: bool = False) -> None:
        """What of this socket is waited for."""
        assert self._epoll is not None
        if new:
            self._epoll.register(sock.fileno(), events)
        else:
            self._epoll.modify(sock.fileno(), events)

    def forget(self, sock: socket.socket, connection: Connection) -> None:
        """The connection closes this socket now."""
        if self._epoll is not None and not self._epoll.closed:
            self._epoll.unregister(sock.fileno())
        self._connections.pop(sock.fileno(), None)
        self._short_of_room.pop(connection, None)
        self.statistics.connections = len(self._connections)
        if self.draining and not self._connections:
            self._drained.set()

    def reserve(self, size: int) -> None:
        """Body bytes that are being read, or wait for their answer; negative ones are done with."""
        self.statistics.body_bytes_in_flight += size
        if size < 0:
            waiting = self._short_of_room
            while waiting and self.has_room((connection := next(iter(waiting))).wanted):
                del waiting[connection]
                connection.resume()

    def has_room(self, size: int) -> bool:
        """Whether so many body bytes more may be read now."""
        return self.statistics.body_bytes_in_flight + size <= self.limits.body_bytes_in_flight

    def resume_with_room(self, connection: Connection) -> None:
        """Call `resume` on it when enough body bytes have been answered for what it wants."""
        self._short_of_room[connection] = None
