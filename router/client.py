"""A service that attaches to a router: `serve_domain` opens a WebSocket, hands each delivery to a handler and
answers with what that returns.
"""

from __future__ import annotations

import math
import random
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import trio
from trio_websocket import (
    ConnectionClosed,
    ConnectionRejected,
    WebSocketConnection,
    wrap_client_stream,
)

from actors.messages import Ack, Envelope, Outcome, Reject, Reply, Retry, SessionChange
from router.delivery.attached import frame
from router.delivery.connection import MAX_ANSWER_BYTES
from router.delivery.contract import answer_of, envelope_of
from router.json_text import parse

_MAX_MESSAGE_BYTES = 8 * 1024 * 1024  # a message of the largest body that Meta sends, with its session
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 5.0  # seconds between attempts to attach
_STEADY = 30.0  # seconds after which a connection counts as one that held
_HANDSHAKE_SECONDS = 5.0
_NEVER = frozenset({401, 404})
HandlerFunction = Callable[[Envelope], Awaitable[Outcome]]


class CannotAttach(Exception):
    """The router refuses this service for good: it does not know the domain, or not this token."""


async def serve_domain(
    url: str,
    domain: str,
    handler: HandlerFunction,
    token: str,
    *,
    concurrency: int = 8,
    ssl_context: ssl.SSLContext | None = None,
    on_trouble: Callable[[str], None] = lambda trouble: None,
) -> None:
    """Serve a domain until cancelled, and attach again whenever the connection is lost.

    `url` is that of the router's port for services, `ws://host:8082` or `wss://...`. `handler` gets an
    Envelope and returns Ack, Retry or Reject, for `concurrency` deliveries at once and one of each
    conversation. What it raises counts as a failed attempt, and the delivery comes again. So it does after a
    lost connection: `id` is the same then.

    Raises:
        CannotAttach: the domain or the token is wrong.
        ValueError: `url` is none of a WebSocket, `token` is none, or `concurrency` not 1 to 1,024.
    """
    if not 1 <= concurrency <= 1_024:
        raise ValueError(f"concurrency: {concurrency} is not between 1 and 1,024")
    if not token or not token.isascii() or any(char <= " " or char == "\x7f" for char in token):
        raise ValueError("token: it is empty, or has characters that no token has")
    server = _Server.of(url, domain)
    wait = _FIRST_WAIT
    while True:
        began = trio.current_time()
        refused: list[int] = []
        trouble = "the connection was closed"
        try:
            await _attached(server, token, handler, concurrency, ssl_context)
        except* ConnectionRejected as group:
            refused = [error.status_code for error in _leaves(group)]
            trouble = f"answered {refused[0]}"
        except* Exception as group:  # an edge: whatever answers there, it may be a router again later
            first = _leaves(group)[0]
            trouble = str(first) or type(first).__name__
        if not _NEVER.isdisjoint(refused):
            raise CannotAttach(f"{server.url} {trouble}")
        on_trouble(f"{server.url}: {trouble}")
        if trio.current_time() - began > _STEADY:
            wait = _FIRST_WAIT
        await trio.sleep(wait * random.uniform(0.5, 1.0))
        wait = min(2 * wait, _LONGEST_WAIT)


@dataclass(frozen=True, slots=True)
class _Server:
    host: str
    port: int
    tls: bool
    authority: str
    path: str

    @property
    def url(self) -> str:
        return f"{'wss' if self.tls else 'ws'}://{self.authority}{self.path}"

    @classmethod
    def of(cls, url: str, domain: str) -> _Server:
        parts = urlsplit(url)
        if parts.scheme not in ("ws", "wss") or not parts.hostname:
            raise ValueError(f"url: {url!r} is not like ws://127.0.0.1:8082")
        tls = parts.scheme == "wss"
        path = f"{parts.path.rstrip('/')}/services/{quote(domain, safe='')}"
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls, parts.netloc, path)


async def _attached(
    server: _Server, token: str, handler: HandlerFunction, concurrency: int, tls: ssl.SSLContext | None
) -> None:
    """One connection, until it is closed; whatever happens, its socket is closed, too."""
    stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]
    stream = await trio.open_tcp_stream(server.host, server.port)
    if server.tls:
        context = ssl.create_default_context() if tls is None else tls
        stream = trio.SSLStream(stream, context, server_hostname=server.host, https_compatible=True)
    try:
        async with trio.open_nursery() as nursery:
            with trio.fail_after(_HANDSHAKE_SECONDS):
                connection = await wrap_client_stream(
                    nursery,
                    stream,
                    server.authority,
                    server.path,
                    extra_headers=[(b"Authorization", b"Bearer " + token.encode())],
                    message_queue_size=concurrency,
                    max_message_size=_MAX_MESSAGE_BYTES,
                )
            await _serve(connection, handler, concurrency)
            nursery.cancel_scope.cancel()
    finally:
        await trio.aclose_forcefully(stream)


def _leaves(group: BaseExceptionGroup[Any]) -> list[Any]:
    found: list[Any] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


async def _serve(connection: WebSocketConnection, handler: HandlerFunction, concurrency: int) -> None:
    """Until the connection is closed."""
    answers, to_send = trio.open_memory_channel[str](math.inf)  # one for each delivery: credit bounds it
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_send, connection, to_send)
            answers.send_nowait(frame({"type": "credit", "credit": concurrency}))
            while True:
                said = parse(_bytes(await connection.get_message()))
                if isinstance(said, dict) and said.get("type") == "deliver":
                    nursery.start_soon(_answer, handler, said.get("delivery"), answers)
    except* ConnectionClosed:
        pass


async def _answer(handler: HandlerFunction, delivery: Any, answers: trio.MemorySendChannel[str]) -> None:
    identity = delivery.get("id") if isinstance(delivery, dict) else None
    try:
        said = frame({**_said(await handler(envelope_of(delivery))), "id": identity})
        if len(said.encode()) > MAX_ANSWER_BYTES:
            raise ValueError("the answer is too long")
    except Exception as error:  # the handler is the user's code, and so is what it returns
        said = frame(
            {"type": "retry", "reason": f"the handler raised {type(error).__name__}", "id": identity}
        )
    answers.send_nowait(said)
    answers.send_nowait(frame({"type": "credit", "credit": 1}))


def _said(outcome: object) -> dict[str, Any]:
    if isinstance(outcome, Ack):
        return {"type": "ack", "answer": answer_of(outcome)}
    if isinstance(outcome, Retry):
        return {"type": "retry", "after": outcome.after, "reason": outcome.reason}
    if isinstance(outcome, Reject):
        return {"type": "reject", "reason": outcome.reason}
    return {
        "type": "retry",
        "reason": f"the handler returned {type(outcome).__name__}, not Ack, Retry or Reject",
    }


async def _send(connection: WebSocketConnection, frames: trio.MemoryReceiveChannel[str]) -> None:
    async for one in frames:
        await connection.send_message(one)


def _bytes(message: str | bytes) -> bytes:
    return message.encode("utf-8", "surrogatepass") if isinstance(message, str) else message


__all__ = ["Ack", "CannotAttach", "Envelope", "Reject", "Reply", "Retry", "SessionChange", "serve_domain"]
