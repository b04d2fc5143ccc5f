"""A lane against a real socket: what is sent, how each answer is mapped, and when the connection is kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook
from tables import each
from texts import patterns, texts

from actors.messages import Ack, Envelope, Reject, Reply, Retry, Session
from actors.ports import Unreadable
from router.delivery import connection
from router.delivery.connection import retry_after
from router.delivery.contract import traceparent
from router.delivery.http import HttpLane, Target, open_lane

NOW = datetime.now(UTC).replace(microsecond=0)
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ENVELOPE = Envelope(
    id="msg_" + "0123456789abcdef" * 2,
    message_id="wamid.1",
    domain="rides",
    session=Session(key="1:2", phone_number_id="1"),
    message={"id": "wamid.1", "text": {"body": "Zoë"}},
    received_at=NOW,
    correlation_id="c-1",
)
LONG = replace(ENVELOPE, message={"id": "wamid.2", "text": {"body": "a" * 32_000_000}})
CLOSE = object()
Part = bytes | object | Callable[[], Awaitable[object]]


def ok(body: bytes = b"{}", *headers: bytes, status: bytes = b"200 OK") -> bytes:
    lines = [b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


@dataclass
class Received:
    connection: int
    line: str
    headers: dict[str, str]
    body: bytes


class Service:
    """Answers each request with the next of its answers: bytes to send, something to wait for, CLOSE."""

    def __init__(self, *answers: tuple[Part, ...]) -> None:
        self.answers = deque(answers)
        self.requests: list[Received] = []
        self.arrived = trio.Event()
        self.ended: list[trio.Event] = []
        self.port = 0

    async def handle(self, stream: trio.abc.Stream) -> None:
        ended = trio.Event()
        self.ended.append(ended)
        number = len(self.ended)
        try:
            async with stream:
                await self._answer_all(stream, number)
        except (trio.BrokenResourceError, ssl.SSLError):
            pass
        finally:
            ended.set()

    async def _answer_all(self, stream: trio.abc.Stream, number: int) -> None:
        buffer = b""
        while True:
            while b"\r\n\r\n" not in buffer:
                if not (chunk := await stream.receive_some()):
                    return
                buffer += chunk
            head, _, buffer = buffer.partition(b"\r\n\r\n")
            line, *lines = head.decode("ascii").split("\r\n")
            headers = dict(one.split(": ", 1) for one in lines)
            assert len(headers) == len(lines)
            length = int(headers["Content-Length"])
            while len(buffer) < length:
                buffer += await stream.receive_some()
            self.requests.append(Received(number, line, headers, buffer[:length]))
            buffer = buffer[length:]
            self.arrived.set()
            for part in self.answers.popleft():
                if part is CLOSE:
                    return
                if isinstance(part, bytes):
                    await stream.send_all(part)
                else:
                    assert callable(part)
                    await part()

    @property
    def connections(self) -> int:
        return len(self.ended)


@asynccontextmanager
async def serving(*answers: tuple[Part, ...], tls: ssl.SSLContext | None = None) -> AsyncIterator[Service]:
    service = Service(*answers)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            if tls is None:
                serve = partial(trio.serve_tcp, service.handle, 0, host="127.0.0.1")
            else:
                serve = partial(trio.serve_ssl_over_tcp, service.handle, 0, tls, host="127.0.0.1")
            listeners = await nursery.start(serve)
            stream = listeners[0] if tls is None else listeners[0].transport_listener
            service.port = stream.socket.getsockname()[1]
            yield service
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def lane_to(
    port: int, path: str = "/hook?a=1", *, secret: str | None = SECRET, tls: ssl.SSLContext | None = None
) -> AsyncIterator[HttpLane]:
    scheme, host = ("http", "127.0.0.1") if tls is None else ("https", "localhost")
    target = Target.of(f"{scheme}://{host}:{port}{path}", secret)
    lane = HttpLane(target, clock=lambda: NOW, known_domain=lambda name: name == "jobs", tls=tls)
    try:
        yield lane
    finally:
        await lane.close()


async def one_attempt(*answer: Part) -> Ack | Retry | Reject | Unreadable:
    async with serving(answer) as service, lane_to(service.port) as lane:
        return await lane.attempt(ENVELOPE)


class TestRequest:
    async def test_head_and_body(self) -> None:
        async with serving((ok(),)) as service, lane_to(service.port) as lane:
            assert await lane.attempt(ENVELOPE) == Ack()
        (request,) = service.requests
        assert request.line == "POST /hook?a=1 HTTP/1.1"
        headers = request.headers
        assert headers["Host"] == f"127.0.0.1:{service.port}"
        assert headers["Content-Type"] == "application/json"
        assert headers["webhook-id"] == headers["Idempotency-Key"] == ENVELOPE.id
        assert headers["webhook-timestamp"] == str(int(NOW.timestamp()))
        assert headers["X-Correlation-ID"] == "c-1"
        assert headers["traceparent"] == traceparent(ENVELOPE)
        assert Webhook(SECRET).verify(request.body, headers) == json.loads(request.body)
        assert json.loads(request.body)["message"] == ENVELOPE.message

    async def test_without_a_secret_nothing_is_signed(self) -> None:
        async with serving((ok(),)) as service, lane_to(service.port, "", secret=None) as lane:
            await lane.attempt(ENVELOPE)
        (request,) = service.requests
        assert request.line == "POST / HTTP/1.1"
        assert "webhook-signature" not in request.headers

    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("https://a.example/x", ("a.example", 443, True, "/x", "a.example")),
            ("http://a.example", ("a.example", 80, False, "/", "a.example")),
            ("http://[::1]:81/?q", ("::1", 81, False, "/?q", "[::1]:81")),
        ],
    )
    def test_a_url_is_a_target(self, url: str, expected: tuple[object, ...]) -> None:
        target = Target.of(url, None).origin
        assert (target.host, target.port, target.tls, target.path, target.authority) == expected

    def test_traceparent_is_valid_and_one_trace_has_all_attempts(self) -> None:
        sent = "00-" + "a" * 32 + "-" + "b" * 16 + "-00"
        edge = replace(ENVELOPE, id="msg_" + "f" * 32)
        for envelope in (ENVELOPE, replace(ENVELOPE, traceparent=sent), edge):
            made = [traceparent(replace(envelope, attempt=attempt)) for attempt in (1, 2, 3)]
            assert len(set(made)) == 3 or envelope is edge
            assert len({one.split("-")[1] for one in made}) == 1
            for one in made:
                assert re.fullmatch(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", one)
        mine = traceparent(replace(ENVELOPE, traceparent=sent)).split("-")
        assert (mine[1], mine[3]) == ("a" * 32, "00")  # not sampled stays not sampled
        assert mine[2] != "b" * 16


class TestConnection:
    @each(
        "answer",
        [
            ok(),
            ok(b""),
            b"HTTP/1.1 204 No Content\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX-T: 1\r\n\r\n",
            b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n",
            ok(status=b"500 Oh"),
            ok(status=b"400 Bad"),
        ],
    )
    async def test_one_connection_serves_many_deliveries(self, answer: bytes) -> None:
        async with serving(*[(answer,)] * 20) as service, lane_to(service.port) as lane:
            for _ in range(20):
                await lane.attempt(ENVELOPE)
        assert [request.connection for request in service.requests] == [1] * 20

    @pytest.mark.parametrize(
        "answer",
        [
            ok(b"{}", b"Connection: close"),
            b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        ],
    )
    async def test_who_asks_to_close_gets_a_new_one(self, answer: bytes) -> None:
        async with serving((answer,), (ok(),)) as service, lane_to(service.port) as lane:
            assert await lane.attempt(ENVELOPE) == Ack()
            assert await lane.attempt(ENVELOPE) == Ack()
        assert [request.connection for request in service.requests] == [1, 2]

    async def test_closed_while_idle_costs_no_attempt(self) -> None:
        async with serving(*[(ok(), CLOSE)] * 3) as service, lane_to(service.port) as lane:
            for number in range(3):
                assert await lane.attempt(ENVELOPE) == Ack()
                await service.ended[number].wait()
        assert [request.connection for request in service.requests] == [1, 2, 3]

    async def test_words_out_of_turn_are_not_the_next_answer(self) -> None:
        said = trio.Event()

        async def say() -> None:
            said.set()

        async with (
            serving((ok(), ok(status=b"410 Gone"), say), (ok(),)) as service,
            lane_to(service.port) as lane,
        ):
            assert await lane.attempt(ENVELOPE) == Ack()
            await said.wait()
            assert await lane.attempt(ENVELOPE) == Ack()
        assert service.connections == 2

    async def test_two_answers_in_one_packet_are_one_answer(self) -> None:
        twice = ok(b'{"replies":[{"text":"a"}]}') + ok(b"gone", status=b"410 Gone")
        async with serving((twice,), (ok(),)) as service, lane_to(service.port) as lane:
            assert await lane.attempt(ENVELOPE) == Ack((Reply("a"),))
            assert await lane.attempt(ENVELOPE) == Ack()
        assert service.connections == 2

    @pytest.mark.parametrize("headers", [(), (b"Connection: close",)])
    async def test_rubbish_after_an_answer_does_not_undo_it(self, headers: tuple[bytes, ...]) -> None:
        async with (
            serving((ok(b"{}", *headers) + b"rubbish",), (ok(),)) as service,
            lane_to(service.port) as lane,
        ):
            assert await lane.attempt(ENVELOPE) == Ack()
            assert await lane.attempt(ENVELOPE) == Ack()
        assert service.connections == 2

    async def test_a_late_answer_is_never_the_next_ones(self) -> None:
        release, sent = trio.Event(), trio.Event()

        async def tell() -> None:
            sent.set()

        late = (release.wait, ok(status=b"410 Gone"), tell)
        async with serving(late, (sent.wait, ok())) as service, lane_to(service.port) as lane:
            async with trio.open_nursery() as nursery:

                async def first() -> None:
                    await lane.attempt(ENVELOPE)
                    pytest.fail("the attempt was cancelled, it has no outcome")

                nursery.start_soon(first)
                await service.arrived.wait()
                nursery.cancel_scope.cancel()
            release.set()
            assert await lane.attempt(ENVELOPE) == Ack()
        assert [request.connection for request in service.requests] == [1, 2]

    async def test_a_request_that_no_buffer_holds_arrives_whole(self) -> None:
        async with serving((ok(),), (ok(),)) as service, lane_to(service.port) as lane:
            assert await lane.attempt(LONG) == Ack()
            assert await lane.attempt(ENVELOPE) == Ack()
        assert [json.loads(request.body)["message"] for request in service.requests] == [
            LONG.message,
            ENVELOPE.message,
        ]
        assert service.connections == 1

    @pytest.mark.parametrize("read", [0, 1_000_000])
    async def test_cancelled_in_the_middle_of_a_request_it_is_closed(self, read: int) -> None:
        taken, ended = 0, trio.Event()

        async def slow(stream: trio.SocketStream) -> None:
            nonlocal taken
            while taken < read:
                taken += len(await stream.receive_some())
            arrived.set()
            await released.wait()
            while data := await stream.receive_some():
                taken += len(data)
            ended.set()

        arrived, released = trio.Event(), trio.Event()
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                [listener] = await nursery.start(partial(trio.serve_tcp, slow, 0, host="127.0.0.1"))
                async with lane_to(listener.socket.getsockname()[1]) as lane:
                    async with trio.open_nursery() as attempts:
                        attempts.start_soon(lane.attempt, LONG)
                        await arrived.wait()
                        await trio.testing.wait_all_tasks_blocked()
                        attempts.cancel_scope.cancel()
                    released.set()
                    await ended.wait()
                nursery.cancel_scope.cancel()
        assert 0 < taken < len(str(LONG.message))

    async def test_who_hangs_up_in_the_middle_of_a_request_is_retried(self) -> None:
        async def rude(stream: trio.SocketStream) -> None:
            await stream.receive_some()
            await stream.aclose()

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                [listener] = await nursery.start(partial(trio.serve_tcp, rude, 0, host="127.0.0.1"))
                async with lane_to(listener.socket.getsockname()[1]) as lane:
                    outcome = await lane.attempt(LONG)
                nursery.cancel_scope.cancel()
        assert isinstance(outcome, Retry)
        assert outcome.reason in (
            "connection failed: ConnectionResetError",
            "connection failed: BrokenPipeError",
        )

    async def test_cancelled_in_the_middle_of_an_answer_it_is_closed(self) -> None:
        half = trio.Event()

        async def halfway() -> None:
            half.set()
            await trio.sleep_forever()

        answer = ok(b'{"replies":[]}')
        async with serving((answer[:-5], halfway), (ok(),)) as service, lane_to(service.port) as lane:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lane.attempt, ENVELOPE)
                await half.wait()
                nursery.cancel_scope.cancel()
            assert await lane.attempt(ENVELOPE) == Ack()
        assert service.connections == 2

    async def test_leaving_a_lane_closes_its_connection(self) -> None:
        async with serving((ok(),)) as service:
            target = Target.of(f"http://127.0.0.1:{service.port}", None)
            async with open_lane(target, clock=lambda: NOW, known_domain=lambda name: False)() as lane:
                assert service.connections == 0
                assert await lane.attempt(ENVELOPE) == Ack()
            await service.ended[0].wait()

    async def test_nobody_listens(self) -> None:
        async with serving() as service:
            pass
        async with lane_to(service.port) as lane:
            assert await lane.attempt(ENVELOPE) == Retry(reason="connection failed: ConnectionRefusedError")


class TestAnswers:
    async def test_status(self) -> None:
        expected: dict[int, Ack | Retry | Reject] = {
            **dict.fromkeys((200, 201, 204, 299), Ack()),
            **{status: Reject(f"answered {status}") for status in (400, 410, 422)},
            **{
                status: Retry(reason=f"answered {status}")
                for statuses in (
                    (300, 301, 302, 307, 308),
                    (401, 403, 404, 405, 408, 409, 413, 429),
                    range(500, 505),
                )
                for status in statuses
            },
        }
        location = b"Location: http://127.0.0.1:1/elsewhere"
        for status, result in expected.items():
            answer = ok(b"" if status == 204 else b"{}", location, status=b"%d X" % status)
            async with serving((answer,)) as service, lane_to(service.port) as lane:
                assert await lane.attempt(ENVELOPE) == result, status
            assert len(service.requests) == 1

    @each("status", [429, 503])
    @each(
        ("value", "after"),
        [
            ("7", 7.0),
            ("0", 0.0),
            (f"{NOW + timedelta(seconds=90):%a, %d %b %Y %H:%M:%S GMT}", 90.0),
            (f"{NOW - timedelta(days=9):%a, %d %b %Y %H:%M:%S GMT}", 0.0),
            ("soon", None),
            ("", None),
        ],
    )
    async def test_retry_after(self, status: int, value: str, after: float | None) -> None:
        answer = ok(b"", b"retry-AFTER: " + value.encode(), status=b"%d X" % status)
        assert await one_attempt(answer) == Retry(after, f"answered {status}")

    async def test_retry_after_of_another_status_means_nothing(self) -> None:
        assert await one_attempt(ok(b"", b"Retry-After: 7", status=b"500 X")) == Retry(reason="answered 500")

    @pytest.mark.parametrize("size", [1, 2, 7])
    async def test_an_answer_may_come_in_pieces(self, size: int) -> None:
        answer = ok(b'{"replies":[{"text":"hi"}],"session":{"active_service":"jobs"}}', b"X-A:", b"X-B: c")
        parts: list[Part] = []
        for start in range(0, len(answer), size):
            parts += [answer[start : start + size], trio.testing.wait_all_tasks_blocked]
        result = await one_attempt(*parts)
        assert isinstance(result, Ack)
        assert result.replies == (Reply("hi"),)
        assert result.session is not None

    @pytest.mark.parametrize("pause", [True, False])
    async def test_interim_answers_are_passed_over(self, pause: bool) -> None:
        interim = b"HTTP/1.1 103 Early Hints\r\nContent-Length: 999\r\nRetry-After: 5\r\n\r\n"
        interim = interim.replace(b"Content-Length: 999\r\n", b"")
        parts: list[Part] = [b"HTTP/1.1 100 Continue\r\n\r\n" + interim, ok(b"x", status=b"503 X")]
        if pause:
            parts.insert(1, trio.testing.wait_all_tasks_blocked)
        async with serving(tuple(parts), (ok(),)) as service, lane_to(service.port) as lane:
            assert await lane.attempt(ENVELOPE) == Retry(reason="answered 503")
            assert await lane.attempt(ENVELOPE) == Ack()
        assert service.connections == 1

    async def test_a_body_may_end_with_the_connection(self) -> None:
        result = await one_attempt(b'HTTP/1.1 200 OK\r\n\r\n{"replies":[{"text":"hi"}', b"]}", CLOSE)
        assert result == Ack((Reply("hi"),))

    @pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
    async def test_an_answer_that_is_cut_off_is_none(self, close: bytes) -> None:
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n" + close + b"\r\n{  }"
        expected = Retry(reason="connection closed before the end of an answer")
        for length in (0, 3, 9, 12, 15, 17, 20, 36, 37, 38, 40, len(answer) - 1):
            assert await one_attempt(answer[:length], CLOSE) == expected, length

    async def test_a_chunked_answer_that_is_cut_off_is_none(self) -> None:
        answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
        assert await one_attempt(answer, CLOSE) == Retry(
            reason="connection closed before the end of an answer"
        )

    @each(
        "answer",
        [
            b"hello\r\n\r\n",
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"\x15\x03\x01\x00\x02\x02\x16",
            b"HTTP/1.1 abc OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
            b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n\x00",
        ],
    )
    async def test_what_is_not_http_is_a_failed_attempt(self, answer: bytes) -> None:
        async with serving((answer,), (ok(),)) as service, lane_to(service.port) as lane:
            result = await lane.attempt(ENVELOPE)
            assert isinstance(result, Retry)
            assert result.reason.startswith("not an HTTP answer")
            assert await lane.attempt(ENVELOPE) == Ack()
        assert service.connections == 2

    @pytest.mark.parametrize("framed", [True, False])
    async def test_too_large_an_answer_is_delivered_and_unreadable(self, framed: bool) -> None:
        body = b" " * (connection.MAX_ANSWER_BYTES + 200_000)
        answer = ok(body) if framed else b"HTTP/1.1 200 OK\r\n\r\n" + body
        async with serving((answer, trio.sleep_forever), (ok(),)) as service, lane_to(service.port) as lane:
            result = await lane.attempt(ENVELOPE)
            assert isinstance(result, Unreadable)
            assert "longer" in result.reason
            assert await lane.attempt(ENVELOPE) == Ack()
        assert service.connections == 2

    async def test_the_largest_answer_is_read(self) -> None:
        body = b"{}" + b" " * (connection.MAX_ANSWER_BYTES - 2)
        assert await one_attempt(ok(body)) == Ack()

    async def test_a_large_error_is_still_its_status(self) -> None:
        answer = ok(b" " * (connection.MAX_ANSWER_BYTES + 1), status=b"422 X")
        assert await one_attempt(answer) == Reject("answered 422")

    async def test_an_endless_head_ends(self) -> None:
        line = b"X-A: " + b"a" * 1000 + b"\r\n"
        result = await one_attempt(b"HTTP/1.1 200 OK\r\n" + line * 200, trio.sleep_forever)
        assert isinstance(result, Retry)
        assert "head" in result.reason

    async def test_an_unreadable_answer_keeps_the_connection(self) -> None:
        async with serving((ok(b"OK"),), (ok(),)) as service, lane_to(service.port) as lane:
            assert await lane.attempt(ENVELOPE) == Unreadable("the answer is not JSON")
            assert await lane.attempt(ENVELOPE) == Ack()
        assert service.connections == 1


class TestRetryAfter:
    @each(
        ("value", "seconds"),
        [
            (None, None),
            (" 120 ", 120.0),
            ("9" * 400, 1e9),
            ("-5", None),
            ("1.5", None),
            ("\u0661", None),
            ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", None),
            ("Mon, 01 Jan 2024 00:00:00 +99999999999999999999", None),
            ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),
            ("Sunday, 06-Nov-94 08:49:37 GMT", 0.0),
        ],
    )
    def test_seconds_or_a_date(self, value: str | None, seconds: float | None) -> None:
        assert retry_after(value, NOW) == seconds

    @given(st.one_of(texts(), patterns(r"[A-Z][a-z]{2}, \d+ Jan \d+ \d+:\d+:\d+ [+-]?\w+")))
    def test_any_value(self, value: str) -> None:
        seconds = retry_after(value, NOW)
        assert seconds is None or seconds >= 0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for localhost with its key."""
    program = shutil.which("openssl")
    if program is None and os.environ.get("CI") != "true":
        pytest.skip("the openssl command makes the certificate, and it is not installed")
    assert program is not None, "the openssl command is required here"
    file = tmp_path_factory.mktemp("tls") / "localhost.pem"
    ask = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(file), "-out", str(file) + ".crt"]
    subprocess.run([program, *ask.split(), *names], check=True, capture_output=True)
    file.write_bytes(file.read_bytes() + Path(str(file) + ".crt").read_bytes())
    return file


