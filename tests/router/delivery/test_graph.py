"""Sending through the Graph API: what is posted, and what each answer means."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import trio
from hypothesis import given
from hypothesis import strategies as st
from tables import each

from actors.messages import Later, OutboundMessage, Refused, SendOutcome, Sent
from router.config import SenderConfig
from router.delivery.connection import Response
from router.delivery.graph import body_of, open_sender, outcome_of

NOW = datetime(2030, 1, 1, tzinfo=UTC)
MESSAGE = OutboundMessage(
    id=7,
    session_key="100:250",
    phone_number_id="100",
    recipient="250780000001",
    message={"type": "text", "text": {"body": "Zoë"}},
    reference="rpl_7",
    correlation_id="c-1",
    created_at=NOW,
)


def answer(status: int, body: object = None, **headers: str) -> Response:
    response = Response()
    response.status = status
    response.fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    response.body += body if isinstance(body, bytes) else json.dumps(body).encode()
    return response


def error(code: int) -> dict[str, object]:
    return {"error": {"message": "(#0) to 250780000001", "type": "OAuthException", "code": code}}


def test_a_phone_number_and_a_user_id_are_addressed_differently() -> None:
    assert json.loads(body_of(MESSAGE)) == {
        "messaging_product": "whatsapp",
        "recipient_type": "individual",
        "to": "250780000001",
        "type": "text",
        "text": {"body": "Zoë"},
        "biz_opaque_callback_data": "rpl_7",
    }
    hidden = json.loads(body_of(replace(MESSAGE, recipient="US.13491208655302741918")))
    assert (hidden["recipient"], "to" in hidden) == ("US.13491208655302741918", False)


def test_what_the_service_wrote_cannot_change_who_gets_it() -> None:
    forged = {**MESSAGE.message, "to": "1", "messaging_product": "other", "biz_opaque_callback_data": "mine"}
    written = json.loads(body_of(replace(MESSAGE, message=forged)))
    assert (written["to"], written["messaging_product"]) == ("250780000001", "whatsapp")
    assert written["biz_opaque_callback_data"] == "mine"


@each(
    ("response", "expected"),
    [
        (answer(200, {"messages": [{"id": "wamid.1"}]}), Sent("wamid.1")),
        (answer(200, {"messages": [{"id": "wamid.1"}, {"id": "wamid.2"}]}), Sent("wamid.1")),
        (answer(201, b"no JSON"), Sent("")),
        (answer(200, {"messages": [{"id": 7}]}), Sent("")),
        (answer(400, error(100)), Refused("answered 400, error 100")),
        (answer(400, error(131047)), Refused("answered 400, error 131047")),
        (answer(400, error(131056)), Later("answered 400, error 131056", only_this_one=True)),
        (answer(429, error(131056)), Later("answered 429, error 131056", only_this_one=True)),
        (answer(429, error(130429)), Later("answered 429, error 130429")),
        (answer(400, error(130429), retry_after="7"), Later("answered 400, error 130429", 7.0)),
        (answer(401, error(190)), Later("answered 401, error 190")),
        (answer(400, error(190)), Later("answered 400, error 190")),
        (answer(404, b"<html>"), Later("answered 404")),
        (answer(422, b""), Refused("answered 422")),
        (answer(500, error(131000)), Later("answered 500, error 131000")),
        (answer(503, b"", retry_after="3"), Later("answered 503", 3.0)),
        (answer(302, b""), Later("answered 302")),
    ],
)
def test_what_an_answer_means(response: Response, expected: SendOutcome) -> None:
    assert outcome_of(response, NOW) == expected


@given(st.integers(200, 599), st.binary(max_size=60))
def test_any_answer_means_something_and_shows_nothing_of_itself(status: int, body: bytes) -> None:
    outcome = outcome_of(answer(status, body), NOW)
    if isinstance(outcome, Later | Refused):
        assert outcome.reason.startswith(f"answered {status}")
        assert len(outcome.reason) < 60


@asynccontextmanager
async def graph(*answers: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that gives these answers in turn, and the requests that it got; None left: it hangs up."""
    requests: list[bytes] = []
    left = list(answers)

    async def serve(stream: trio.SocketStream) -> None:
        # Who is cancelled closes with our answer unread, which is a reset here.
        async with stream:
            with suppress(trio.BrokenResourceError):
                while data := await stream.receive_some(65_536):
                    requests.append(bytes(data))
                    if not left:
                        return
                    await stream.send_all(left.pop(0))

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        yield f"http://127.0.0.1:{port}/v23.0/", requests
        nursery.cancel_scope.cancel()


def http(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


async def test_messages_share_a_connection() -> None:
    taken = http(b'{"messages":[{"id":"wamid.1"}]}')
    async with graph(taken, taken) as (url, requests), open_sender(url, "T0K", clock=lambda: NOW)() as sender:
        assert await sender.send(MESSAGE) == Sent("wamid.1")
        assert await sender.send(replace(MESSAGE, phone_number_id="1/../2")) == Sent("wamid.1")
    head, _, body = requests[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /v23.0/100/messages HTTP/1.1"
    assert "Authorization: Bearer T0K" in lines
    assert "X-Correlation-ID: c-1" in lines
    assert body == body_of(MESSAGE)
    assert requests[1].startswith(b"POST /v23.0/1%2F..%2F2/messages ")


async def test_what_is_not_answered_is_sent_later() -> None:
    async with graph() as (url, requests), open_sender(url, "T", clock=lambda: NOW)() as sender:
        outcome = await sender.send(MESSAGE)
        assert outcome == Later("connection closed before the end of an answer")
        assert len(requests) == 1


async def test_what_fits_no_request_is_refused_and_costs_no_attempt() -> None:
    async with graph() as (url, requests), open_sender(url, "T", clock=lambda: NOW)() as sender:
        outcome = await sender.send(replace(MESSAGE, correlation_id="c-\u2603"))
        assert outcome == Refused("it cannot be written as a request")
        assert requests == []


async def test_nobody_listens() -> None:
    async with open_sender("http://127.0.0.1:1", "T", clock=lambda: NOW)() as sender:
        assert await sender.send(MESSAGE) == Later("connection failed: ConnectionRefusedError")


async def test_cancelled_it_leaves_no_answer_for_the_next_one() -> None:
    late = http(b'{"messages":[{"id":"wamid.late"}]}')
    async with (
        graph(b"HTTP/1.1 100 Continue\r\n\r\n", late) as (url, requests),
        open_sender(url, "T", clock=lambda: NOW)() as sender,
    ):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sender.send, MESSAGE)
                with trio.fail_after(5):
                    while not requests:  # noqa: ASYNC110  # a socket fills it
                        await trio.sleep(0.001)
                scope.cancel()
        assert await sender.send(MESSAGE) == Sent("wamid.late")


def test_a_token_is_never_shown() -> None:
    assert "T0PSECRET" not in repr(SenderConfig(url="https://g", token="T0PSECRET"))
