"""The client reads answers strictly, keeps its connection, resends nothing, and says when no answer came."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from tables import each

from router.simulator import Manner, NotAnswered, WebhookClient, signature

SECRET = "app secret"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass
class Server:
    """A TCP server on loopback whose every connection is led by `script`; `requests` are (head, body)."""

    url: str
    connections: int = 0
    requests: list[tuple[str, bytes]] = field(default_factory=list)

    async def request(self, stream: trio.abc.Stream) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            received += await more(stream)
        head, _, body = received.partition(b"\r\n\r\n")
        lengths = [ln[16:] for ln in head.decode().split("\r\n") if ln.lower().startswith("content-length: ")]
        while len(body) < int(lengths[0] if lengths else 0):
            body += await more(stream)
        self.requests.append((head.decode(), body))


class Gone(Exception):
    """The client closed the connection."""


async def more(stream: trio.abc.Stream) -> bytes:
    chunk = await stream.receive_some(65_536)
    if not chunk:
        raise Gone
    return bytes(chunk)


Script = Callable[[Server, trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def serving(script: Script) -> AsyncIterator[Server]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    server = Server(f"http://127.0.0.1:{listener.socket.getsockname()[1]}/webhooks/whatsapp")

    async def lead(stream: trio.SocketStream) -> None:
        server.connections += 1
        async with stream:
            with suppress(Gone, trio.BrokenResourceError):
                await script(server, stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, lead, [listener])
        yield server
        nursery.cancel_scope.cancel()


def always(*packets: bytes) -> Script:
    """Answer every request of a connection with these packets."""

    async def script(server: Server, stream: trio.SocketStream) -> None:
        while True:
            await server.request(stream)
            for packet in packets:
                await stream.send_all(packet)
                await trio.testing.wait_all_tasks_blocked(0.001)

    return script


def once(*packets: bytes) -> Script:
    """Answer the first request of a connection and close it."""

    async def script(server: Server, stream: trio.SocketStream) -> None:
        await server.request(stream)
        for packet in packets:
            await stream.send_all(packet)

    return script


async def test_posts_are_signed_and_share_a_connection() -> None:
    async with serving(always(OK)) as server:
        client = WebhookClient(server.url, SECRET)
        for body in (b'{"a":1}', b'{"b":2}', b""):
            answer = await client.post(body)
            assert (answer.status, answer.body) == (200, b"ok")
            assert answer.headers["content-length"] == "2"
            assert answer.seconds >= 0
        client.close()
    assert server.connections == 1
    assert [body for _, body in server.requests] == [b'{"a":1}', b'{"b":2}', b""]
    head = server.requests[0][0].split("\r\n")
    assert head[0] == "POST /webhooks/whatsapp HTTP/1.1"
    signed = signature(SECRET, b'{"a":1}')
    assert f"X-Hub-Signature-256: {signed}" in head
    assert {"Content-Length: 7", "Content-Type: application/json"} <= set(head)


async def test_added_headers_may_replace_the_signature() -> None:
    async with serving(always(OK)) as server:
        client = WebhookClient(server.url, SECRET)
        await client.post(b"{}", headers=[("x-hub-signature-256", "sha256=bad"), ("X-Other", "1")])
        client.close()
    head = server.requests[0][0]
    assert "x-hub-signature-256: sha256=bad" in head
    assert "X-Other: 1" in head
    assert SECRET not in head
    assert head.lower().count("x-hub-signature-256") == 1


@each("forgery", ["unsigned", "other_secret", "other_bytes"])
async def test_a_forged_body_bears_no_valid_signature(forgery: str) -> None:
    async with serving(always(OK)) as server:
        client = WebhookClient(server.url, SECRET)
        await client.post(b"{}", manner=Manner(forgery=forgery))
        client.close()
    ((head, body),) = server.requests
    assert body == b"{}"
    assert ("X-Hub-Signature-256: sha256=" in head) == (forgery != "unsigned")
    assert signature(SECRET, b"{}") not in head


async def test_a_slow_sender_sends_the_same_in_pieces(autojump_clock: trio.testing.MockClock) -> None:
    autojump_clock.autojump_threshold = 0.02  # leaves loopback the time to answer
    body = bytes(range(256)) * 9
    async with serving(always(OK)) as server:
        client = WebhookClient(server.url, SECRET)
        answer = await client.post(body, manner=Manner(pieces=4, pause=0.5))
        client.close()
    assert [received for _, received in server.requests] == [body]
    assert answer.seconds == pytest.approx(1.5)


@each(("pieces", "arrives"), [(1, True), (3, False)])
async def test_who_hangs_up_gets_no_answer_and_connects_anew(pieces: int, arrives: bool) -> None:
    async with serving(always(OK)) as server:
        client = WebhookClient(server.url, SECRET)
        with pytest.raises(NotAnswered, match="hung up"):
            await client.post(b'{"a":1}', manner=Manner(pieces=pieces, hang_up=True))
        assert (await client.post(b'{"b":2}')).status == 200
        client.close()
        await trio.testing.wait_all_tasks_blocked(0.001)
    assert server.connections == 2
    assert (b'{"a":1}' in [body for _, body in server.requests]) == arrives


async def test_a_get_carries_its_query_and_no_signature() -> None:
    async with serving(always(OK)) as server:
        client = WebhookClient(server.url + "?tenant=1", SECRET)
        await client.get({"hub.mode": "subscribe", "hub.challenge": "a b&c"})
        client.close()
    head = server.requests[0][0]
    assert head.startswith(
        "GET /webhooks/whatsapp?tenant=1&hub.mode=subscribe&hub.challenge=a+b%26c HTTP/1.1\r\n"
    )
    assert "signature" not in head.lower()


async def test_answers_may_come_in_any_two_packets() -> None:
    for cut in range(1, len(OK)):
        async with serving(always(OK[:cut], OK[cut:])) as server:
            client = WebhookClient(server.url, SECRET)
            assert [(await client.post(b"{}")).body for _ in range(2)] == [b"ok", b"ok"], cut
            client.close()
        assert server.connections == 1


async def test_interim_answers_are_passed_over_and_204_has_no_body() -> None:
    answer = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n"
    async with serving(always(answer)) as server:
        client = WebhookClient(server.url, SECRET)
        for _ in range(2):
            got = await client.post(b"{}")
            assert (got.status, got.body) == (204, b"")
        client.close()


@each("cut", [0, 1, 15, len(OK) - 1])
async def test_a_connection_closed_before_the_whole_answer_is_no_answer_and_nothing_is_resent(
    cut: int,
) -> None:
    async with serving(once(OK[:cut])) as server:
        client = WebhookClient(server.url, SECRET)
        with pytest.raises(NotAnswered):
            await client.post(b"{}")
        assert len(server.requests) == 1
        with pytest.raises(NotAnswered):
            await client.post(b"{}")
        assert server.connections == 2


async def test_a_kept_connection_that_the_server_closed_is_replaced() -> None:
    async with serving(once(OK)) as server:
        client = WebhookClient(server.url, SECRET)
        for _ in range(3):
            assert (await client.post(b"{}")).status == 200
            await trio.testing.wait_all_tasks_blocked(0.001)
        client.close()
    assert server.connections == len(server.requests) == 3


@pytest.mark.parametrize(
    "first", [OK[:17] + b"Connection: close\r\n" + OK[17:], OK.replace(b"HTTP/1.1", b"HTTP/1.0")]
)
async def test_a_connection_that_will_not_be_kept_is_closed_by_the_client(first: bytes) -> None:
    async with serving(always(first)) as server:
        client = WebhookClient(server.url, SECRET)
        assert [(await client.post(b"{}")).status for _ in range(2)] == [200, 200]
    assert server.connections == 2


async def test_what_follows_an_answer_is_never_taken_for_the_next_one() -> None:
    async with serving(always(OK + OK.replace(b"ok", b"no"))) as server:
        client = WebhookClient(server.url, SECRET)
        assert [(await client.post(b"{}")).body for _ in range(3)] == [b"ok"] * 3
        client.close()
    assert server.connections == 3


HTTP_OK = b"HTTP/1.1 200 OK\r\n"


@each(
    ("answer", "reason"),
    [
        (b"ok\r\n\r\n", "status line"),
        (b"HTTP/2 200 OK\r\nContent-Length: 2\r\n\r\nok", "status line"),
        (b"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nok", "status line"),
        (HTTP_OK + b"\r\n", "without a Content-Length"),
        (HTTP_OK + b"Content-Length: +2\r\n\r\nok", "Content-Length is"),
        (HTTP_OK + b"Content-Length: 2, 2\r\n\r\nok", "Content-Length is"),
        (HTTP_OK + b"Content-Length: 2\r\nContent-Length: 1\r\n\r\nok", "two different"),
        (HTTP_OK + b"Content-Length: 99999999999\r\n\r\nok", "Content-Length is"),
        (HTTP_OK + b"Content-Length : 2\r\n\r\nok", "header line"),
        (HTTP_OK + b"no colon\r\nContent-Length: 2\r\n\r\nok", "header line"),
        (HTTP_OK + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\nok", "Transfer-Encoding"),
        (HTTP_OK + b"X: " + b"a" * 70_000, "longer than"),
    ],
)
async def test_a_malformed_answer_is_none_and_ends_its_connection(answer: bytes, reason: str) -> None:
    async with serving(always(answer)) as server:
        client = WebhookClient(server.url, SECRET)
        for _ in range(2):
            with pytest.raises(NotAnswered, match=reason):
                await client.post(b"{}")
    assert server.connections == 2


async def test_too_late_is_not_answered(autojump_clock: trio.testing.MockClock) -> None:
    async def silent(server: Server, stream: trio.SocketStream) -> None:
        await server.request(stream)
        await trio.sleep_forever()

    autojump_clock.autojump_threshold = 0.05  # leaves loopback the time to connect
    async with serving(silent) as server:
        client = WebhookClient(server.url, SECRET, timeout=5.0)
        started = trio.current_time()
        with pytest.raises(NotAnswered, match=r"within 5\.0 s"):
            await client.post(b"{}")
        assert trio.current_time() - started == pytest.approx(5.0)


async def test_a_refused_connection_is_not_answered() -> None:
    async with serving(always(OK)) as server:
        pass
    with pytest.raises(NotAnswered):
        await WebhookClient(server.url, SECRET).post(b"{}")


async def test_a_cancelled_exchange_does_not_spoil_the_next() -> None:
    asked = trio.Event()

    async def slow_at_first(server: Server, stream: trio.SocketStream) -> None:
        await server.request(stream)
        if server.connections == 1:
            asked.set()
            await trio.sleep_forever()
        await stream.send_all(OK)

    async with serving(slow_at_first) as server:
        client = WebhookClient(server.url, SECRET)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.post, b"{}")
            await asked.wait()
            nursery.cancel_scope.cancel()
        assert (await client.post(b"{}")).status == 200
        client.close()
    assert server.connections == 2


async def test_one_client_carries_one_exchange_at_a_time() -> None:
    asked, refused = trio.Event(), trio.Event()

    async def waiting(server: Server, stream: trio.SocketStream) -> None:
        await server.request(stream)
        asked.set()
        await refused.wait()
        await stream.send_all(OK)

    async with serving(waiting) as server:
        client = WebhookClient(server.url, SECRET)
        answers = []

        async def post() -> None:
            answers.append(await client.post(b"{}"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(post)
            await asked.wait()
            with pytest.raises(trio.BusyResourceError):
                await client.post(b"{}")
            refused.set()
        assert [answer.status for answer in answers] == [200]
        client.close()
    assert len(server.requests) == 1


@pytest.mark.parametrize("url", ["https://127.0.0.1/", "127.0.0.1:80/x", "http:///x"])
def test_only_http_urls_with_a_host_are_taken(url: str) -> None:
    with pytest.raises(ValueError):
        WebhookClient(url, SECRET)


def test_the_repr_shows_no_secret() -> None:
    assert (
        repr(WebhookClient("http://u:p@127.0.0.1:81/x?y=z", SECRET)) == "WebhookClient(http://127.0.0.1:81/x)"
    )
