"""Every route verifies before it does anything else, and every request gets one answer with its headers."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from tables import each

from actors.kernel import Address
from actors.messages import Bucket, Delivery
from router.accept import ROOM_TIMEOUT, Request, Response, Webhooks
from router.channels.whatsapp import Splitter
from router.config import AppConfig
from router.simulator import payloads, signature
from router.simulator.payloads import Head

APPS = (
    AppConfig(secret="s1", secret_previous="s0", verify_token="v1"),
    AppConfig(name="second", secret="s2", verify_token="v2", numbers=("2",)),
)
PATHS = ("/webhooks/whatsapp", "/webhooks/whatsapp/second")
TRACE = b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"


def body_for(number: str) -> bytes:
    message = payloads.text_message(Head("wamid.1", "250", 1), "hi")
    return payloads.body(payloads.entry("1", payloads.change(number, "+1", messages=[message])))


BODY = body_for("1")


class Edge:
    """A router's way in, with the ingress and the answers in hand."""

    def __init__(self, *, capacity: int = 10, dedup_key: bytes | None = b"k" * 32) -> None:
        self.ingress: Address[Delivery] = Address("ingress", capacity)
        self.webhooks = Webhooks(APPS, self.ingress, dedup_key=lambda: dedup_key)
        self.answers: list[Response] = []

    @property
    def taken(self) -> list[Delivery]:
        return self.ingress.mailbox.drain_nowait()

    async def ask(
        self,
        method: bytes = b"POST",
        path: str = PATHS[0],
        *,
        query: str = "",
        body: bytes = BODY,
        **headers: str | bytes | None,
    ) -> Response | None:
        """The answer, if it was given at once. A POST is signed unless `signature` says otherwise."""
        if method == b"POST":
            headers.setdefault("x_hub_signature_256", signature("s1", body))
        written = {
            name.replace("_", "-").encode(): value if isinstance(value, bytes) else value.encode("latin-1")
            for name, value in headers.items()
            if value is not None
        }
        before = len(self.answers)
        request = Request(method, path.encode(), query.encode(), written, body, time.perf_counter())
        await self.webhooks.accept(request, self.answers.append)
        given = self.answers[before:]
        assert len(given) <= 1
        return given[0] if given else None


def headers_of(answer: Response | None) -> dict[str, str]:
    assert answer is not None
    lines = answer.fields.decode().split("\r\n")
    assert lines.pop() == ""
    made = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    assert len(made) == len(lines)
    return made


def status_of(answer: Response | None) -> int:
    assert answer is not None
    return answer.status


class TestEveryRoute:
    def test_the_paths_are_those_of_the_apps(self) -> None:
        assert Edge().webhooks.paths == PATHS

    @each("path", Edge().webhooks.paths)
    @each(
        "header",
        [
            None,
            "",
            "sha256=",
            signature("wrong", BODY),
            signature("s1", BODY + b" "),
            signature("s1", BODY).upper(),
            b"\xff\xfe",
        ],
    )
    async def test_what_is_unsigned_or_wrongly_signed_is_refused_before_it_is_read(
        self, path: str, header: str | bytes | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Splitter, "delivery", lambda *args, **more: pytest.fail("it was parsed"))
        edge = Edge(capacity=1)
        for body in (BODY, b"", b"{", b"[" * 100_000, b"\xff"):
            longer = signature("s1", body + b" ") if header == signature("s1", BODY + b" ") else header
            answer = await edge.ask(path=path, body=body, x_hub_signature_256=longer)
            assert answer is not None
            assert answer.status == 401
            assert answer.body == b'{"error":"invalid_signature"}'
            assert answer.content_type == b"application/json"
        assert edge.ingress.mailbox.put_count == 0

    @pytest.mark.parametrize(("path", "secret"), [(PATHS[0], "s2"), (PATHS[1], "s1"), (PATHS[1], "s0")])
    async def test_the_secret_of_another_app_signs_nothing(self, path: str, secret: str) -> None:
        edge = Edge()
        assert status_of(await edge.ask(path=path, x_hub_signature_256=signature(secret, BODY))) == 401
        assert edge.taken == []

    async def test_it_is_refused_also_when_nothing_could_be_stored(self) -> None:
        edge = Edge(dedup_key=None)
        edge.ingress.mailbox.close()
        assert status_of(await edge.ask(x_hub_signature_256=None)) == 401

    @pytest.mark.parametrize(("path", "secret"), [(PATHS[0], "s0"), (PATHS[0], "s1"), (PATHS[1], "s2")])
    async def test_what_is_rightly_signed_is_taken(self, path: str, secret: str) -> None:
        edge = Edge()
        assert await edge.ask(path=path, x_hub_signature_256=signature(secret, BODY)) is None
        (delivery,) = edge.taken
        assert delivery.body == BODY
        assert delivery.app == ("default" if path == PATHS[0] else "second")


