"""`postroom archive`: a router archives by itself; operators find, show and restore."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import scenarios_kit as kit
from scenarios_kit import Database, RouterProcess

pytestmark = pytest.mark.postgres

_AGO = "interval '70 days'"
# A week that has long ended, made by moving what was received a moment ago: nobody waits for 70 days.
_AGE = (
    "SELECT postroom_make_partitions(received_at - interval '70 days', 0) FROM wa_events LIMIT 1",
    f"UPDATE whatsapp_messages_items SET received_at = received_at - {_AGO}",
    f"UPDATE wa_events SET received_at = received_at - {_AGO}",
    f"UPDATE message_outcomes SET received_at = received_at - {_AGO}",
    f"UPDATE whatsapp_outbox SET created_at = created_at - {_AGO}",
)


async def test_what_is_past_its_retention_is_archived_and_found_again(home: Path) -> None:
    sender, other = "999005000001", "999005000002"
    async with kit.open_services() as services:
        common = ("--data-dir", home / "data", "--config", kit.write_config(home, services))

        async def archive(*arguments: str, exits: int = 0) -> Any:
            done = await kit.postroom("archive", *arguments, *common, cwd=home)
            assert done.returncode == exits, done.stderr.decode()
            return done.stderr.decode() if exits else json.loads(done.stdout)

        router = RouterProcess(home, *common)
        try:
            await router.ready()
            database = Database.of(home / "data")
            mine, theirs = kit.new_message("taxi", sender=sender), kit.new_message("taxi", sender=other)
            assert await kit.post(router.webhook, kit.body_of(mine, theirs)) == 200
            await database.until(lambda count: count == 0)
            for statement in _AGE:
                await database.fetch(statement)
            assert await archive("list", "--json") == []
            done = await kit.postroom("jobs", "run", "archive-partitions", *common, cwd=home)
            assert done.returncode == 0, done.stdout
            listed = await archive("list", "--json")
            assert [one["kind"] for one in listed] == ["events", "messages"]
            assert {one["state"] for one in listed} == {"archived"}
            name = listed[1]["name"]
            assert (await archive("show", name, "--json"))["tables"]["items"]["rows"] == 2
            assert await database.value("SELECT count(*) FROM whatsapp_messages") == 0
            assert (await kit.postroom("check", *common, cwd=home)).returncode == 0

            found = await archive("search", "--wa-id", sender, "--json")
            assert [(one["content"]["from"], one["place"], one["service"]) for one in found] == [
                (sender, "delivered", "rides")
            ]
            assert await archive("search", "--wa-id", "1", "--json") == []
            by_id = await archive("search", "--message-id", found[0]["message_id"], "--json")
            assert by_id == found

            restored = await archive("restore", name, "--json")
            assert restored[f"restored.{name}"] == 2
            assert await database.value(f'SELECT count(*) FROM restored."{name}"') == 2
            assert "there already" in await archive("restore", name, exits=1)
            assert (await archive("restore", name, "--into", "again", "--json"))[f"again.{name}"] == 2
            assert "there is no archive nothing" in await archive("restore", "nothing", exits=1)
            await archive("search", exits=2)
            assert (await kit.postroom("check", *common, cwd=home)).returncode == 0
            [table] = (home / "data/archive" / name).glob("items-*.parquet")
            table.write_bytes(table.read_bytes()[:-30])
            assert f"archive {name}" in await archive("show", name, exits=1)
            assert f"archive {name}" in await archive("restore", name, "--into", "third", exits=1)
            assert await database.value("SELECT to_regnamespace('third') IS NULL")
        finally:
            router.end()
