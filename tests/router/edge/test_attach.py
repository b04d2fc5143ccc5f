"""The port on which services attach, and the client that its authors are given, over real sockets."""

# ruff: noqa: ASYNC110 - connections that come and go send no events

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from typing import Any
from unittest import mock

import pytest
import trio
from tables import each
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection, wrap_client_stream

from actors.messages import Ack, Envelope, Outcome, Reject, Reply, Retry, Session
from actors.ports import Unreadable
from router import client
from router.accept import JSON, Request, Respond, Response
from router.client import CannotAttach, serve_domain
from router.config import LimitsConfig
from router.delivery.attached import AttachedService
from router.edge import attach
from router.edge.attach import AttachPort
from router.edge.http1 import Listener

HANGS = 30.0
TOKEN = "b7c1f0"


def envelope(number: int = 1, key: str = "100:1") -> Envelope:
    return Envelope(
        id=f"msg_{number:032x}",
        message_id=f"wamid.{number}",
        domain="rides",
        session=Session(key=key, phone_number_id="100"),
        message={"type": "text", "text": {"body": f"taxi {number}"}},
        received_at=datetime(2026, 3, 4, tzinfo=UTC),
        correlation_id="c-1",
    )


class Port:
    """A port for rides, whose router may be made to stand by."""

    def __init__(self) -> None:
        self.rides = AttachedService(
            "rides", sha256(TOKEN.encode()).hexdigest(), known_domain=lambda name: True
        )
        self.delivers = True
        self.stood_down = trio.Event()
        self.url = ""

    async def until(self, connections: int) -> None:
        with trio.fail_after(HANGS):
            while self.rides.connections != connections:
                await trio.sleep(0.01)

    async def stand_down(self) -> None:
        self.delivers = False
        stood_down, self.stood_down = self.stood_down, trio.Event()
        stood_down.set()


def not_a_websocket(request: Request, respond: Respond) -> None:
    respond(Response(418, JSON, request.path))


@asynccontextmanager
async def opened() -> AsyncIterator[Port]:
    port = Port()
    listener = Listener(LimitsConfig(), adopts=True)
    serving = AttachPort(
        {"rides": port.rides},
        may_attach=lambda: port.delivers,
        stood_down=lambda: port.stood_down.wait(),
        listener=listener,
    )
    with trio.fail_after(HANGS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, not_a_websocket)
            number = await nursery.start(serving.serve, "127.0.0.1", 0)
            port.url = f"ws://127.0.0.1:{number}"
            yield port
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def attached(
    port: Port, path: str = "/services/rides", token: str | None = TOKEN
) -> AsyncIterator[WebSocketConnection]:
    host, _, number = port.url.removeprefix("ws://").partition(":")
    stream = await trio.open_tcp_stream(host, int(number))
    try:
        async with trio.open_nursery() as nursery:
            headers = [] if token is None else [(b"Authorization", f"Bearer {token}".encode())]
            yield await wrap_client_stream(nursery, stream, "x", path, extra_headers=headers)
            nursery.cancel_scope.cancel()
    finally:
        await trio.aclose_forcefully(stream)


async def refused(port: Port, path: str = "/services/rides", token: str | None = TOKEN) -> int:
    """The status with which one is refused."""
    statuses: list[int] = []
    try:
        async with attached(port, path, token):
            pass
    except* ConnectionRejected as group:
        statuses = [one.status_code for one in group.exceptions if isinstance(one, ConnectionRejected)]
    return statuses[0]


@asynccontextmanager
async def served(
    port: Port, handler: Callable[[Envelope], Awaitable[Any]], **settings: Any
) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            lambda: serve_domain(port.url, "rides", handler, settings.pop("token", TOKEN), **settings)
        )
        await port.until(1)
        yield
        nursery.cancel_scope.cancel()


async def attempted(port: Port, *envelopes: Envelope) -> list[Outcome | Unreadable]:
    found: dict[int, Outcome | Unreadable] = {}

    async def one(number: int, each_one: Envelope) -> None:
        found[number] = await port.rides.attempt(each_one)

    async with trio.open_nursery() as nursery:
        for number, each_one in enumerate(envelopes):
            nursery.start_soon(one, number, each_one)
    return [found[number] for number in range(len(envelopes))]


