"""`postroom events`: what was malformed is listed, shown, and after a fix delivered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import scenarios_kit as kit
from scenarios_kit import Database, RouterProcess

pytestmark = pytest.mark.postgres

OTHERS = "100000000000009"


async def test_what_was_malformed_is_delivered_after_a_fix(home: Path) -> None:
    """A number that another app claims, and then does not."""
    ours = kit.new_message("taxi")
    theirs = [kit.new_message("taxi", sender="999005000001", number=OTHERS) for _ in range(2)]
    secrets = {"OTHER_SECRET": "5" * 16, "OTHER_TOKEN": "verify-it"}
    other = (
        f"[apps.other]\nsecret_env = 'OTHER_SECRET'\nverify_token_env = 'OTHER_TOKEN'\nnumbers = ['{OTHERS}']"
    )
    environment = kit.environment(**secrets)
    async with kit.open_services() as services:
        config = kit.write_config(home, services, other)
        common = ("--data-dir", home / "data", "--config", config)

        async def events(*arguments: str | Path, exits: int = 0) -> Any:
            done = await kit.postroom("events", *arguments, *common, cwd=home, env=environment)
            assert done.returncode == exits, done.stderr.decode()
            return done.stdout

        router = RouterProcess(home, *common, env=environment)
        try:
            await router.ready()
            database = Database.of(home / "data")
            body = kit.body_of(ours, *theirs)
            assert await kit.post(router.webhook, body) == 200
            assert await kit.post(router.webhook, b"no JSON") == 200
            await database.until(lambda count: count == 0)
            listed = json.loads(await events("list", "--json"))
            assert [(one["malformed"], one["reasons"]) for one in listed] == [
                (1, ["unparseable"]),
                (2, ["foreign_number"]),
            ]
            identity = str(listed[1]["event_id"])
            assert await events("show", identity, "--body") == body
            assert b"foreign_number" in await events("show", identity)
            await events("show", "999", exits=1)
            await events("reparse", exits=2)
            assert b"0 of 3" in await events("reparse", "--all")
            assert await router.stop() == 0

            kit.write_config(home, services)
            router = RouterProcess(home, *common, env=environment)
            await router.ready()
            assert b"2 of 2 malformed item(s) in 1 event(s) can be read now" in await events(
                "reparse", "--all", "--reason", "foreign_number", "--dry-run"
            )
            assert len(services.sights) == 1
            told = json.loads(await events("reparse", "--all", "--json"))
            assert told == {"events": 2, "malformed": 3, "reparsed": 2}
            await services.until_seen(3)
            assert [sight.message_id for sight in services.sights[1:]] == [one.message_id for one in theirs]
            assert json.loads(await events("reparse", "--all", "--json"))["reparsed"] == 0

            # One with an id, which the ledger knows: a sender that nobody could read, until it can be.
            nameless = kit.new_message("taxi", sender="999005000002")
            nameless.json["from_"] = nameless.json.pop("from")
            value = {"metadata": {"phone_number_id": kit.NUMBERS[0]}, "messages": [nameless.json]}
            change = {"field": "messages", "value": value}
            whole = {"object": "whatsapp_business_account", "entry": [{"id": "1", "changes": [change]}]}
            assert await kit.post(router.webhook, json.dumps(whole).encode()) == 200
            assert json.loads(await events("list", "--json", "--reason", "no_sender"))[0]["malformed"] == 1
            await database.fetch(
                "UPDATE wa_events SET body = "
                "convert_to(replace(convert_from(body, 'UTF8'), 'from_', 'from'), 'UTF8')"
            )
            assert json.loads(await events("reparse", "--all", "--json"))["reparsed"] == 1
            await services.until_seen(4)
            assert services.sights[3].message_id == nameless.message_id
            assert [one["malformed"] for one in json.loads(await events("list", "--json"))] == [1]
            assert len(json.loads(await events("list", "--all", "--json"))) == 5
            await database.until(lambda count: count == 0)
            conservation = await database.recount()
            assert conservation.ok, conservation.problems
            assert conservation.places["malformed"] == 1
            assert conservation.places["delivered"] == 4
            audited, _ = await database.fetch(
                "SELECT action, object_id, detail::text FROM audit_log ORDER BY id"
            )
            assert tuple(audited) == ("events.reparse", identity, '{"items": 2}')
            assert await router.stop() == 0
        finally:
            router.end()
