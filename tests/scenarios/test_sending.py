"""Services that speak later: messages that they send by themselves, and what they are told of them."""

# ruff: noqa: ASYNC110 - tables send no events

from __future__ import annotations

import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, Plan, RouterProcess, Sight

from router.simulator import GraphEndpoint, Taken, payloads

pytestmark = pytest.mark.postgres

TOKEN = "b7c1f0b7c1f0b7c1f0"
PHONE = "999008100001"
NUMBER = kit.NUMBERS[0]


@dataclass
class Place:
    """A router with a sender and a service, rides, that may send and wants to be told."""

    home: Path
    graph: GraphEndpoint
    taken: list[Taken]
    database: Database
    services: kit.Services
    port: int
    config: Path
    env: dict[str, str] = field(
        default_factory=lambda: kit.environment(GRAPH_TOKEN="EAAGsend", RIDES_TOKEN=TOKEN)
    )

    def router(self) -> RouterProcess:
        return RouterProcess(
            self.home, "--data-dir", self.home / "data", "--config", self.config, env=self.env
        )

    async def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, Any], Mapping[str, str]]:
        """One request to the port of services: status, body, headers."""
        asked = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=body, headers=asked, method=method
        )

        def ask() -> tuple[int, dict[str, Any], Mapping[str, str]]:
            try:
                with urllib.request.urlopen(request, timeout=kit.HANGS) as answer:
                    return answer.status, json.load(answer), answer.headers
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, json.load(error), error.headers

        return await trio.to_thread.run_sync(ask)

    async def send(self, text: str, key: str, to: str = PHONE) -> tuple[int, dict[str, Any]]:
        body = json.dumps({"to": to, "phone_number_id": NUMBER, "text": text}).encode()
        status, answer, _ = await self.ask(
            "POST", "/v1/messages", body, Authorization=f"Bearer {TOKEN}", Idempotency_Key=key
        )
        return status, answer

    async def became_of(self, identity: str) -> dict[str, Any]:
        status, answer, _ = await self.ask("GET", f"/v1/messages/{identity}", Authorization=f"Bearer {TOKEN}")
        assert status == 200, answer
        return answer

    async def until_taken(self, count: int) -> None:
        with trio.fail_after(kit.HANGS):
            while len(self.taken) < count:
                await trio.sleep(0.02)

    async def until_recorded(self, count: int) -> None:
        """Statuses name a message as the channel does, which is known when its sending is on record."""
        with trio.fail_after(kit.HANGS):
            while (
                await self.database.value("SELECT count(*) FROM whatsapp_outbox WHERE message_id IS NOT NULL")
                < count
            ):
                await trio.sleep(0.05)

    def told(self) -> list[tuple[str, str]]:
        """Which message, and what became of it, in the order in which the service heard it first."""
        found = [sight.body["message"]["status"] for sight in self.services.sights if is_status(sight)]
        return list(dict.fromkeys((one["id"], one["status"]) for one in found))

    async def until_told(self, count: int) -> None:
        with trio.fail_after(kit.HANGS):
            while len(self.told()) < count:
                await trio.sleep(0.02)


def is_status(sight: Sight) -> bool:
    return bool(sight.body["message"]["type"] == "status")


@asynccontextmanager
async def open_place(home: Path, *, sender: bool = True) -> AsyncIterator[Place]:
    taken: list[Taken] = []
    graph = GraphEndpoint(token="EAAGsend", rng=Random(6), on_taken=taken.append)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with kit.open_services() as services, trio.open_nursery() as nursery:
        url = await nursery.start(graph.serve)
        config = home / "scenario.toml"
        config.write_text(
            f"services_port = {port}\n"
            f'[services.rides]\nurl = "{services.url("rides")}"\ntoken_env = "RIDES_TOKEN"\nstatuses = true\n'
            + (f'[sender]\nurl = "{url}"\ntoken_env = "GRAPH_TOKEN"\ntimeout_ms = 2000\n' if sender else "")
        )
        yield Place(home, graph, taken, Database.of(home / "data"), services, port, config)
        nursery.cancel_scope.cancel()