async def test_a_service_of_ten_lines_serves_its_domain() -> None:
    async def rides(delivery: Envelope) -> Ack:
        return Ack((Reply(f"You said: {delivery.text}"),))

    async with opened() as port, served(port, rides):
        outcomes = await attempted(port, *(envelope(number, f"100:{number}") for number in range(20)))
    assert outcomes == [
        Ack((Reply(message={"type": "text", "text": {"body": f"You said: taxi {n}"}}),)) for n in range(20)
    ]


@each(
    ("returned", "reason"),
    [
        (Retry(5.0, "busy"), "busy"),
        (Retry(), "retry"),
        (Reject("no"), "no"),
        (None, "the handler returned NoneType, not Ack, Retry or Reject"),
        (ZeroDivisionError(), "the handler raised ZeroDivisionError"),
        (Ack((Reply("x" * 2_000_000),)), "the handler raised ValueError"),
        (Ack((Reply(message={"type": "text", "text": {1, 2}}),)), "the handler raised TypeError"),
    ],
)
async def test_what_a_handler_does_is_said(returned: Any, reason: str) -> None:
    async def rides(delivery: Envelope) -> Any:
        if isinstance(returned, Exception):
            raise returned
        return returned

    async with opened() as port, served(port, rides):
        [outcome] = await attempted(port, envelope())
    assert isinstance(outcome, Retry | Reject)
    assert outcome.reason == reason
    if isinstance(outcome, Retry):
        assert outcome.after == (returned.after if isinstance(returned, Retry) else None)


async def test_many_are_under_way_at_once_and_no_more_than_asked_for() -> None:
    at_once, most = 0, 0

    async def rides(delivery: Envelope) -> Ack:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await trio.sleep(0.01)
        at_once -= 1
        return Ack()

    async with opened() as port, served(port, rides, concurrency=4):
        outcomes = await attempted(port, *(envelope(number, f"100:{number}") for number in range(40)))
    assert outcomes == [Ack()] * 40
    assert most == 4


@each(
    ("path", "token", "status"),
    [
        ("/services/rides", "wrong", 401),
        ("/services/rides", TOKEN[:-1], 401),
        ("/services/rides", None, 401),
        ("/services/jobs", TOKEN, 404),
        ("/services/", TOKEN, 404),
        ("/", TOKEN, 400),
        ("/services/rides/more", TOKEN, 404),
    ],
)
async def test_who_may_not_attach_is_refused(path: str, token: str | None, status: int) -> None:
    async with opened() as port:
        assert await refused(port, path, token) == status
        assert port.rides.connections == 0


async def test_another_name_of_the_domain_will_do() -> None:
    async with opened() as port, attached(port, "/services/mobility?x=1"):
        await port.until(1)


async def test_a_client_that_is_refused_for_good_says_so() -> None:
    async def rides(delivery: Envelope) -> Ack:
        return Ack()

    async with opened() as port:
        with pytest.raises(CannotAttach, match="answered 401"):
            await serve_domain(port.url, "rides", rides, "wrong")
        with pytest.raises(CannotAttach, match="answered 404"):
            await serve_domain(port.url, "jobs", rides, TOKEN)
    for url, token, concurrency, named in (
        (port.url, TOKEN, 0, "concurrency"),
        (port.url, "", 8, "token"),
        (port.url, "a b", 8, "token"),
        ("http://127.0.0.1:1", TOKEN, 8, "url"),
        ("ws://", TOKEN, 8, "url"),
    ):
        with pytest.raises(ValueError, match=named):
            await serve_domain(url, "rides", rides, token, concurrency=concurrency)


async def test_where_nobody_delivers_a_client_comes_again() -> None:
    troubles: list[str] = []

    async def rides(delivery: Envelope) -> Ack:
        return Ack()

    async with opened() as port, trio.open_nursery() as nursery:
        port.delivers = False
        nursery.start_soon(lambda: serve_domain(port.url, "rides", rides, TOKEN, on_trouble=troubles.append))
        with trio.fail_after(HANGS):
            while not troubles:
                await trio.sleep(0.01)
        assert troubles[0].endswith("answered 503")
        port.delivers = True
        await port.until(1)
        await port.stand_down()
        await port.until(0)
        port.delivers = True
        await port.until(1)
        assert any("closed" in trouble for trouble in troubles)
        nursery.cancel_scope.cancel()


