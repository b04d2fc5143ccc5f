"""A head that is known is not read again: what is seen then is what the parser would have seen."""

from __future__ import annotations

import random
from unittest import mock

import trio
from hypothesis import given
from hypothesis import strategies as st
from tables import each
from wire import GONE, Edge, get, listening, post, response, settled

from router.accept import Request
from router.edge import connection
from router.edge.heads import Head

SIGNED = (
    b"User-Agent: facebookexternalua",
    b"X-Hub-Signature: sha1=0f",
    b"x-hub-signature-256: sha256=0123456789abcdef",
)
READ = {
    b"host": b"here",
    b"content-length": b"5",
    b"x-hub-signature-256": b"sha256=0123456789abcdef",
}
FIRST = post(b"hello", *SIGNED)


def changed(old: bytes, new: bytes) -> bytes:
    assert FIRST.count(old) == 1
    return FIRST.replace(old, new)


@each(
    "again",
    [
        FIRST,
        post(b"other", *SIGNED),
        changed(b"0123456789abcdef", b"fedcba9876543210"),
        changed(b"sha1=0f", b"sha1=f0"),
        changed(b"Content-Length: 5", b"Content-Length: 9") + b"long",
        changed(b"Content-Length: 5", b"Content-Length: 0")[: -len(b"hello")],
    ],
)
def test_what_is_the_same_head(again: bytes) -> None:
    head = Head.of(FIRST, READ)
    assert head is not None
    headers = head.headers(again)
    assert headers is not None
    assert {name: headers[name] for name in (b"host", b"content-length", b"x-hub-signature-256")} == headers
    for name, value in headers.items():
        assert name + b": " + value + b"\r\n" in again.lower()


@each(
    "other",
    [
        b"",
        FIRST[:40],
        FIRST[:-1],
        FIRST + b"!",
        FIRST + FIRST,
        get(b"/"),
        changed(b"POST / ", b"POST /x "),
        changed(b"POST ", b"PUT "),
        changed(b"HTTP/1.1", b"HTTP/1.0"),
        changed(b"Host: here", b"Host: there"),
        changed(b"facebookexternalua", b"facebookexternalub"),
        changed(b"Content-Length: 5", b"Content-Length: 6"),
        changed(b"Content-Length: 5", b"Content-Length: 05"),
        changed(b"Content-Length: 5", b"Content-Length: x"),
        changed(b"Content-Length: 5", b"Content-Length:  5"),
        changed(b"Content-Length: 5", b"Content-Lengtn: 5"),
        changed(b"sha256=", b"sha512="),
        changed(b"0123456789abcdef", b"0123456789abcde\n"),
        changed(b"0123456789abcdef", b"0123456789abcd\r\n"),
        changed(b"0123456789abcdef", b"0123456789abcd:f"),
        changed(b"0123456789abcdef", b"0123456789abcde\0"),
        changed(b"0123456789abcdef", b"0123456789abcde\xff"),
        changed(b"0123456789abcdef", b"0123456789abcde"),
    ],
)
def test_what_is_another_head(other: bytes) -> None:
    head = Head.of(FIRST, READ)
    assert head is not None
    assert head.headers(other) is None


@each(
    "data",
    [
        get(b"/"),
        b"",
        b"\r\n\r\n",
        changed(b"Content-Length: 5", b"Content-Length: 5 "),
        changed(b"Content-Length: 5", b"Transfer-Encoding: chunked"),
        post(b"hello", *SIGNED, path=b"/" + b"x" * 2_048),
    ],
)
def test_what_is_not_worth_knowing(data: bytes) -> None:
    assert Head.of(data, READ) is None


def test_a_length_that_only_the_body_speaks_of() -> None:
    assert Head.of(get(b"/") + b"\r\nContent-Length: 5\r\n", READ) is None


def seen(request: Request) -> tuple[object, ...]:
    return request.method, request.path, request.query, dict(request.headers), request.body


async def say(edge: Edge, *requests: bytes) -> tuple[list[tuple[object, ...]], list[int]]:
    """Over one connection, each when the one before has been answered: what accept saw, and the statuses."""
    edge.taker.seen.clear()
    statuses = []
    async with edge.connect() as wire:
        try:
            for data in requests:
                await wire.send(data)
                if data is requests[-1]:
                    await wire.stream.send_eof()
                statuses.append((await wire.answer(to_head=data.startswith(b"HEAD"))).status)
            while True:
                statuses.append((await wire.answer()).status)
        except GONE:
            pass
    return [seen(request) for request in edge.taker.seen], statuses


