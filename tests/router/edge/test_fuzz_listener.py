"""Hostile bytes against the hot listener: nothing makes it fail, leak, answer 5xx or see a request that
was not framed so.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections import deque
from collections.abc import Sequence

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import each
from wire import GONE, Edge, Wire, chunked, get, listening, post, response, until

from router.accept import Request, Respond

SECRET_PATH = b"/secret"
INNER = get(SECRET_PATH)  # stands inside bodies only: whoever sees it at accept was smuggled to
SEEDS = (
    get(b"/a?b=c"),
    post(b"hello"),
    post(INNER),
    post(b"x" * 700, b"X-Hub-Signature-256: sha256=00", b"traceparent: 00"),
    chunked(b"he", b"llo", trailers=b"X-T: 1\r\n"),
    chunked(INNER, b"!"),
    post(b"hi", b"Expect: 100-continue"),
    get(b"/", b"Connection: close"),
    b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
)
WORDS = (
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\x00", b" ", b"\t", b":", b";", b",", b"0", b"-1", b"+", b"ff",
    b"Content-Length: 3\r\n", b"Content-Length: 99999999999\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"Host: b\r\n",
    b"Upgrade: h2c\r\nConnection: upgrade\r\n", b"0\r\n\r\n", b"5\r\nhello\r\n", b"HTTP/1.1", b"HTTP/2.0",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\xff\xfe", b"A" * 3_000,
)  # fmt: skip
Framed = tuple[bytes, bytes, bytes]  # method, target, body
STATUSES = {100, 200, 400, 408, 413, 417, 431}


def mutated(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One or several requests with a few things wrong; now and then nothing at all."""
    data = bytearray(b"".join(rng.choice(seeds) for _ in range(rng.choice((1, 1, 2, 3, 40)))))
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at:at] = rng.choice(WORDS)
            case 2:
                del data[at : at + rng.choice((1, 2, 5, 50))]
            case 3:
                data[at:at] = data[at : at + rng.randrange(1, 60)]
            case 4:
                del data[at:]
            case _:
                lines = bytes(data).split(b"\r\n")
                line = rng.randrange(len(lines))
                lines[line:line] = [rng.choice(WORDS).strip()]
                data = bytearray(b"\r\n".join(lines))
    return bytes(data)


def framed_requests(data: bytes) -> list[Framed]:
    """(method, target, body) of the requests at the start of `data`, by the letter of RFC 9112 and one
    framing rule; ends at the first that is not so. Several spaces count as one in a request line, which
    the RFC allows (section 3) and llhttp does. Shares nothing with the listener.
    """
    found: list[Framed] = []
    while True:
        data = re.sub(rb"\A[\r\n]+", b"", data)
        head, separator, rest = data.partition(b"\r\n\r\n")
        if not separator:
            return found
        line, *fields = head.split(b"\r\n")
        start = re.fullmatch(rb"([A-Z-]+) +([^\s]+) +(?:HTTP|RTSP|ICE)/1\.([01])", line)
        if start is None:
            return found
        headers: dict[bytes, list[bytes]] = {}
        for one in fields:
            match = re.fullmatch(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\x00]*)", one)
            if match is None:
                return found
            headers.setdefault(match[1].lower(), []).append(match[2])
        lengths, codings = headers.get(b"content-length", []), headers.get(b"transfer-encoding", [])
        body: bytes | None = b""
        if codings:
            if lengths or len(codings) > 1 or codings[0].lower() != b"chunked" or start[3] == b"0":
                return found
            body, rest = _unchunked(rest)
        elif lengths:
            if len(lengths) > 1 or not re.fullmatch(rb"\d{1,18}", lengths[0]):
                return found
            size = int(lengths[0])
            body, rest = (rest[:size], rest[size:]) if len(rest) >= size else (None, b"")
        if body is None:
            return found
        found.append((start[1], start[2], body))
        data = rest


def _unchunked(data: bytes) -> tuple[bytes | None, bytes]:
    body = b""
    while True:
        match = re.match(rb"([0-9A-Fa-f]{1,15})(?:;[^\r\n]*)?\r\n", data)
        if match is None:
            return None, b""
        size, data = int(match[1], 16), data[match.end() :]
        if size == 0:
            break
        if data[size : size + 2] != b"\r\n":
            return None, b""
        body, data = body + data[:size], data[size + 2 :]
    while not data.startswith(b"\r\n"):
        line, separator, data = data.partition(b"\r\n")
        if not separator or b":" not in line:
            return None, b""
    return body, data[2:]


def as_framed(one: Framed) -> Framed:
    """A lone `?` at the end of the target is lost in what `accept` sees."""
    method, target, body = one
    return method, target.removesuffix(b"?"), body


def as_seen(request: Request) -> Framed:
    return as_framed((request.method, request.path + b"?" + request.query, request.body))


async def answers_until_quiet(wire: Wire, quiet: float) -> None:
    """Read until the other side closes, or for so long; every answer is one that a sender can earn."""
    with trio.move_on_after(quiet), contextlib.suppress(*GONE):
        while data := await wire.stream.receive_some(65_536):
            wire.received += data
    for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", wire.received):
        assert int(status) in STATUSES, wire.received


async def send_in_pieces(wire: Wire, data: bytes, rng: random.Random) -> None:
    with contextlib.suppress(*GONE):
        while data:
            size = rng.choice((1, 2, 10, 100, 5_000, len(data)))
            await wire.send(data[:size])
            data = data[size:]
            if rng.random() < 0.2:
                await trio.sleep(rng.choice((0, 0.001, 0.005)))
        if rng.random() < 0.2:
            await wire.stream.send_eof()