@each("frame", ["no JSON", "{}", '{"type": "credit", "credit": -1}', b"\x00\xff"])
async def test_who_speaks_another_language_is_sent_away(frame: str | bytes) -> None:
    async with opened() as port, attached(port) as connection:
        await connection.send_message(frame)
        with pytest.raises(ConnectionClosed) as closed:
            await connection.get_message()
        assert closed.value.reason is not None
        assert closed.value.reason.code == 1008
        await port.until(0)


async def test_a_frame_that_is_too_large_ends_the_connection() -> None:
    async with opened() as port, attached(port) as connection:
        await connection.send_message(json.dumps({"type": "ack", "id": "x" * 1_100_000}))
        with pytest.raises(ConnectionClosed):
            await connection.get_message()
        await port.until(0)


async def test_one_that_is_silent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "_PING_EVERY", 0.05)
    monkeypatch.setattr(attach, "_PONG_WITHIN", 0.2)
    monkeypatch.setattr(attach, "_HANDSHAKE_SECONDS", 0.2)
    async with opened() as port:
        host, _, number = port.url.removeprefix("ws://").partition(":")
        stream = await trio.open_tcp_stream(host, int(number))
        key = "dGhlIHNhbXBsZSBub25jZQ=="
        await stream.send_all(
            f"GET /services/rides HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
            f"Authorization: bearer {TOKEN}\r\n\r\n".encode()
        )
        await port.until(1)
        await port.until(0)
        await stream.aclose()


async def test_a_domain_has_so_many_connections_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "MAX_CONNECTIONS", 2)
    async with opened() as port, attached(port), attached(port):
        await port.until(2)
        assert await refused(port) == 503


def handshake(path: str, *more: str) -> bytes:
    lines = [
        f"GET {path} HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", *more,
    ]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode()


@each(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02",
        handshake("//["),
        handshake("/services/%ff%00"),
        handshake("/services/rides"),
        handshake("/services/nobody"),
        handshake("/services/rides", "Authorization: Bearer x"),
        handshake("/services/rides", f"Authorization: Bearer {TOKEN}"),
    ],
)
async def test_who_goes_in_the_middle_disturbs_nobody(sent: bytes) -> None:
    """With a reset, as a port scan or a health check does."""

    async def rides(delivery: Envelope) -> Ack:
        return Ack()

    async with opened() as port, served(port, rides):
        host, _, number = port.url.removeprefix("ws://").partition(":")
        for pause in (0.0, 0.05):
            stream = await trio.open_tcp_stream(host, int(number))
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await stream.send_all(sent)
            await trio.sleep(pause)
            await trio.aclose_forcefully(stream)
        await trio.sleep(0.05)
        await port.until(1)
        assert await attempted(port, envelope()) == [Ack()]


async def test_a_client_goes_on_after_whatever_answers() -> None:
    troubles: list[str] = []
    answers = iter([b"no HTTP at all\r\n\r\n", b"", b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n"])

    async def answer(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await stream.receive_some(4_096)
            await stream.send_all(next(answers, b""))

    async def rides(delivery: Envelope) -> Ack:
        return Ack()

    with trio.fail_after(HANGS), mock.patch.object(client, "_HANDSHAKE_SECONDS", 0.5):
        async with trio.open_nursery() as nursery:
            [listener] = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
            url = f"ws://127.0.0.1:{listener.socket.getsockname()[1]}"
            nursery.start_soon(lambda: serve_domain(url, "rides", rides, TOKEN, on_trouble=troubles.append))
            while len(troubles) < 3:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()


async def test_what_is_no_websocket_is_answered_and_nobody_else_is_disturbed() -> None:
    async def rides(delivery: Envelope) -> Ack:
        return Ack()

    async with opened() as port, served(port, rides):
        host, _, number = port.url.removeprefix("ws://").partition(":")
        for sent in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", os.urandom(200), b"\x16\x03\x01", b""):
            stream = await trio.open_tcp_stream(host, int(number))
            await stream.send_all(sent)
            await stream.aclose()
        assert await attempted(port, envelope()) == [Ack()]