async def say_status(router: RouterProcess, *statuses: tuple[Taken, str]) -> None:
    said = [payloads.status(one.message_id, status, 1893456000, one.recipient) for one, status in statuses]
    change = payloads.change(NUMBER, "1555", statuses=said)
    assert await kit.post(router.webhook, payloads.body(payloads.entry("1", change))) == 200


async def test_a_message_is_sent_once_and_what_becomes_of_it_is_told(home: Path) -> None:
    async with open_place(home) as place:
        place.services.plan = lambda sight: (
            Plan() if is_status(sight) else Plan(answer=b'{"replies": [{"text": "a car comes"}]}')
        )
        router = place.router()
        try:
            await router.ready()
            status, sent = await place.send("Your driver is outside", "ride-7")
            assert (status, sent["status"]) == (202, "pending")
            assert re.fullmatch(r"rpl_\d+", sent["id"])
            await place.until_recorded(1)
            assert await place.send("Your driver is outside", "ride-7") == (
                200,
                {"id": sent["id"], "status": (await place.became_of(sent["id"]))["status"]},
            )
            status, answer = await place.send("Something else", "ride-7")
            assert (status, answer["error"]) == (422, "idempotency_key_reused")
            [taken] = place.taken
            assert (taken.recipient, taken.text, taken.callback_data) == (
                PHONE, "Your driver is outside", sent["id"],
            )  # fmt: skip
            await say_status(router, (taken, "sent"))
            await say_status(router, (taken, "delivered"))
            await say_status(router, (taken, "read"), (taken, "delivered"))
            await place.until_told(3)
            assert place.told() == [(sent["id"], one) for one in ("sent", "delivered", "read")]
            became = await place.became_of(sent["id"])
            assert became == {"id": sent["id"], "status": "read", "message_id": taken.message_id}
            # The phone answers: it is the same conversation, and the reply's statuses are told as well.
            assert await kit.post(router.webhook, kit.body_of(kit.new_message("taxi", sender=PHONE))) == 200
            await place.until_taken(2)
            await place.until_recorded(2)
            await say_status(router, (place.taken[1], "delivered"))
            await place.until_told(4)
            sight = next(one for one in place.services.sights if not is_status(one))
            assert sight.body["session"]["key"] == f"{NUMBER}:{PHONE}"
            assert {one.body["session"]["key"] for one in place.services.sights} == {f"{NUMBER}:{PHONE}"}
            assert await place.database.value("SELECT count(*) FROM status_deliveries") == 0
            assert (await place.database.recount()).ok
            assert await router.stop() == 0
        finally:
            router.end()


async def test_killed_in_between_everything_is_sent_in_order_and_told(home: Path) -> None:
    async with open_place(home) as place:
        router = place.router()
        try:
            await router.ready()
            place.graph.down = True  # they wait in the outbox
            sent = [await place.send(f"part {number}", f"key-{number}") for number in range(6)]
            assert {status for status, _ in sent} == {202}
            await router.kill()
            place.graph.down = False
            place.services.plan = lambda sight: Plan(status=503)
            router = place.router()
            await router.ready()
            await place.until_recorded(6)
            firsts = list(dict.fromkeys(one.text for one in place.taken))
            assert firsts == [f"part {number}" for number in range(6)]
            known = {one.text: one for one in place.taken}
            await say_status(router, *((known[text], "delivered") for text in firsts))
            await place.until_told(1)  # it is told, and will not hear of it
            await router.kill()
            place.services.sights.clear()
            place.services.plan = lambda sight: Plan()
            router = place.router()
            await router.ready()
            await place.until_told(6)
            assert sorted(place.told()) == sorted((answer["id"], "delivered") for _, answer in sent)
            keys = {sight.key for sight in place.services.sights}
            assert len(keys) == 6
            assert all(re.fullmatch(r"sts_[0-9a-f]{32}", key) for key in keys)
            assert await router.stop() == 0
        finally:
            router.end()