async def attack(edge: Edge, known: bytes, data: bytes, rng: random.Random, quiet: float) -> None:
    """`known`, if anything, comes first and by itself: what has the same head is then read another way."""
    async with edge.connect() as wire, trio.open_nursery() as nursery:
        if known:
            await wire.send(known)
            assert (await wire.answer()).status == 200
        nursery.start_soon(send_in_pieces, wire, data, rng)
        await answers_until_quiet(wire, quiet)
        nursery.cancel_scope.cancel()


LIMITS = {
    "body_max_bytes": 2_000,
    "header_max_bytes": 2_000,
    "body_bytes_in_flight": 6_000,
    "read_timeout_ms": 150,
    "idle_timeout_ms": 300,
    "write_timeout_ms": 300,
}


async def fuzz(seconds: float, seed: int) -> None:
    """Several attackers at once, and a bystander who is served throughout."""
    # Of the attacks under way and the last ones before: what they left in a socket is taken later.
    framed: deque[set[Framed]] = deque(maxlen=200)
    alien: list[Request] = []
    served = attacks = 0

    def accept(request: Request, respond: Respond) -> None:
        good = request.path == b"/good"
        if not good and not any(as_seen(request) in known for known in framed):
            alien.append(request)
        respond(response(request.path if good else b"{}"))

    async with listening(accept, **LIMITS) as edge:
        end = trio.current_time() + seconds

        async def attacker(number: int) -> None:
            nonlocal attacks
            rng = random.Random(f"{seed}.{number}")
            while trio.current_time() < end:
                known = rng.choice((b"", SEEDS[1], SEEDS[3]))
                data = mutated(rng, SEEDS if not known or rng.random() < 0.3 else (known,))
                framed.append({as_framed(one) for one in framed_requests(known) + framed_requests(data)})
                await attack(edge, known, data, rng, rng.choice((0.01, 0.03, 0.2)))
                assert not alien, (alien, data)
                attacks += 1

        async def bystander() -> None:
            nonlocal served
            while trio.current_time() < end:
                async with edge.connect() as wire:
                    await wire.send(post(b"good", path=b"/good"))
                    answer = await wire.answer()
                    assert (answer.status, answer.body) == (200, b"/good")
                served += 1
                await trio.sleep(0.02)

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(attacker, number)
            nursery.start_soon(bystander)
        assert served > seconds
        assert attacks > 10 * seconds
        await until(lambda: edge.listener.statistics.connections == 0)
        assert edge.in_flight == 0
        assert edge.listener.statistics.failed == 0


async def test_a_few_seconds() -> None:
    await fuzz(8 if settings().max_examples >= 200 else 0.5, seed=1)


@pytest.mark.acceptance
async def test_ten_minutes() -> None:
    await fuzz(600, seed=random.randrange(1_000_000))


pieces = st.lists(
    st.one_of(
        st.sampled_from(SEEDS),
        st.sampled_from(WORDS),
        st.binary(max_size=20),
        st.builds(post, st.binary(max_size=60)),
        st.builds(chunked, st.binary(min_size=1, max_size=30), st.binary(min_size=1, max_size=30)),
    ),
    max_size=8,
)


@settings(max_examples=2 * settings().max_examples)  # framing is where a mistake is a hole
@given(pieces, st.lists(st.integers(1, 200), max_size=6))
def test_what_is_seen_is_what_was_framed(parts: list[bytes], cuts: list[int]) -> None:
    data = b"".join(parts)

    async def run() -> None:
        async with listening(**LIMITS) as edge:
            async with edge.connect() as wire:
                with contextlib.suppress(*GONE):
                    at = 0
                    for cut in cuts:
                        await wire.send(data[at : at + cut])
                        at += cut
                    await wire.send(data[at:])
                    await wire.stream.send_eof()
                await answers_until_quiet(wire, 5)
            seen = [as_seen(request) for request in edge.taker.seen]
            assert seen == [as_framed(one) for one in framed_requests(data)][: len(seen)]

    trio.run(run)


@given(
    st.lists(st.sampled_from(SEEDS[:6]), min_size=1, max_size=60), st.lists(st.integers(1, 3_000), max_size=8)
)
def test_good_requests_are_all_seen_however_they_are_cut(parts: list[bytes], cuts: list[int]) -> None:
    data = b"".join(parts)

    async def run() -> None:
        async with listening() as edge, edge.connect() as wire:
            at = 0
            for cut in cuts:
                await wire.send(data[at : at + cut])
                at += cut
            await wire.send(data[at:])
            for _ in parts:
                assert (await wire.answer()).status == 200
            assert [as_seen(one) for one in edge.taker.seen] == [
                as_framed(one) for one in framed_requests(data)
            ]
            assert len(edge.taker.seen) == len(parts)

    trio.run(run)


@each(
    ("data", "bodies"),
    [
        (post(b"hello") + chunked(b"a", b"bc", trailers=b"X: 1\r\n") + get(), [b"hello", b"abc", b""]),
        (post(INNER), [INNER]),
        (post(b"hello")[:-1], []),
        (post(b"x").replace(b"Content-Length: 1", b"Content-Length: 1\r\nContent-Length: 1"), []),
    ],
)
def test_the_judge(data: bytes, bodies: list[bytes]) -> None:
    assert [body for _, _, body in framed_requests(data)] == bodies