class TestTls:
    @staticmethod
    def server(certificate: Path) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        return context

    async def test_a_self_signed_certificate_is_refused(self, certificate: Path) -> None:
        async with serving((ok(),), tls=self.server(certificate)) as service:
            target = Target.of(f"https://localhost:{service.port}", None)
            async with open_lane(target, clock=lambda: NOW, known_domain=lambda name: False)() as lane:
                assert await lane.attempt(ENVELOPE) == Retry(
                    reason="connection failed: SSLCertVerificationError"
                )
        assert service.requests == []

    async def test_a_trusted_one_is_taken_and_the_connection_kept(self, certificate: Path) -> None:
        trusting = ssl.create_default_context(cafile=certificate)
        answers: list[tuple[Part, ...]] = [(ok(),)] * 5
        async with (
            serving(*answers, tls=self.server(certificate)) as service,
            lane_to(service.port, tls=trusting) as lane,
        ):
            for _ in range(5):
                assert await lane.attempt(ENVELOPE) == Ack()
        assert [request.connection for request in service.requests] == [1] * 5

    async def test_a_certificate_for_another_name_is_refused(self, certificate: Path) -> None:
        trusting = ssl.create_default_context(cafile=certificate)
        async with serving((ok(),), tls=self.server(certificate)) as service:
            target = Target.of(f"https://127.0.0.1:{service.port}", None)
            lane = HttpLane(target, clock=lambda: NOW, known_domain=lambda name: False, tls=trusting)
            assert await lane.attempt(ENVELOPE) == Retry(reason="connection failed: SSLCertVerificationError")
            await lane.close()
        assert service.requests == []
