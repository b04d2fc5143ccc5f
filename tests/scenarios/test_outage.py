"""Services that are down, flapping or well, under load: what waits for them is delivered in order when they
are well again, nothing is attempted for nothing, and the conversations go on meanwhile.
"""

# ruff: noqa: ASYNC110 - tables send no events

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, Message, Plan, RouterProcess, Services, Sight

from router.simulator import WebhookClient

pytestmark = pytest.mark.postgres

WORDS = {"rides": "taxi", "insurance": "insurance", "jobs": "jobs"}
FLAPPING = 3.0  # seconds up, seconds down


@dataclass
class Trouble:
    """Rides is down and strict, insurance goes up and down, jobs is well."""

    rejecting: bool = False
    over: bool = False
    attempts_while_down: int = 0

    def plan(self, sight: Sight) -> Plan:
        if self.rejecting:
            return Plan(status=422)
        if self.over or sight.domain == "jobs":
            return Plan()
        if sight.domain == "rides":
            self.attempts_while_down += 1
            return Plan(status=500)
        return Plan(status=200 if int(trio.current_time() / FLAPPING) % 2 else 503)


@dataclass
class Phones:
    """So many of them, each writing to the services in turn, and now and then for the menu or the way out."""

    count: int
    rng: Random = field(default_factory=lambda: Random(7))
    sent: list[Message] = field(default_factory=list)
    asides: list[Message] = field(default_factory=list)

    def write(self, number: int) -> list[Message]:
        written = []
        for _ in range(number):
            sender = f"9990030{self.rng.randrange(self.count):05}"
            aside = self.rng.random() < 0.1
            text = self.rng.choice(("menu", "exit") if aside else tuple(WORDS.values()))
            message = kit.new_message(text, sender=sender)
            (self.asides if aside else self.sent).append(message)
            written.append(message)
        return written


async def send(client: WebhookClient, messages: list[Message]) -> None:
    for start in range(0, len(messages), 100):
        assert (await client.post(kit.body_of(*messages[start : start + 100]))).status == 200


