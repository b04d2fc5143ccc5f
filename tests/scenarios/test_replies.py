"""Replies on their way through a running router: in order, again after a crash, never by surprise."""

# ruff: noqa: ASYNC110 - tables send no events

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, Plan, RouterProcess, Sight

from router.simulator import GraphEndpoint, GraphFaults, Taken, payloads

pytestmark = pytest.mark.postgres

TOKEN = "EAAGreplies"
PHONE = "999008000001"


@dataclass
class Place:
    """A router whose services answer each message with two replies, and the phones that get them."""

    home: Path
    graph: GraphEndpoint
    taken: list[Taken]
    database: Database
    config: Path
    services: kit.Services
    env: dict[str, str] = field(default_factory=lambda: kit.environment(GRAPH_TOKEN=TOKEN))

    def router(self, config: Path | None = None) -> RouterProcess:
        arguments = ("--data-dir", self.home / "data", "--config", config or self.config)
        return RouterProcess(self.home, *arguments, env=self.env)

    async def statuses(self) -> dict[str, int]:
        rows = await self.database.fetch("SELECT status, count(*) FROM whatsapp_outbox GROUP BY status")
        return {row["status"]: row["count"] for row in rows}

    async def until_sent(self, count: int) -> None:
        with trio.fail_after(kit.HANGS):
            while (await self.statuses()).get("sent", 0) < count:
                await trio.sleep(0.05)


def two_replies(sight: Sight) -> Plan:
    texts = [f"{sight.text} {number}" for number in (1, 2)]
    return Plan(answer=json.dumps({"replies": [{"text": text} for text in texts]}).encode())


@asynccontextmanager
async def open_place(home: Path, faults: GraphFaults | None = None) -> AsyncIterator[Place]:
    taken: list[Taken] = []
    graph = GraphEndpoint(token=TOKEN, rng=Random(5), on_taken=taken.append, faults=faults)
    async with kit.open_services() as services, trio.open_nursery() as nursery:
        services.plan = two_replies
        url = await nursery.start(graph.serve)
        sender = f'[sender]\nurl = "{url}"\ntoken_env = "GRAPH_TOKEN"\ntimeout_ms = 2000'
        config = kit.write_config(home, services, sender)
        yield Place(home, graph, taken, Database.of(home / "data"), config, services)
        nursery.cancel_scope.cancel()


async def say(router: RouterProcess, *texts: str, sender: str = PHONE) -> None:
    for text in texts:
        assert await kit.post(router.webhook, kit.body_of(kit.new_message(text, sender=sender))) == 200


def wanted(texts: list[str]) -> list[str]:
    return [f"{text} {number}" for text in texts for number in (1, 2)]


async def test_they_arrive_in_order_and_their_statuses_are_known(home: Path) -> None:
    texts = [f"taxi #{number}" for number in range(10)]
    async with open_place(home, GraphFaults(error=0.1)) as place:
        router = place.router()
        try:
            await router.ready()
            await say(router, *texts)
            await say(router, "menu")
            await place.until_sent(21)
            assert [one.text for one in place.taken[:-1]] == wanted(texts)
            assert place.taken[-1].message["type"] in ("interactive", "text")
            assert {one.recipient for one in place.taken} == {PHONE}
            known = place.taken[0]
            read = payloads.status(known.message_id, "read", 1893456000, PHONE)
            change = payloads.change(known.phone_number_id, "1555", statuses=[read])
            assert await kit.post(router.webhook, payloads.body(payloads.entry("1", change))) == 200
            outbound = await place.database.fetch(
                "SELECT message_id, place FROM whatsapp_messages WHERE direction = 'outbound'"
            )
            assert {row["message_id"]: row["place"] for row in outbound} == {
                one.message_id: "read" if one is known else "sent" for one in place.taken
            }
            assert await router.stop() == 0
        finally:
            router.end()


async def test_killed_while_they_are_sent_they_go_on_in_order(home: Path) -> None:
    texts = [f"taxi #{number}" for number in range(12)]
    async with open_place(home, GraphFaults(slow=1.0, slow_seconds=0.1)) as place:
        router = place.router()
        try:
            await router.ready()
            await say(router, *texts)
            with trio.fail_after(kit.HANGS):
                while len(place.taken) < 5:
                    await trio.sleep(0.01)
            await router.kill()
            at_the_kill = len(place.taken)
            router = place.router()
            await router.ready()
            await place.until_sent(24)
            firsts = list(dict.fromkeys(one.text for one in place.taken))
            assert firsts == wanted(texts)
            assert len({one.callback_data for one in place.taken}) == 24
            again = [one.text for one in place.taken[at_the_kill:]]
            assert again == wanted(texts)[-len(again) :]  # a suffix, in order
            assert await router.stop() == 0
        finally:
            router.end()


async def test_meta_is_away_for_a_while(home: Path) -> None:
    async with open_place(home) as place:
        router = place.router()
        try:
            await router.ready()
            place.graph.down = True
            for number in range(6):
                await say(router, f"taxi {number}", sender=f"99900800{number:04}")
            await place.database.until(lambda count: count == 0)
            with trio.fail_after(kit.HANGS):
                while True:
                    health = json.loads((await kit.get(f"{router.admin}/health"))[1])
                    if health["components"]["sender"]["status"] == "degraded":
                        break
                    await trio.sleep(0.1)
            assert health["status"] == "healthy"
            place.graph.down = False
            await place.until_sent(12)
            assert sorted(one.text for one in place.taken) == sorted(wanted([f"taxi {n}" for n in range(6)]))
            assert await router.stop() == 0
        finally:
            router.end()


async def test_what_was_answered_without_a_sender_is_never_sent(home: Path) -> None:
    async with open_place(home) as place:
        without = home / "without.toml"
        without.write_text(place.config.read_text().split("[sender]")[0])
        router = place.router(without)
        try:
            await router.ready()
            await say(router, "taxi unsent")
            await place.database.until(lambda count: count == 0)
            assert await router.stop() == 0
            router = place.router()
            await router.ready()
            await say(router, "taxi sent")
            await place.until_sent(2)
            counted = await place.database.recount()
            assert counted.replies == {"unsent": 2, "pending": 0, "sent": 2, "failed": 0}
            assert [one.text for one in place.taken] == wanted(["taxi sent"])
            assert await router.stop() == 0
        finally:
            router.end()
