"""A service that hangs, all the while: the others do not notice, memory stays bounded, and nothing that was
sent to it is lost: it is delivered, in order, when the service is well again. What became a dead letter is
delivered when an operator asks for it.
"""

# ruff: noqa: ASYNC110 - tables send no events

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, Plan, open_services

from router.simulator import WebhookClient

pytestmark = pytest.mark.postgres

MEGABYTE = 1_000_000


async def test_one_service_hangs_all_the_while(home: Path) -> None:
    """The hung one's attempts end after 1 s: then its breaker opens, and its messages wait in their turn."""
    sent: dict[str, float] = {}
    async with open_services() as services:
        hung = True
        services.plan = lambda sight: Plan(hang=hung and sight.domain == "insurance")
        config = kit.write_config(home, services, insurance={"timeout_ms": 1000, "deadline_ms": 2000})
        async with kit.serving(home, "--data-dir", home / "data", "--config", config) as router:
            database = Database.of(home / "data")
            client = WebhookClient(router.webhook, kit.SECRET, timeout=30)

            async def send(text: str, count: int, prefix: str) -> list[kit.Message]:
                messages = [kit.new_message(text, sender=f"999{prefix}{n % 200:06}") for n in range(count)]
                for start in range(0, count, 50):
                    for message in messages[start : start + 50]:
                        sent[message.message_id] = trio.current_time()
                    assert (await client.post(kit.body_of(*messages[start : start + 50]))).status == 200
                return messages

            stuck = await send("insurance", 1000, "001")
            rides = await send("taxi", 100, "002")
            resting = router.rss()
            stuck += await send("insurance", 2500, "001")
            rides += await send("taxi", 100, "002")
            with trio.fail_after(kit.HANGS):
                while sum(sight.domain == "rides" for sight in services.sights) < len(rides):
                    await trio.sleep(0.01)
            # All of them, while thousands wait for the hung one: a lane that hangs is no lane of theirs.
            waited = sorted(
                sight.at - sent[sight.message_id] for sight in services.sights if sight.domain == "rides"
            )
            kit.say(
                f"rides delivered after {1000 * waited[len(waited) // 2]:.0f} ms (median) "
                f"and {1000 * waited[-1]:.0f} ms (longest)"
            )
            # A conversation that waits for it still has its menu, its way out, and the other services.
            others = [kit.new_message(text, sender="999001000001") for text in ("menu", "exit", "taxi")]
            assert (await client.post(kit.body_of(*others))).status == 200
            await database.until(lambda count: count == 0)
            assert [
                row["place"]
                for row in await database.fetch(
                    "SELECT place FROM whatsapp_messages WHERE message_id = ANY ($1) ORDER BY seq",
                    [message.message_id for message in others],
                )
            ] == ["handled", "handled", "delivered"]
            grown = router.rss() - resting
            kit.say(f"memory grew by {grown / MEGABYTE:.1f} MB with 2,500 messages more that wait")
            assert grown < 30 * MEGABYTE
            middle = await database.recount()
            client.close()
            assert middle.ok, middle.problems
            assert middle.places["deferred"] == len(stuck)
            tried = len([sight for sight in services.sights if sight.domain == "insurance"])

            hung = False
            with trio.fail_after(kit.HANGS):
                while await database.value("SELECT deferred FROM delivery_tallies"):
                    await trio.sleep(0.1)
            assert await router.stop() == 0
        conservation = await database_of_a_stopped_router(home)
    assert conservation["conservation"] == "ok"
    assert conservation["places"]["delivered"] == len(stuck) + len(rides) + 1
    kit.say(f"{tried} attempts at the hung service for {len(stuck)} messages")
    assert tried < 100
    taken = [sight for sight in services.sights if sight.domain == "insurance"][tried:]
    assert kit.out_of_order(taken, stuck) == []
    assert {sight.message_id for sight in taken} == {message.message_id for message in stuck}


async def database_of_a_stopped_router(home: Path) -> dict[str, Any]:
    """`postroom check` starts the database for itself."""
    checked = await kit.postroom("check", "--json", "--data-dir", home / "data", cwd=home)
    assert checked.returncode == 0, checked.stdout
    counted: dict[str, Any] = json.loads(checked.stdout)
    return counted


async def test_dead_letters_are_listed_and_retried_under_their_old_key(home: Path) -> None:
    messages = [kit.new_message("insurance", sender=f"99900000020{n}") for n in range(3)]
    async with open_services() as services:
        broken = True
        services.plan = lambda sight: Plan(hang=broken)
        config = kit.write_config(
            home,
            services,
            insurance={"timeout_ms": 300, "deadline_ms": 700, "breaker_failures": 1_000},
        )
        common = ["--data-dir", home / "data", "--config", config]
        async with kit.serving(home, *common) as router:
            database = Database.of(home / "data")
            assert await kit.post(router.webhook, kit.body_of(*messages)) == 200
            await database.until(lambda count: count == 0)
            attempts = len(services.sights)
            assert attempts >= 3

            listed = await kit.postroom("dlq", "list", "--json", "--service", "insurance", *common, cwd=home)
            letters = json.loads(listed.stdout)
            assert [letter["message_id"] for letter in letters] == [m.message_id for m in messages]
            assert {letter["status"] for letter in letters} == {"pending"}
            assert sum(letter["attempts"] for letter in letters) == attempts
            assert "no answer within" in letters[0]["error_message"]
            shown = await kit.postroom("dlq", "list", *common, cwd=home)
            assert b"3 dead letter(s)" in shown.stdout

            broken = False
            retried = await kit.postroom("dlq", "retry", letters[0]["id"], *common, cwd=home)
            assert retried.returncode == 0, retried.stderr
            await services.until_seen(attempts + 1)
            rest = await kit.postroom("dlq", "retry", "--all", "--json", *common, cwd=home)
            assert json.loads(rest.stdout)["retried"] in (2, 3)
            await services.until_seen(attempts + 3)
            with trio.fail_after(kit.HANGS):
                while await database.fetch("SELECT 1 FROM webhook_dlq WHERE status <> 'reprocessed'"):
                    await trio.sleep(0.05)
            conservation = await database.recount()
            assert conservation.ok, conservation.problems
            assert conservation.places["delivered"] == 3
            again = await kit.postroom("dlq", "retry", letters[0]["id"], *common, cwd=home)
            assert again.returncode == 1
            assert await router.stop() == 0
    for message in messages:
        seen = services.of(message.message_id)
        assert {sight.key for sight in seen} == {seen[0].key}
        assert [sight.body["replay"] for sight in seen] == [False] * (len(seen) - 1) + [True]
    assert services.wrong == []