async def outage(home: Path, *, letters: int, phones: int, rate: int, seconds: float) -> None:
    trouble = Trouble(rejecting=True)
    async with kit.open_services() as services:
        services.plan = trouble.plan
        settings: dict[str, Mapping[str, int | str]] = {"rides": {"order": '"strict"'}}
        jobs = f'[services.jobs]\nurl = "{services.url("jobs")}"'
        config = kit.write_config(home, services, jobs, **settings)
        common = ("--data-dir", home / "data", "--config", config)
        async with kit.serving(home, *common) as router:
            database = Database.of(home / "data")
            client = WebhookClient(router.webhook, kit.SECRET, timeout=60)
            old, new = Phones(phones), Phones(phones)
            while len(old.sent) < letters:
                await send(client, old.write(100))
            await database.until(lambda count: count == 0)
            assert await database.value("SELECT count(*) FROM webhook_dlq") == len(old.sent)
            trouble.rejecting = False
            asked = await kit.postroom("dlq", "retry", "--all", "--json", *common, cwd=home)
            assert json.loads(asked.stdout)["retried"] == len(old.sent)

            begun = trio.current_time()
            ticks = int(seconds * 10)
            for tick in range(ticks):
                await send(client, new.write(rate // 10))
                await trio.sleep_until(begun + (tick + 1) / 10)
            await database.until(lambda count: count == 0)  # though two of three services cannot
            await assert_asides_were_answered(database, new.asides)
            waiting = await database.value("SELECT deferred FROM delivery_tallies")
            down_for = trio.current_time() - begun
            kit.say(
                f"{waiting} messages wait; in {down_for:.0f} s {trouble.attempts_while_down} attempts at the "
                "service that was down"
            )
            assert waiting > 0
            # Five open the breaker; the pauses are 1/2 to 1 s, 1 to 2 s ... and 15 to 30 s in the end.
            assert trouble.attempts_while_down <= 5 + 8 + 12 + down_for / 15

            trouble.over = True
            recovered = trio.current_time()
            # What failed by itself, before a breaker opened or after it closed, waits for its time, and with
            # it who waits behind it.
            await kit.postroom("dlq", "retry", "--status", "pending", "--all", *common, cwd=home)
            await until_all_are_delivered(database)
            kit.say(f"drained {trio.current_time() - recovered:.1f} s after the recovery")
            await judge(database, services, old.sent, new.sent)
            client.close()
            assert await router.stop() == 0


async def assert_asides_were_answered(database: Database, asides: list[Message]) -> None:
    places = await database.fetch(
        "SELECT place, count(*) FROM whatsapp_messages WHERE message_id = ANY ($1) GROUP BY place",
        [message.message_id for message in asides],
    )
    assert {row["place"]: row["count"] for row in places} == {"handled": len(asides)}


async def until_all_are_delivered(database: Database) -> None:
    with trio.fail_after(10 * kit.HANGS):
        while await database.value("SELECT count(*) FROM webhook_dlq WHERE status <> 'reprocessed'"):
            await trio.sleep(0.2)


async def judge(database: Database, services: Services, old: list[Message], new: list[Message]) -> None:
    """By what the services took, and by the tables."""
    conservation = await database.recount()
    assert conservation.ok, conservation.problems
    assert conservation.places["delivered"] == len(old) + len(new)
    taken = {sight.message_id for sight in services.sights}
    assert taken >= {message.message_id for message in (*old, *new)}
    for domain in ("rides", "jobs"):  # insurance fails now and then, and goes on
        sights = [sight for sight in services.sights if sight.domain == domain]
        mine = [message for message in new if kit.payloads.text_of(message.json) == WORDS[domain]]
        assert kit.out_of_order(sights, mine) == []
    [letters] = await database.fetch(
        "SELECT count(*) AS all, count(*) FILTER (WHERE service = 'rides' AND retry_count > 2) AS counted "
        "FROM webhook_dlq"
    )
    assert letters["counted"] == 0
    [runs] = await database.fetch(
        "SELECT sum(entries_processed) AS processed, sum(entries_failed) AS failed FROM dlq_processing_log"
    )
    assert runs["processed"] - runs["failed"] == letters["all"]
    assert services.wrong == []


async def test_an_outage_ends_with_everything_delivered_in_order(home: Path) -> None:
    await outage(home, letters=300, phones=50, rate=100, seconds=15)


@pytest.mark.acceptance
async def test_a_long_outage_ends_with_everything_delivered_in_order(home: Path) -> None:
    await outage(home, letters=10_000, phones=500, rate=100, seconds=600)


async def test_what_a_service_put_off_comes_by_itself(home: Path) -> None:
    """It asked for it in two seconds, which is more than its deadline."""
    message = kit.new_message("taxi")
    async with kit.open_services() as services:
        services.plan = lambda sight: Plan() if services.sights else Plan(status=503, retry_after=2)
        config = kit.write_config(home, services, rides={"timeout_ms": 500, "deadline_ms": 1000})
        async with kit.serving(home, "--data-dir", home / "data", "--config", config) as router:
            database = Database.of(home / "data")
            assert await kit.post(router.webhook, kit.body_of(message)) == 200
            await until_one_is_reprocessed(database)
            [letter] = await database.fetch("SELECT retry_count, attempts FROM webhook_dlq")
            assert dict(letter) == {"retry_count": 1, "attempts": 2}
            assert await router.stop() == 0
    first, second = services.sights
    assert second.at - first.at >= 1.9
    assert first.key == second.key
    assert (second.body["replay"], second.body["redelivered"]) == (True, True)


async def until_one_is_reprocessed(database: Database) -> None:
    with trio.fail_after(kit.HANGS):
        while not await database.fetch("SELECT FROM webhook_dlq WHERE status = 'reprocessed'"):
            await trio.sleep(0.05)


async def test_killed_while_a_retry_is_under_way_it_is_made_again(home: Path) -> None:
    messages = [kit.new_message(text, sender="999003100001") for text in ("taxi", "taxi again")]
    async with kit.open_services() as services:
        services.plan = lambda sight: Plan(status=422)
        config = kit.write_config(home, services)
        common = ("--data-dir", home / "data", "--config", config)
        router = RouterProcess(home, *common)
        try:
            await router.ready()
            database = Database.of(home / "data")
            assert await kit.post(router.webhook, kit.body_of(*messages)) == 200
            await database.until(lambda count: count == 0)
            services.plan = lambda sight: Plan(hang=True)
            assert (await kit.postroom("dlq", "retry", "--all", *common, cwd=home)).returncode == 0
            await services.until_seen(3)
            await router.kill()
            services.plan = lambda sight: Plan()
            router = RouterProcess(home, *common)
            await router.ready()
            with trio.fail_after(kit.HANGS):
                while await database.fetch("SELECT FROM webhook_dlq WHERE status <> 'reprocessed'"):
                    await trio.sleep(0.05)
            conservation = await database.recount()
            assert conservation.ok, conservation.problems
            assert await router.stop() == 0
        finally:
            router.end()
    attempts = [(sight.message_id, sight.key) for sight in services.sights]
    first, second = attempts[:2]
    assert attempts == [first, second, first, first, second]
