"""Messages that services send, as requests: every route asks for the token, whatever comes is answered."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any

import orjson
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from tables import each
from texts import texts

from actors.errors import JournalUnavailable
from router.accept import Request, Respond, Response
from router.config import AppConfig
from router.edge.messages import MessagesApi
from router.sending import Sending, SentMessage

TOKEN = "b7c1f0b7c1f0"
GOOD = {"to": "+250788000001", "phone_number_id": "100", "text": "hello"}


class Outbox:
    """What was put there, by service and key; `away`: the database is."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self.away = False
        self.hangs = False

    async def send(self, service: str, *, key: str, request_sha256: bytes, **row: Any) -> Mapping[str, Any]:
        await self._call()
        known = self.rows.get((service, key))
        if known is not None:
            return {**known, "created": False, "is_same": known["request_sha256"] == request_sha256}
        made = {"id": len(self.rows) + 1, "status": "pending", "request_sha256": request_sha256, **row}
        self.rows[service, key] = made
        return {**made, "created": True, "is_same": True}

    async def sent(self, service: str, identity: int) -> Mapping[str, Any] | None:
        await self._call()
        for (owner, _), row in self.rows.items():
            if owner == service and row["id"] == identity:
                return {"status": "sent", "furthest": "read", "message_id": "wamid.1", "error_message": None}
        return None

    async def _call(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.hangs:
            await trio.sleep_forever()
        if self.away:
            raise JournalUnavailable("away")


class StandIn:
    """As much of a router as sends."""

    def __init__(self, numbers: tuple[str, ...] = (), *, sends: bool = True) -> None:
        self.outbox = Outbox()
        apps = (AppConfig(secret="s", verify_token="t", numbers=numbers),)
        owned = set(numbers) or {"100", "101"}
        self.sending = Sending(self.outbox, apps, is_ours=owned.__contains__, sends=sends)

    async def send(self, service: str, **said: Any) -> SentMessage:
        return await self.sending.send(service, **{"phone_number_id": None, **said})

    async def sent_message(self, service: str, identity: str) -> SentMessage | None:
        return await self.sending.sent(service, identity)


class Api:
    def __init__(self, router: StandIn, take: Callable[[Request, Respond], None]) -> None:
        self.router = router
        self._take = take

    async def ask(
        self, method: str, path: str, body: bytes = b"", **headers: str | bytes
    ) -> tuple[int, dict[str, Any], Response]:
        answers: list[Response] = []
        written = {
            name.replace("_", "-").encode(): value if isinstance(value, bytes) else value.encode()
            for name, value in headers.items()
        }
        request = Request(method.encode(), path.encode(), b"", written, body, 0.0)
        self._take(request, answers.append)
        with trio.fail_after(5):
            while not answers:
                await trio.lowlevel.checkpoint()
        [answer] = answers
        return answer.status, json.loads(answer.body), answer

    async def post(
        self, body: object, key: str = "k", token: str = TOKEN
    ) -> tuple[int, dict[str, Any], Response]:
        written = body if isinstance(body, bytes) else orjson.dumps(body)
        return await self.ask(
            "POST", "/v1/messages", written, authorization=f"Bearer {token}", idempotency_key=key
        )


@asynccontextmanager
async def opened(router: StandIn | None = None) -> AsyncIterator[Api]:
    router = router or StandIn()
    credentials = {sha256(TOKEN.encode()).hexdigest(): "rides", sha256(b"jobs").hexdigest(): "jobs"}
    api = MessagesApi(router, lambda: credentials)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        yield Api(router, await nursery.start(api.run))
        nursery.cancel_scope.cancel()


async def test_a_message_is_put_into_the_outbox_once() -> None:
    async with opened() as api:
        status, answer, _ = await api.post(GOOD)
        assert (status, answer) == (202, {"id": "rpl_1", "status": "pending"})
        row = api.router.outbox.rows["rides", "k"]
        assert (row["number"], row["recipient"]) == ("100", "250788000001")
        assert json.loads(row["payload"]) == {"type": "text", "text": {"body": "hello"}}
        assert (await api.post(dict(reversed(GOOD.items()))))[:2] == (200, answer)
        assert (await api.post({**GOOD, "text": "bye"}))[0] == 422
        assert (await api.post(GOOD, token="jobs"))[0] == 202  # keys are each service's own
        assert len(api.router.outbox.rows) == 2


async def test_what_became_of_it_is_for_its_service_only() -> None:
    async with opened() as api:
        await api.post(GOOD)
        found = await api.ask("GET", "/v1/messages/rpl_1", authorization=f"bearer {TOKEN}")
        assert found[:2] == (200, {"id": "rpl_1", "status": "read", "message_id": "wamid.1"})
        assert (await api.ask("GET", "/v1/messages/rpl_1", authorization="Bearer jobs"))[0] == 404


@each("method", ["GET", "POST", "DELETE"])
@each("path", ["/", "/v1/messages", "/v1/messages/rpl_1", "/services", "/v1/messages/../messages"])
@each("token", [None, "", "Bearer", "Bearer wrong", "Basic b7c1f0b7c1f0", f"Bearer {TOKEN}x"])
async def test_every_route_asks_for_the_token_first(method: str, path: str, token: str | None) -> None:
    async with opened() as api:
        headers = {} if token is None else {"authorization": token}
        status, answer, response = await api.ask(method, path, b"{", **headers)
        assert (status, answer["error"]) == (401, "unauthorized")
        assert b"WWW-Authenticate: Bearer" in response.fields
        assert api.router.outbox.rows == {}


async def test_where_there_is_one_number_it_need_not_be_said() -> None:
    said = {"to": "250788000001", "text": "hello"}
    async with opened(StandIn(("100",))) as api:
        assert (await api.post(said))[0] == 202
        assert (await api.post({**said, "phone_number_id": "101"}, key="l"))[1]["error"] == "phone_number_id"
    async with opened(StandIn(("100", "101"))) as api:
        assert (await api.post(said))[1]["error"] == "phone_number_id"


async def test_the_database_is_away_and_without_a_sender_nothing_is_taken() -> None:
    async with opened() as api:
        api.router.outbox.away = True
        status, answer, response = await api.post(GOOD)
        assert (status, answer["error"]) == (503, "unavailable")
        assert b"Retry-After" in response.fields
    async with opened(StandIn(sends=False)) as api:
        assert (await api.post(GOOD))[1]["error"] == "no_sender"


async def test_so_many_at_once_and_no_more() -> None:
    async with opened() as api:
        api.router.outbox.hangs = True
        late: list[Response] = []
        headers = {b"authorization": f"Bearer {TOKEN}".encode(), b"idempotency-key": b"k"}
        request = Request(b"POST", b"/v1/messages", b"", headers, orjson.dumps(GOOD), 0.0)
        for _ in range(64):
            api._take(request, late.append)
        status, answer, _ = await api.post(GOOD)
        assert (status, answer["error"]) == (503, "busy")
        assert late == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts(),
    lambda inner: st.lists(inner) | st.dictionaries(texts(), inner),
    max_leaves=8,
)
FIELDS = st.dictionaries(st.sampled_from(["to", "phone_number_id", "text", "message", "x"]), JSON)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()) | FIELDS, texts(), st.binary())
def test_whatever_comes_is_answered_and_is_no_error_of_ours(body: Any, key: str, token: bytes) -> None:
    written = body if isinstance(body, bytes) else json.dumps({**GOOD, **body}).encode()

    async def ask() -> None:
        async with opened() as api:
            status, _, _ = await api.post(written)
            assert status in (202, 400)
            headers = {"authorization": b"Bearer " + token}
            key_bytes = key.encode("utf-8", "surrogatepass")
            status, _, _ = await api.ask(
                "POST", "/v1/messages", written, idempotency_key=key_bytes, **headers
            )
            assert status == 401
            headers = {"authorization": f"Bearer {TOKEN}".encode()}
            status, _, _ = await api.ask(
                "POST", "/v1/messages", written, idempotency_key=key_bytes, **headers
            )
            assert status in (202, 200, 422, 400)

    trio.run(ask)


@pytest.mark.parametrize(
    "message", [{"type": "text", "text": {"body": "\ud800"}}, {"type": "text", "x": float("nan")}]
)
async def test_what_could_not_be_stored_as_it_is_is_refused(message: dict[str, Any]) -> None:
    async with opened() as api:
        said = {"to": "250788000001", "phone_number_id": "100", "message": message}
        status, answer, _ = await api.post(json.dumps(said).encode())
        assert (status, answer["error"]) == (400, "message")
