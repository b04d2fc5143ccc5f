"""What every edge promises about the webhook, whatever server carries it. Each function takes a `World`;
a runner parametrizes over CONTRACT and brings an edge with a real ingress and an in-memory journal behind
it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import trio
from doubles import MemoryJournal
from wire import GONE, Answer, Wire, connected, get, post, settled, until

from actors.errors import JournalUnavailable
from actors.ingress import Ingress
from actors.kernel import Address
from actors.messages import Appended, Delivery, Duplicates
from router.accept import Webhooks
from router.config import AppConfig, LimitsConfig
from router.simulator import payloads, signature
from router.simulator.payloads import Head

PATH = b"/webhooks/whatsapp"
SECOND = b"/webhooks/whatsapp/second"
APPS = (
    AppConfig(secret="s1", secret_previous="s0", verify_token="v1"),
    AppConfig(name="second", secret="s2", verify_token="v2"),
)
MAX_BODY = 3_145_728
IDLE_MS = 200  # what edges are to be configured with
ACCEPTED = b'{"status":"accepted"}'
TRACE = b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"


class RecordingJournal(MemoryJournal):
    """Keeps the bodies that it committed. While `gate` is set to an event, appends wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: list[bytes] = []
        self.gate: trio.Event | None = None

    async def append(
        self, deliveries: Sequence[Delivery], *, duplicates: int
    ) -> Appended | Duplicates | None:
        if self.gate is not None:
            await self.gate.wait()
        return await super().append(deliveries, duplicates=duplicates)

    def commit(self, deliveries: Sequence[Delivery], *, duplicates: int = 0) -> Appended | Duplicates:
        appended = super().commit(deliveries, duplicates=duplicates)
        if isinstance(appended, Appended):
            self.bodies.extend(delivery.body for delivery in deliveries)
        return appended


@dataclass
class World:
    """One edge under test."""

    port: int
    journal: RecordingJournal
    guard: float = 5.0  # how long it may take to close a connection

    def connect(self) -> AbstractAsyncContextManager[Wire]:
        return connected(self.port)