def varied(rng: random.Random, data: bytes) -> bytes:
    """The same request, or one that differs in a few places."""
    changed = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        at = rng.randrange(len(changed))
        match rng.randrange(4):
            case 0:
                changed[at] = rng.choice(b"0123456789abcdefXY:; \t\r\n\0\xff=-")
            case 1:
                changed[at : at + 1] = b""
            case 2:
                changed[at:at] = rng.choice(
                    (b"0", b"a", b"\r\n", b": ", b"Content-Length: 5\r\n", b"\r\n\r\n")
                )
            case _:
                digit = rng.choice([at for at, byte in enumerate(changed) if chr(byte).isalnum()])
                changed[digit] = rng.choice(b"0123456789abcdef")
    return bytes(changed)


FIRSTS = (
    FIRST,
    post(b"hello", *SIGNED, path=b"/a?b=c"),
    post(b"x" * 20),
    post(b"", b"traceparent: 00"),
    post(b"hello", b"Connection: keep-alive", b"X-Hub-Signature-256:sha256=00"),
    post(b"hi").replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"\r\n", b"\r\nConnection: keep-alive\r\n", 1),
    post(b"hi", b"Expect: 100-continue"),
    post(b"hi", b"Connection: close"),
    b"HEAD / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    b"\r\n" + FIRST,
)


@given(st.sampled_from(FIRSTS), st.randoms(use_true_random=False))
def test_what_is_seen_is_what_a_fresh_connection_sees(first: bytes, rng: random.Random) -> None:
    second = varied(rng, first)

    async def run() -> None:
        async with listening(body_max_bytes=60) as edge:
            with mock.patch.object(connection, "_UNKNOWN", 0):  # nothing is learned
                apart = await say(edge, first, second)
            assert await say(edge, first, second) == apart

    trio.run(run)


async def test_the_parser_reads_a_known_head_no_more() -> None:
    async with listening() as edge:
        with mock.patch.object(
            connection.Connection, "_parse", autospec=True, side_effect=connection.Connection._parse
        ) as parse:
            async with edge.connect() as wire:
                for number in range(5):
                    await wire.send(post(b"%d" % number, *SIGNED))
                    assert (await wire.answer()).status == 200
            assert parse.call_count == 1
        assert [request.body for request in edge.taker.seen] == [b"%d" % number for number in range(5)]
        assert edge.listener.statistics.requests == 5


async def test_a_sender_that_never_says_the_same_is_not_learned_from_for_ever() -> None:
    async with listening() as edge:
        with mock.patch.object(Head, "of", side_effect=Head.of) as learned:
            async with edge.connect() as wire:
                for number in range(10):
                    await wire.send(post(b"x", b"X-Request-ID: %d" % number))
                    assert (await wire.answer()).status == 200
            assert learned.call_count == 3


async def test_a_known_head_and_a_request_in_two_parts() -> None:
    """What the parser reads in parts is the request before the next one."""
    async with listening() as edge, edge.connect() as wire:
        other = post(b"hello", *SIGNED, path=b"/second")
        await wire.send(FIRST)
        await wire.answer()
        await wire.send(other[:-2])
        await edge.seen(1)
        await settled()
        await wire.send(other[-2:])
        await wire.answer()
        await wire.send(FIRST)
        await wire.answer()
        assert edge.taker.paths == [b"/", b"/second", b"/"]


async def test_of_two_heads_in_one_read_none_is_known() -> None:
    async with listening() as edge, edge.connect() as wire:
        await wire.send(FIRST + post(b"hello", *SIGNED, path=b"/second"))
        await wire.answer()
        await wire.answer()
        await wire.send(FIRST)
        await wire.answer()
        assert edge.taker.paths == [b"/", b"/second", b"/"]


async def test_a_known_head_with_a_body_that_is_too_long() -> None:
    async with listening(body_max_bytes=50) as edge, edge.connect() as wire:
        await wire.send(post(b"x" * 50))
        assert (await wire.answer()).status == 200
        await wire.send(post(b"x" * 51))
        answer = await wire.answer()
        assert (answer.status, answer.closes) == (413, True)


async def test_after_a_known_head_nothing_is_read_without_room() -> None:
    async with (
        listening(body_max_bytes=60, body_bytes_in_flight=100) as edge,
        edge.connect() as one,
        edge.connect() as two,
    ):
        for wire in (one, two):
            await wire.send(post(b"x" * 60))
            assert (await wire.answer()).status == 200
        edge.taker.hold = True
        await one.send(post(b"y" * 60))
        await edge.seen(3)
        await two.send(post(b"z" * 60))  # was read when there was no room for it
        await edge.seen(4)
        assert edge.in_flight == 120
        await two.send(post(b"z" * 60))
        await settled()
        assert len(edge.taker.seen) == 4
        for respond in edge.taker.held[:2]:
            respond(response())
        await edge.seen(5)


async def test_a_known_head_that_drain_finds_waiting_is_the_last() -> None:
    async with listening() as edge, edge.connect() as wire:
        await wire.send(FIRST)
        await wire.answer()
        edge.taker.hold = True
        await wire.send(FIRST)
        await edge.seen(2)
        edge.listener.drain()
        edge.taker.held.pop()(response())
        assert (await wire.answer()).closes