class TestOtherAnswers:
    @each("path", ["/", "/webhooks", PATHS[0] + "/", PATHS[0] + "/x", "/WEBHOOKS/WHATSAPP"])
    @each("method", [b"GET", b"POST", b"PUT"])
    async def test_another_path_is_not_found(self, path: str, method: bytes) -> None:
        edge = Edge()
        answer = await edge.ask(method, path)
        assert answer is not None
        assert answer.status == 404
        assert set(json.loads(answer.body)) == {"error", "detail"}
        assert edge.taken == []

    @each("method", [b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PATCH", b"post"])
    async def test_another_method_is_not_allowed(self, method: bytes) -> None:
        edge = Edge()
        answer = await edge.ask(method)
        assert status_of(answer) == 405
        assert headers_of(answer)["allow"] == "GET, POST"
        assert edge.taken == []

    async def test_a_body_that_is_stored_is_accepted_and_one_that_is_not_is_not(self) -> None:
        edge = Edge()
        for stored, status, body in ((True, 200, b'{"status":"accepted"}'), (False, 503, None)):
            assert await edge.ask() is None
            assert edge.answers == []
            (delivery,) = edge.taken
            delivery.settle(stored)
            answer = edge.answers.pop()
            assert answer.status == status
            assert answer.body == body or set(json.loads(answer.body)) == {"error", "detail"}
            assert headers_of(answer)["x-correlation-id"] == delivery.correlation_id

    @each("body", [b"", b"{", b"[]", b'{"object":"page"}', b"\xff", b"[" * 100_000])
    async def test_a_signed_body_is_taken_whatever_it_holds(self, body: bytes) -> None:
        edge = Edge()
        assert await edge.ask(body=body) is None
        (delivery,) = edge.taken
        assert [item.bucket for item in delivery.items] == [Bucket.MALFORMED]
        assert delivery.body == body

    @each(
        ("path", "number", "reason"),
        [
            (PATHS[0], "1", None),
            (PATHS[0], "2", "foreign_number"),
            (PATHS[1], "2", None),
            (PATHS[1], "1", "foreign_number"),
        ],
    )
    async def test_an_app_signs_for_its_own_numbers_only(
        self, path: str, number: str, reason: str | None
    ) -> None:
        edge, body = Edge(), body_for(number)
        secret = "s1" if path == PATHS[0] else "s2"
        assert await edge.ask(path=path, body=body, x_hub_signature_256=signature(secret, body)) is None
        (delivery,) = edge.taken
        assert [item.reason for item in delivery.items] == [reason]


class TestHandshake:
    @staticmethod
    async def get(edge: Edge, path: str = PATHS[0], **changed: str | None) -> Response:
        asked = {"mode": "subscribe", "challenge": "1158201444", "verify_token": "v1"} | changed
        query = urlencode({f"hub.{name}": value for name, value in asked.items() if value is not None})
        answer = await edge.ask(b"GET", path, query=query)
        assert answer is not None
        return answer

    async def test_it_needs_no_signature_and_answers_the_bare_challenge(self) -> None:
        edge = Edge(dedup_key=None)
        for path, token in zip(PATHS, ("v1", "v2"), strict=True):
            answer = await self.get(edge, path, verify_token=token)
            assert answer.status == 200
            assert answer.body == b"1158201444"
            assert answer.content_type.startswith(b"text/plain")
        assert edge.taken == []

    @each(
        "changed",
        [
            {"verify_token": "v2"},
            {"verify_token": ""},
            {"verify_token": None},
            {"verify_token": "V1"},
            {"mode": "unsubscribe"},
            {"mode": None},
            {"challenge": None},
        ],
    )
    async def test_anything_else_is_forbidden(self, changed: dict[str, str | None]) -> None:
        answer = await self.get(Edge(), **changed)
        assert answer.status == 403
        assert b"1158201444" not in answer.body

    @each("query", ["", "&&&", "%", "hub.mode=subscribe", "=", "\xff", "hub.challenge=%ed%a0%80"])
    async def test_any_query_is_answered(self, query: str) -> None:
        assert status_of(await Edge().ask(b"GET", query=query)) == 403

    async def test_a_challenge_is_text_whatever_it_looks_like(self) -> None:
        answer = await self.get(Edge(), challenge="<script>é\r\n")
        assert answer.body == "<script>é\r\n".encode()
        assert answer.content_type.startswith(b"text/plain")


async def every_answer(**headers: str | bytes | None) -> dict[int, Response]:
    """One answer of every status that is decided here, to requests with these headers."""
    edge, unready = Edge(), Edge(dedup_key=None)
    token = "hub.mode=subscribe&hub.challenge=1&hub.verify_token="
    given = [
        await edge.ask(b"GET", query=token + "v1", **headers),
        await edge.ask(b"GET", query=token, **headers),
        await edge.ask(b"POST", x_hub_signature_256=None, **headers),
        await edge.ask(b"GET", "/", **headers),
        await edge.ask(b"PUT", **headers),
        await unready.ask(b"POST", **headers),
    ]
    answers = {status_of(answer): answer for answer in given if answer is not None}
    assert set(answers) == {200, 403, 401, 404, 405, 503}
    return answers


class TestHeaders:
    async def test_every_answer_has_its_ids_and_its_latency(self) -> None:
        seen = set()
        for answer in (await every_answer()).values():
            headers = headers_of(answer)
            assert re.fullmatch(r"[0-9a-f]{20}", headers["x-request-id"])
            assert headers["x-correlation-id"] == headers["x-request-id"]
            assert re.fullmatch(r"[0-9]+\.[0-9]{3}", headers["x-wa-core-latency"])
            assert 0 <= float(headers["x-wa-core-latency"]) < 5_000
            seen.add(headers["x-request-id"])
        assert len(seen) >= 5

    async def test_a_well_formed_correlation_id_is_taken(self) -> None:
        for well_formed in ("order-7:a.b_C", "x", "9" * 128):
            for answer in (await every_answer(x_correlation_id=well_formed, traceparent=TRACE)).values():
                headers = headers_of(answer)
                assert headers["x-correlation-id"] == well_formed
                assert headers["x-request-id"] != well_formed

    @each("given", ["", "a b", "a\r\nX: y", "9" * 129, b"\xff", "a;b", "a\n", "é", "<script>", '"', "\0"])
    async def test_another_is_replaced(self, given: str | bytes) -> None:
        for answer in (await every_answer(x_correlation_id=given)).values():
            headers = headers_of(answer)
            assert headers["x-correlation-id"] == headers["x-request-id"]

    async def test_a_request_id_is_made_here(self) -> None:
        for answer in (await every_answer(x_request_id="mine")).values():
            assert headers_of(answer)["x-request-id"] != "mine"

    async def test_the_trace_is_the_correlation_id_where_there_is_no_other(self) -> None:
        edge = Edge()
        await edge.ask(traceparent=TRACE)
        await edge.ask(traceparent=TRACE, x_correlation_id="c-1")
        first, second = edge.taken
        assert (first.correlation_id, first.traceparent) == ("a" * 32, TRACE.decode())
        assert (second.correlation_id, second.traceparent) == ("c-1", TRACE.decode())

    @each(
        "given",
        [
            b"",
            b"x",
            TRACE.upper(),
            TRACE.replace(b"a", b"0"),
            TRACE.replace(b"b", b"0"),
            b"01" + TRACE[2:],
            b"ff" + TRACE[2:],
            TRACE + b"-x",
            TRACE + b"\n",
            TRACE[:-1],
        ],
    )
    async def test_a_trace_that_is_none_is_not_passed_on(self, given: bytes) -> None:
        edge = Edge()
        await edge.ask(traceparent=given)
        (delivery,) = edge.taken
        assert delivery.traceparent is None
        assert delivery.correlation_id != "a" * 32

    @given(st.binary(max_size=40), st.binary(max_size=70))
    def test_no_header_breaks_an_answer(self, correlation: bytes, trace: bytes) -> None:
        async def asked() -> None:
            for answer in (await every_answer(x_correlation_id=correlation, traceparent=trace)).values():
                assert re.fullmatch(rb"([A-Za-z-]+: [\x21-\x7e, ]+\r\n)+", answer.fields)

        trio.run(asked)

    async def test_latency_counts_from_the_first_byte_to_the_answer(self) -> None:
        edge = Edge()
        request = Request(b"GET", b"/", b"", {}, b"", time.perf_counter() - 2)
        await edge.webhooks.accept(request, edge.answers.append)
        assert 2_000 <= float(headers_of(edge.answers[0])["x-wa-core-latency"]) < 7_000


class TestIngress:
    """The ingress is the only place where an answer waits for room."""

    async def test_full_it_waits_for_room(self, autojump_clock: trio.testing.MockClock) -> None:
        edge = Edge(capacity=1)
        await edge.ask()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(edge.ask)
            await trio.sleep(ROOM_TIMEOUT - 1)
            assert edge.answers == []
            assert len(edge.taken) == 1
        assert trio.current_time() == ROOM_TIMEOUT - 1
        (delivery,) = edge.taken
        delivery.settle(True)
        assert [answer.status for answer in edge.answers] == [200]

    async def test_full_for_too_long_it_is_unavailable(self, autojump_clock: trio.testing.MockClock) -> None:
        edge = Edge(capacity=1)
        await edge.ask()
        assert status_of(await edge.ask()) == 503
        assert trio.current_time() == ROOM_TIMEOUT
        assert len(edge.taken) == 1  # what was answered 503 is not stored later

    async def test_closed_it_is_unavailable_at_once(self, autojump_clock: trio.testing.MockClock) -> None:
        edge = Edge()
        edge.ingress.mailbox.close()
        assert status_of(await edge.ask()) == 503
        assert trio.current_time() == 0

    async def test_closed_while_it_waits_it_is_unavailable(
        self, autojump_clock: trio.testing.MockClock
    ) -> None:
        edge = Edge(capacity=1)
        await edge.ask()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(edge.ask)
            await trio.testing.wait_all_tasks_blocked()
            edge.ingress.mailbox.close()
        assert [answer.status for answer in edge.answers] == [503]
        assert trio.current_time() == 0

    async def test_cancelled_while_it_waits_nothing_is_stored_or_answered(self) -> None:
        edge = Edge(capacity=1)
        await edge.ask()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(edge.ask)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert edge.answers == []
        assert len(edge.taken) == 1

    async def test_what_does_not_wait_only_returns_the_wait(self) -> None:
        edge = Edge(capacity=1)
        header = signature("s1", BODY).encode()
        request = Request(b"POST", PATHS[0].encode(), b"", {b"x-hub-signature-256": header}, BODY, 0.0)
        assert edge.webhooks.accept_nowait(request, edge.answers.append) is None
        wait = edge.webhooks.accept_nowait(request, edge.answers.append)
        assert wait is not None
        assert edge.ingress.mailbox.put_count == 1
        assert len(edge.taken) == 1
        await wait()
        assert len(edge.taken) == 1
        assert edge.answers == []

    async def test_without_the_key_of_the_ledger_nothing_is_taken(self) -> None:
        edge = Edge(dedup_key=None)
        assert status_of(await edge.ask()) == 503
        assert edge.taken == []

    async def test_the_key_may_come_later(self) -> None:
        keys: list[bytes] = []
        find: Callable[[], Any] = lambda: keys[0] if keys else None  # noqa: E731
        edge = Edge()
        edge.webhooks = Webhooks(APPS, edge.ingress, dedup_key=find)
        assert status_of(await edge.ask()) == 503
        keys.append(b"k" * 32)
        assert await edge.ask() is None
        (delivery,) = edge.taken
        (item,) = Splitter("default", dedup_key=b"k" * 32, is_ours=lambda number: True).split(
            json.loads(BODY)
        )
        assert delivery.items[0].key == item.key