@asynccontextmanager
async def way_in() -> AsyncIterator[tuple[RecordingJournal, Any]]:
    """A journal, and as much of a router as an edge sees of it."""
    journal = RecordingJournal()
    address: Address[Delivery] = Address("ingress", 100)
    ingress = Ingress(
        journal,
        feed=lambda first, last, items: None,
        look=lambda: None,
        max_rows=100,
        max_bytes=8_000_000,
        on_refused=lambda error: None,
    )
    router = SimpleNamespace(
        webhooks=Webhooks(APPS, address, dedup_key=lambda: b"k" * 32),
        config=SimpleNamespace(limits=LimitsConfig(idle_timeout_ms=IDLE_MS)),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(address.run, ingress)
        yield journal, router
        address.mailbox.close()


def message(text: str = "hi") -> bytes:
    one = payloads.text_message(Head(f"wamid.{text}", "250", 1), text)
    return payloads.body(payloads.entry("1", payloads.change("100", "+1", messages=[one])))


def of_size(size: int) -> bytes:
    """A body of exactly so many bytes."""
    body = message("#")
    return body.replace(b'"#"', b'"' + b"x" * (size - len(body) + 1) + b'"')


def signed(body: bytes, *headers: bytes, secret: str = "s1", path: bytes = PATH) -> bytes:
    return post(body, b"X-Hub-Signature-256: " + signature(secret, body).encode(), *headers, path=path)


async def ask(world: World, data: bytes, *, to_head: bool = False) -> Answer:
    async with world.connect() as wire:
        await wire.send(data)
        return await wire.answer(to_head=to_head)


def error_of(answer: Answer) -> str:
    """The error's code; the body has the shape of every error."""
    assert answer.headers["content-type"] == "application/json"
    body = json.loads(answer.body)
    assert body.keys() == {"error", "detail"}
    assert body["detail"]
    return str(body["error"])


async def the_handshake_is_answered_with_the_bare_challenge(world: World) -> None:
    query = b"?hub.mode=subscribe&hub.challenge=%C3%A9%3C1%3E+2&hub.verify_token="
    answer = await ask(world, get(PATH + query + b"v1"))
    assert answer.status == 200
    assert answer.body == "é<1> 2".encode()
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    answer = await ask(world, get(SECOND + query + b"v2"))
    assert answer.status == 200
    for path, token in ((PATH, b"v2"), (SECOND, b"v1"), (PATH, b"")):
        answer = await ask(world, get(path + query + token))
        assert (answer.status, error_of(answer)) == (403, "verification_failed")


async def what_is_signed_is_stored_and_then_accepted(world: World) -> None:
    body = message("caf\u00e9 \u0000")
    answer = await ask(world, signed(body))
    assert (answer.status, answer.body) == (200, ACCEPTED)
    assert answer.headers["content-type"] == "application/json"
    assert world.journal.bodies == [body]


async def what_is_signed_and_no_json_is_stored_as_well(world: World) -> None:
    body = b"\x00\xff{"
    assert (await ask(world, signed(body))).status == 200
    assert (await ask(world, signed(b""))).status == 200
    assert world.journal.bodies == [body, b""]


async def the_answer_comes_after_the_commit(world: World) -> None:
    world.journal.gate = trio.Event()
    async with world.connect() as wire:
        await wire.send(signed(message()))
        with trio.move_on_after(0.05) as waited:
            await wire.stream.receive_some(1)
        assert waited.cancelled_caught
        world.journal.gate.set()
        assert (await wire.answer()).status == 200


async def every_answer_has_its_ids_and_its_latency(world: World) -> None:
    seen = set()
    for data in (signed(message()), post(b"x", path=PATH), get(PATH), signed(message("2"))):
        answer = await ask(world, data)
        request_id = answer.headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{16,}", request_id)
        assert answer.headers["x-correlation-id"] == request_id
        assert re.fullmatch(r"\d+\.\d+", answer.headers["x-wa-core-latency"])
        assert 0 <= float(answer.headers["x-wa-core-latency"]) < 20_000
        seen.add(request_id)
    assert len(seen) == 4


async def a_correlation_id_is_taken_or_made(world: World) -> None:
    for headers, expected in (
        ((b"X-Correlation-ID: abc-1",), "abc-1"),
        ((b"traceparent: " + TRACE,), "a" * 32),
        ((b"X-Correlation-ID: mine", b"traceparent: " + TRACE), "mine"),
        ((b"X-Correlation-ID: not good",), None),
        ((b"X-Correlation-ID: " + b"x" * 129,), None),
        ((b"traceparent: 00-nonsense",), None),
    ):
        answer = await ask(world, signed(message(), *headers))
        assert answer.status == 200
        made = answer.headers["x-request-id"]
        assert answer.headers["x-correlation-id"] == (made if expected is None else expected)


async def what_is_not_signed_is_refused_and_not_stored(world: World) -> None:
    body = message()
    right = signature("s1", body)
    for header in (
        (),
        (b"X-Hub-Signature-256:",),
        (b"X-Hub-Signature-256: " + signature("s2", body).encode(),),
        (b"X-Hub-Signature-256: " + signature("s1", body + b" ").encode(),),
        (b"X-Hub-Signature-256: " + right.upper().encode(),),
        (b"X-Hub-Signature-256: " + right[7:].encode(),),
        (b"X-Hub-Signature: " + right.encode(),),
    ):
        answer = await ask(world, post(body, *header, path=PATH))
        assert (answer.status, answer.body) == (401, b'{"error":"invalid_signature"}')
    assert world.journal.bodies == []


async def both_secrets_of_an_app_sign(world: World) -> None:
    for number, secret in enumerate(("s1", "s0")):
        assert (await ask(world, signed(message(str(number)), secret=secret))).status == 200
    assert len(world.journal.bodies) == 2


async def each_app_has_its_path_and_its_secret(world: World) -> None:
    for path, secret, status in ((SECOND, "s2", 200), (SECOND, "s1", 401), (PATH, "s2", 401)):
        assert (await ask(world, signed(message(), path=path, secret=secret))).status == status
    assert len(world.journal.bodies) == 1


async def other_paths_are_not_found(world: World) -> None:
    for path in (b"/", PATH + b"/", PATH + b"/third", b"/webhooks/%77hatsapp/x", b"/webhooks"):
        assert (await ask(world, signed(message(), path=path))).status == 404
    assert world.journal.bodies == []


async def other_methods_are_not_allowed(world: World) -> None:
    for method in (b"PUT", b"DELETE", b"PATCH", b"OPTIONS"):
        answer = await ask(world, signed(message()).replace(b"POST", method, 1))
        assert (answer.status, error_of(answer)) == (405, "method_not_allowed")
        assert answer.headers["allow"] == "GET, POST"
    assert world.journal.bodies == []


async def head_has_an_answer_without_a_body(world: World) -> None:
    async with world.connect() as wire:
        await wire.send(b"HEAD " + PATH + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await wire.answer(to_head=True)).status == 405
        await wire.send(signed(message()))
        assert (await wire.answer()).status == 200  # what came after the head was no body


async def what_cannot_be_stored_is_not_accepted(world: World) -> None:
    world.journal.fail("append", JournalUnavailable("gone"))
    answer = await ask(world, signed(message()))
    assert (answer.status, error_of(answer)) == (503, "unavailable")
    assert world.journal.bodies == []
    assert (await ask(world, signed(message()))).status == 200


async def the_largest_body_is_accepted(world: World) -> None:
    body = of_size(MAX_BODY)
    assert len(body) == MAX_BODY
    assert (await ask(world, signed(body))).status == 200
    assert world.journal.bodies == [body]


async def a_larger_one_is_refused_and_not_stored(world: World) -> None:
    for body in (of_size(MAX_BODY + 1), of_size(MAX_BODY + 500_000)):
        for data in (signed(body), _chunked(body, 60_000)):
            answer = await ask(world, data)
            assert (answer.status, error_of(answer)) == (413, "body_too_large")
    assert world.journal.bodies == []
    assert (await ask(world, signed(message()))).status == 200


async def a_chunked_body_is_accepted(world: World) -> None:
    bodies = [message("chunked"), of_size(200_000)]
    assert (await ask(world, _chunked(bodies[0], 7))).status == 200
    assert (await ask(world, _chunked(bodies[1], 30_000))).status == 200
    assert world.journal.bodies == bodies


def _chunked(body: bytes, size: int) -> bytes:
    head = b"POST %s HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nX-Hub-Signature-256: %s\r\n\r\n"
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return head % (PATH, signature("s1", body).encode()) + chunks + b"0\r\n\r\n"


async def one_connection_carries_many_requests(world: World) -> None:
    async with world.connect() as wire:
        for number in range(20):
            await wire.send(signed(message(str(number))))
            assert (await wire.answer()).status == 200
            await wire.send(post(b"not signed", path=PATH))
            assert (await wire.answer()).status == 401
    assert len(world.journal.bodies) == 20


async def duplicates_are_accepted_and_stored_once(world: World) -> None:
    statuses: list[int] = []

    async def one() -> None:
        statuses.append((await ask(world, signed(message()))).status)

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(one)
    assert statuses == [200] * 10
    assert world.journal.bodies == [message()]


async def what_a_sender_sent_before_it_left_is_stored(world: World) -> None:
    world.journal.gate = trio.Event()
    async with world.connect() as wire:
        await wire.send(signed(message("first")))
        await settled()
    async with world.connect() as wire:
        await wire.send(signed(message("second")))
    await settled()
    world.journal.gate.set()
    await until(lambda: sorted(world.journal.bodies) == sorted([message("first"), message("second")]))
    assert (await ask(world, signed(message("third")))).status == 200


async def what_it_did_not_finish_is_not(world: World) -> None:
    async with world.connect() as wire:
        await wire.send(signed(message())[:-1])
    await settled()
    assert world.journal.bodies == []


async def a_connection_that_is_to_close_is_closed(world: World) -> None:
    before = open_sockets()
    for _ in range(3):
        async with world.connect() as wire:
            await wire.send(signed(message(), b"Connection: close"))
            answer = await wire.answer()
            assert (answer.status, answer.closes) == (200, True)
            with trio.fail_after(world.guard):
                await wire.ended()
    await until(lambda: open_sockets() <= before)


async def an_idle_connection_is_closed(world: World) -> None:
    before = open_sockets()
    async with world.connect() as wire:
        await wire.send(signed(message()))
        assert (await wire.answer()).status == 200
        with trio.fail_after(world.guard):
            await wire.ended()
    await until(lambda: open_sockets() <= before)


async def senders_that_leave_leave_no_socket(world: World) -> None:
    before = open_sockets()
    last = signed(message(), b"Connection: close")
    for data in (b"", last, signed(message()), signed(message())[:20], signed(message())[:-5]):
        for _ in range(3):
            async with world.connect() as wire:
                await wire.send(data)
    await until(lambda: open_sockets() <= before)


async def bad_framing_is_a_400(world: World) -> None:
    for data in (
        b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n" % PATH,
        b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello" % PATH,
        b"no HTTP at all\r\n\r\n",
    ):
        async with world.connect() as wire:
            try:
                await wire.send(data)
                assert (await wire.answer()).status == 400
            except GONE as error:
                raise AssertionError(f"no answer to {data!r}") from error
    assert world.journal.bodies == []


def open_sockets() -> int:
    """Of this process, in which the edge runs."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
        except OSError:
            continue
    return count


CONTRACT = [
    the_handshake_is_answered_with_the_bare_challenge,
    what_is_signed_is_stored_and_then_accepted,
    what_is_signed_and_no_json_is_stored_as_well,
    the_answer_comes_after_the_commit,
    every_answer_has_its_ids_and_its_latency,
    a_correlation_id_is_taken_or_made,
    what_is_not_signed_is_refused_and_not_stored,
    both_secrets_of_an_app_sign,
    each_app_has_its_path_and_its_secret,
    other_paths_are_not_found,
    other_methods_are_not_allowed,
    head_has_an_answer_without_a_body,
    what_cannot_be_stored_is_not_accepted,
    the_largest_body_is_accepted,
    a_larger_one_is_refused_and_not_stored,
    a_chunked_body_is_accepted,
    one_connection_carries_many_requests,
    duplicates_are_accepted_and_stored_once,
    what_a_sender_sent_before_it_left_is_stored,
    what_it_did_not_finish_is_not,
    a_connection_that_is_to_close_is_closed,
    an_idle_connection_is_closed,
    senders_that_leave_leave_no_socket,
    bad_framing_is_a_400,
]
