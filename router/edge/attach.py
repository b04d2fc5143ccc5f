"""The port of services. On a WebSocket at `/services/DOMAIN`, opened by the service with its token, this
carries frames between it and `router.delivery.attached`, and decides nothing about deliveries. All else that
comes is plain HTTP, for `router.edge.messages`.
"""

from __future__ import annotations

import enum
import math
import socket
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from urllib.parse import unquote

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, wrap_server_stream

from router.credentials import bearer_of
from router.delivery.attached import AttachedService, BadFrame
from router.delivery.connection import MAX_ANSWER_BYTES
from router.domains import canonical_domain
from router.edge.http1 import Listener
from router.observe.logs import get_logger

PATH = "/services/"
_UPGRADES = f"GET {PATH}".encode()
_LOOK_AGAIN = 0.05  # seconds until a request whose first few bytes came alone is looked at again
MAX_CONNECTIONS = 64  # of one domain
_MAX_SHAKING = 128  # connections of which nobody knows yet whose they are
_HANDSHAKE_SECONDS = 5.0
_PING_EVERY = 20.0  # seconds; a service that is silent for two of them is gone
_PONG_WITHIN = 20.0
# RFC 6455, 7.4.1
_GOING_AWAY, _POLICY, _RESTART = 1001, 1008, 1012
_ANOTHER = "another process delivers now"

_log = get_logger("postroom.attach")


class _Wants(enum.Enum):
    WEBSOCKET = enum.auto()
    HTTP = enum.auto()
    NOTHING = enum.auto()


class AttachPort:
    """`may_attach` is false while this process does not deliver: who comes then is asked to come again, and
    finds the one that does.
    """

    def __init__(
        self,
        services: Mapping[str, AttachedService],
        *,
        may_attach: Callable[[], bool],
        stood_down: Callable[[], Awaitable[None]],
        listener: Listener,
    ) -> None:
        """`stood_down` returns when this process has ceased to deliver: who is attached is sent away then.
        `listener` gets the connections that want no WebSocket."""
        self._services = services
        self._may_attach = may_attach
        self._stood_down = stood_down
        self._listener = listener
        self._open: set[WebSocketConnection] = set()
        self._shaking = 0

    async def serve(
        self, host: str, port: int, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Until cancelled; tells the port. Raises OSError: it cannot be listened on."""
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, self._take, port, host=host, backlog=128))
            task_status.started(listeners[0].socket.getsockname()[1])
            while True:
                await self._stood_down()
                for connection in list(self._open):
                    nursery.start_soon(_close, connection, _RESTART, _ANOTHER)

    async def _take(self, stream: trio.SocketStream) -> None:
        """One connection. Whatever becomes of it is its own business: nobody knows yet who that is."""
        try:
            if self._shaking >= _MAX_SHAKING:
                return
            wants = await self._look_at(stream)
            if wants is _Wants.HTTP:
                self._listener.adopt(socket.socket(fileno=stream.socket.detach()))
            if wants is not _Wants.WEBSOCKET:
                return
            async with trio.open_nursery() as nursery:
                await self._shake(nursery, stream)
                nursery.cancel_scope.cancel()
        except* Exception as group:
            _log.debug("a connection of a service failed", error=type(group.exceptions[0]).__name__)
        finally:
            await trio.aclose_forcefully(stream)

    async def _look_at(self, stream: trio.SocketStream) -> _Wants:
        """What it wants: looked at, and left to be read by who takes it."""
        self._shaking += 1
        try:
            with trio.move_on_after(_HANDSHAKE_SECONDS):
                while True:
                    seen = await stream.socket.recv(len(_UPGRADES), socket.MSG_PEEK)
                    if not seen:
                        return _Wants.NOTHING
                    if seen == _UPGRADES:
                        return _Wants.WEBSOCKET
                    if not _UPGRADES.startswith(seen):
                        return _Wants.HTTP
                    await trio.sleep(_LOOK_AGAIN)  # it is readable, and so would not be waited for
            return _Wants.NOTHING
        finally:
            self._shaking -= 1

    async def _shake(self, nursery: trio.Nursery, stream: trio.SocketStream) -> None:
        self._shaking += 1
        try:
            with trio.fail_after(_HANDSHAKE_SECONDS):
                request = await wrap_server_stream(
                    nursery, stream, message_queue_size=16, max_message_size=MAX_ANSWER_BYTES
                )
                found = self._service_of(request)
                if isinstance(found, int):
                    retry = [(b"Retry-After", b"1")] if found == 503 else []
                    await request.reject(found, extra_headers=retry)
                    return
                connection = await request.accept()
        finally:
            self._shaking -= 1
        self._open.add(connection)
        try:
            if self._may_attach():  # still
                await _carry(connection, found)
            else:
                await _close(connection, _RESTART, _ANOTHER)
        finally:
            self._open.discard(connection)

    def _service_of(self, request: WebSocketRequest) -> AttachedService | int:
        """The service that may be attached to; the status to refuse with."""
        path = request.path.partition("?")[0]
        if not path.startswith(PATH):
            return 404
        service = self._services.get(canonical_domain(unquote(path.removeprefix(PATH))))
        if service is None:
            return 404
        if not service.is_authorized(_token_of(request)):
            return 401
        if not self._may_attach() or service.connections >= MAX_CONNECTIONS:
            return 503
        return service


def _token_of(request: WebSocketRequest) -> str:
    for name, value in request.headers:
        if name.lower() == b"authorization":
            return bearer_of(value.decode("latin-1"))
    return ""


async def _carry(connection: WebSocketConnection, service: AttachedService) -> None:
    """One connection from its handshake to its end."""
    # A frame is sent whole by one task, whatever becomes of the delivery that it is of.
    frames, to_send = trio.open_memory_channel[str](math.inf)  # credit bounds it
    attachment = service.attach(frames.send_nowait)
    _log.info("a service has attached", service=service.name, connections=service.connections)
    reason: str | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_send, connection, to_send)
            nursery.start_soon(_keep_alive, connection)
            nursery.start_soon(_end_with, service, connection)
            try:
                while True:
                    attachment.receive(await connection.get_message())
            except BadFrame as wrong:
                reason = str(wrong)
                await _close(connection, _POLICY, reason)
            nursery.cancel_scope.cancel()
    except* ConnectionClosed:
        pass
    finally:
        service.detach(attachment)
        _log.info(
            "a service has detached", service=service.name, connections=service.connections, reason=reason
        )


async def _send(connection: WebSocketConnection, frames: trio.MemoryReceiveChannel[str]) -> None:
    async for frame in frames:
        await connection.send_message(frame)


async def _end_with(service: AttachedService, connection: WebSocketConnection) -> None:
    await service.ended.wait()
    await _close(connection, _GOING_AWAY, "the service was changed or removed")


async def _keep_alive(connection: WebSocketConnection) -> None:
    while True:
        await trio.sleep(_PING_EVERY)
        with trio.move_on_after(_PONG_WITHIN) as waited:
            await connection.ping()
        if waited.cancelled_caught:
            await _close(connection, _GOING_AWAY, "no pong")


async def _close(connection: WebSocketConnection, code: int, reason: str) -> None:
    with trio.move_on_after(_HANDSHAKE_SECONDS):
        await connection.aclose(code, reason)