async def test_what_cannot_be_sent_is_refused_with_its_reason(home: Path) -> None:
    good = {"to": PHONE, "phone_number_id": NUMBER, "text": "hello"}
    to_phone = {"to": PHONE, "phone_number_id": NUMBER}
    mine = {"Authorization": f"Bearer {TOKEN}"}
    keyed = {**mine, "Idempotency_Key": "k"}
    asked: list[tuple[str, str, dict[str, str], int, str]] = [
        ("POST", "/v1/messages", {"Idempotency_Key": "k"}, 401, "unauthorized"),
        ("POST", "/v1/messages", {**keyed, "Authorization": "Bearer wrong"}, 401, "unauthorized"),
        ("POST", "/v1/messages", {**keyed, "Authorization": f"Basic {TOKEN}"}, 401, "unauthorized"),
        ("GET", "/v1/messages/rpl_1", {}, 401, "unauthorized"),
        ("GET", "/", {}, 401, "unauthorized"),
        ("GET", "/", mine, 404, "not_found"),
        ("GET", "/v1/messages/rpl_999", mine, 404, "not_found"),
        ("GET", "/v1/messages/rpl_0x1", mine, 404, "not_found"),
        ("GET", "/v1/messages", mine, 405, "method_not_allowed"),
        ("DELETE", "/v1/messages/rpl_1", mine, 405, "method_not_allowed"),
        ("POST", "/v1/messages", mine, 400, "idempotency_key"),
        ("POST", "/v1/messages", {**mine, "Idempotency_Key": "a b"}, 400, "idempotency_key"),
        ("POST", "/v1/messages", {**mine, "Idempotency_Key": "k" * 256}, 400, "idempotency_key"),
    ]
    written: list[tuple[Any, int, str]] = [
        (b"{", 400, "body"),
        (b"[" * 30_000, 400, "body"),
        ([], 400, "body"),
        ({**good, "txt": "x"}, 400, "body"),
        ({**good, "message": {"type": "text"}}, 400, "body"),
        (to_phone, 400, "body"),
        ({**good, "to": 250}, 400, "to"),
        ({**good, "to": "25 078"}, 400, "to"),
        ({**good, "text": ""}, 400, "text"),
        ({"to": PHONE, "text": "x"}, 400, "phone_number_id"),
        ({**to_phone, "message": "x"}, 400, "message"),
        ({**to_phone, "message": {"type": 1}}, 400, "message"),
        ({**to_phone, "message": {"type": "text", "to": "1"}}, 400, "message"),
        ({**good, "text": "a\0b"}, 400, "message"),
        ({**good, "text": "x" * 70_000}, 413, "body_too_large"),
    ]
    cases = [(method, path, json.dumps(good).encode(), *rest) for method, path, *rest in asked]
    cases += [
        ("POST", "/v1/messages", one if isinstance(one, bytes) else json.dumps(one).encode(), keyed, *rest)
        for one, *rest in written
    ]
    async with open_place(home) as place:
        router = place.router()
        try:
            await router.ready()
            for method, path, body, headers, status, error in cases:
                found, answer, _ = await place.ask(method, path, body, **headers)
                assert (found, answer["error"]) == (status, error), (method, path, body, answer)
            assert await place.database.value("SELECT count(*) FROM whatsapp_outbox") == 0
            assert await router.stop() == 0
        finally:
            router.end()


async def test_without_a_sender_nothing_is_taken_that_would_never_be_sent(home: Path) -> None:
    async with open_place(home, sender=False) as place:
        router = place.router()
        try:
            await router.ready()
            status, answer = await place.send("hello", "k")
            assert (status, answer["error"]) == (503, "no_sender")
            assert await router.stop() == 0
        finally:
            router.end()


async def test_many_at_once_under_one_key_are_one_message(home: Path) -> None:
    async with open_place(home) as place:
        router = place.router()
        try:
            await router.ready()
            answers: list[tuple[int, dict[str, Any]]] = []

            async def send() -> None:
                answers.append(await place.send("only once", "same"))

            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(send)
            assert sorted(status for status, _ in answers) == [200] * 19 + [202]
            assert len({answer["id"] for _, answer in answers}) == 1
            await place.until_recorded(1)
            assert [one.text for one in place.taken] == ["only once"]
            assert await router.stop() == 0
        finally:
            router.end()
