"""The Graph endpoint takes each message once and in order, refuses what is wrong, and fails as it is told."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
import trio
import trio.testing
from tables import each

from router.simulator import Answer, GraphEndpoint, GraphFaults, NotAnswered, Refused, Taken, WebhookClient
from router.simulator.requests import MAX_BODY, MAX_HEAD

TOKEN = "a token"


@dataclass
class World:
    """A running endpoint and everything that it handed out."""

    taken: list[Taken] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    in_doubt: list[Taken] = field(default_factory=list)
    graph: GraphEndpoint = field(init=False)

    def client(self, path: str = "/1001/messages") -> WebhookClient:
        return WebhookClient(self.graph.url + path, "not used")

    async def send(self, *texts: str, client: WebhookClient | None = None) -> list[Answer | None]:
        """Their answers, None where none came, over one connection as long as it lasts."""
        one = client or self.client()
        answers = []
        for text in texts:
            try:
                answers.append(await post(one, written(text)))
            except NotAnswered:
                answers.append(None)
        one.close()
        return answers

    @property
    def texts(self) -> list[str]:
        return [taken.text for taken in self.taken]


def written(text: str, to: str = "999123") -> bytes:
    message = {"messaging_product": "whatsapp", "to": to, "type": "text", "text": {"body": text}}
    return json.dumps(message).encode()


async def post(client: WebhookClient, body: bytes, authorization: str = f"Bearer {TOKEN}") -> Answer:
    return await client.post(body, headers=[("Authorization", authorization)])


@asynccontextmanager
async def serving(faults: GraphFaults | None = None, seed: int = 1, **more: Any) -> AsyncIterator[World]:
    world = World()
    world.graph = GraphEndpoint(
        token=TOKEN,
        rng=Random(seed),
        on_taken=world.taken.append,
        on_refused=world.refused.append,
        on_in_doubt=world.in_doubt.append,
        faults=faults,
        **more,
    )
    async with trio.open_nursery() as nursery:
        assert await nursery.start(world.graph.serve) == world.graph.url
        yield world
        nursery.cancel_scope.cancel()


async def test_messages_are_taken_in_order_over_one_connection() -> None:
    async with serving() as world:
        answers = await world.send("one", "two", "three")
    assert world.texts == ["one", "two", "three"]
    assert [answer.status for answer in answers if answer] == [200] * 3
    for answer, taken in zip(answers, world.taken, strict=True):
        assert answer is not None
        assert json.loads(answer.body) == {
            "messaging_product": "whatsapp",
            "contacts": [{"input": "999123", "wa_id": "999123"}],
            "messages": [{"id": taken.message_id}],
        }
        assert (taken.phone_number_id, taken.recipient, taken.callback_data) == ("1001", "999123", None)
        assert taken.message == {"type": "text", "text": {"body": taken.text}}
    assert len({taken.message_id for taken in world.taken}) == 3
    assert world.refused == world.in_doubt == []


async def test_a_user_id_is_a_recipient_too() -> None:
    body = {"messaging_product": "whatsapp", "recipient": "US.13491", "type": "text", "text": {"body": "x"}}
    async with serving() as world:
        client = world.client()
        answer = await post(client, json.dumps(body).encode())
        client.close()
    assert json.loads(answer.body)["contacts"] == [{"input": "US.13491", "user_id": "US.13491"}]
    assert world.taken[0].recipient == "US.13491"
    assert world.taken[0].message_id.startswith("wamid.")


@each(
    ("path", "authorization", "body", "expected"),
    [
        ("/1001/messages", "Bearer no", written("x"), (401, 190)),
        ("/1001/messages", f"bearer {TOKEN}", written("x"), (401, 190)),
        ("/1001/messages", "", written("x"), (401, 190)),
        ("/1001/messages", f"Bearer {TOKEN}", b"{}", (400, 100)),
        ("/1001/media", f"Bearer {TOKEN}", written("x"), (404, 100)),
    ],
)
async def test_what_is_wrong_is_refused(
    path: str, authorization: str, body: bytes, expected: tuple[int, int]
) -> None:
    async with serving() as world:
        client = world.client(path)
        answer = await post(client, body, authorization)
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == expected
        client.close()
    assert world.taken == []
    known = [(one.phone_number_id, one.status, one.code) for one in world.refused]
    assert known == ([] if expected[0] == 404 else [("1001", *expected)])


@each(
    ("fault", "expected", "for_good"),
    [
        ("error", (500, 131000), False),
        ("limited", (429, 130429), False),
        ("pair_limited", (400, 131056), False),
        ("refused", (400, 131026), True),
    ],
)
async def test_refusals_as_told(fault: str, expected: tuple[int, int], for_good: bool) -> None:
    async with serving(GraphFaults(**{fault: 1.0})) as world:
        (answer,) = await world.send("x")
        assert answer is not None
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == expected
        world.graph.faults = GraphFaults()
        await world.send("y")
    assert world.texts == ["y"]
    (refused,) = world.refused
    assert (refused.recipient, refused.text, refused.status, refused.code) == ("999123", "x", *expected)
    assert refused.for_good == for_good


async def test_dropped_before_nothing_is_taken_dropped_after_it_is_and_in_doubt() -> None:
    async with serving(GraphFaults(drop_before=1.0)) as world:
        assert await world.send("x", "y") == [None, None]
        assert world.taken == world.in_doubt == []
        world.graph.faults = GraphFaults(drop_after=1.0)
        assert await world.send("x", "y") == [None, None]
    assert world.texts == ["x", "y"]
    assert world.in_doubt == world.taken
    assert world.refused == []


async def test_a_share_of_faults_is_drawn_from_the_rng() -> None:
    async def statuses(seed: int) -> list[int]:
        async with serving(GraphFaults(error=0.3, limited=0.3, drop_before=0.2), seed) as world:
            answers = await world.send(*map(str, range(40)))
        return [0 if answer is None else answer.status for answer in answers]

    one = await statuses(1)
    assert set(one) == {0, 200, 429, 500}
    assert await statuses(1) == one
    assert await statuses(2) != one


async def test_slow_answers_come_late_and_hold_up_nobody_else(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05  # leaves loopback the time to answer
    async with serving(GraphFaults(slow=1.0, slow_seconds=3.0)) as world:
        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.send, "x")
            nursery.start_soon(world.send, "y")
        assert trio.current_time() - started == pytest.approx(3.0)
    assert sorted(world.texts) == ["x", "y"]
    assert len(world.in_doubt) == 2  # their sender may have had less patience


async def test_while_down_every_connection_is_closed_the_open_ones_too() -> None:
    async with serving() as world:
        client = world.client()
        assert (await post(client, written("x"))).status == 200
        world.graph.down = True
        await trio.testing.wait_all_tasks_blocked(0.001)
        assert await world.send("y", "z", client=client) == [None, None]
        world.graph.down = False
        assert [answer and answer.status for answer in await world.send("z")] == [200]
    assert world.texts == ["x", "z"]


async def test_going_down_during_a_slow_answer_leaves_it_in_doubt() -> None:
    async with serving(GraphFaults(slow=1.0, slow_seconds=1e6)) as world, trio.open_nursery() as nursery:
        nursery.start_soon(world.send, "x")
        while not world.taken:
            await trio.testing.wait_all_tasks_blocked(0.001)
        world.graph.down = True
    assert world.in_doubt == world.taken


async def test_connections_beyond_the_bound_are_closed() -> None:
    async with serving(max_connections=1) as world:
        first = world.client()
        assert (await post(first, written("x"))).status == 200
        assert await world.send("y") == [None]
        first.close()
        await trio.testing.wait_all_tasks_blocked(0.001)
        assert [answer and answer.status for answer in await world.send("z")] == [200]


REQUEST = b"POST /v23.0/1001/messages HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a token\r\n"


@each(
    "sent",
    [
        b"GET / HTTP/1.0\r\nHost: x\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"POST  HTTP/1.1\r\nHost: x\r\n\r\n",
        REQUEST + b"\r\n",
        REQUEST.replace(b"Host: x\r\n", b"") + b"Content-Length: 2\r\n\r\n{}",
        REQUEST + b"Content-Length: -1\r\n\r\n",
        REQUEST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
        REQUEST + b"Content-Length: %d\r\n\r\n" % (MAX_BODY + 1),
        REQUEST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        REQUEST + b"no colon\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /" + b"x" * MAX_HEAD,
    ],
)
async def test_what_is_no_request_closes_its_connection_without_a_word(sent: bytes) -> None:
    async with serving() as world:
        port = int(world.graph.url.split(":")[2].split("/")[0])
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(sent)
            heard = b""
            with suppress(trio.BrokenResourceError):  # closed with bytes of ours unread
                heard = bytes(await stream.receive_some())
            assert heard == b""
    assert world.taken == world.refused == []


async def test_a_request_in_pieces_and_one_that_wants_the_connection_closed() -> None:
    body = written("x")
    request = REQUEST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    async with serving() as world:
        port = int(world.graph.url.split(":")[2].split("/")[0])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            for at in range(0, len(request), 100):
                await stream.send_all(request[at : at + 100])
                await trio.testing.wait_all_tasks_blocked()
            answer = b""
            while chunk := await stream.receive_some():
                answer += chunk
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nConnection: close\r\n" in answer
    assert world.texts == ["x"]


async def test_there_is_no_url_before_it_listens() -> None:
    graph = GraphEndpoint(token=TOKEN, rng=Random(1), on_taken=[].append)
    with pytest.raises(RuntimeError):
        _ = graph.url


@each("wrong", [{"error": 1.1}, {"slow": -0.1}, {"slow_seconds": -1.0}])
def test_faults_are_shares(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        GraphFaults(**wrong)
