"""`postroom erase`: one person out of many, beside a running router: tables, spool, three archives, logs."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
import scenarios_kit as kit
import trio
from occurrences import in_archives, in_files, occurrences
from scenarios_kit import Database, Message, RouterProcess

from router.postgres.binaries import find_binary
from router.postgres.embedded import EmbeddedPostgres
from router.simulator import payloads

pytestmark = pytest.mark.postgres

PERSON, NAME, SAYS = "250788111222", "Nyirahabimana", "taxi to 4711 Kimironko"
PERSONAL = (PERSON, NAME, SAYS)
_NEW = "> now() - interval '30 days'"
# What was received a moment ago becomes old: nobody waits for 140 days.
_MOVED = (
    "SELECT postroom_make_partitions(now() - $1::interval, 0)",
    f"UPDATE whatsapp_messages_items SET received_at = received_at - $1::interval WHERE received_at {_NEW}",
    f"UPDATE wa_events SET received_at = received_at - $1::interval WHERE received_at {_NEW}",
    f"UPDATE message_outcomes SET received_at = received_at - $1::interval WHERE received_at {_NEW}",
    f"UPDATE whatsapp_outbox SET created_at = created_at - $1::interval WHERE created_at {_NEW}",
)


def body_of(messages: list[Message]) -> bytes:
    contacts = [payloads.contact(NAME if one.sender == PERSON else "Ada", one.sender) for one in messages]
    change = payloads.change(
        messages[0].number, "1555", messages=[one.json for one in messages], contacts=contacts
    )
    return payloads.body(payloads.entry("1", change))


async def pg_dump(dsn: str) -> bytes:
    """All of the database as SQL."""
    done = await trio.run_process([str(find_binary("pg_dump")), dsn], capture_stdout=True)
    assert isinstance(done, subprocess.CompletedProcess)
    return bytes(done.stdout)


def logs(home: Path) -> bytes:
    """What routers and Postgres have written."""
    files = [*home.glob("serve-*"), *home.glob("*/*.log"), *home.glob("*/*/*.log")]
    assert len(files) > 2
    return b"".join(path.read_bytes() for path in files)


async def one_of(home: Path, people: int) -> None:
    postgres = EmbeddedPostgres(home / "outside")
    dsn = (await postgres.start()).dsn
    database = Database(dsn)
    environment = kit.environment(DATABASE_URL=dsn)
    rng = Random(7)
    others = [f"2507{number:08}" for number in range(people - 1)]
    async with kit.open_services() as services:
        common = ("--data-dir", home / "data", "--config", kit.write_config(home, services))
        router = RouterProcess(home, *common, "--migrate", env=environment)
        old: list[bytes] = []

        async def run(*arguments: str) -> Any:
            done = await kit.postroom(*arguments, *common, cwd=home, env=environment)
            assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()
            return json.loads(done.stdout) if "--json" in arguments else done.stdout

        async def everybody_writes() -> None:
            senders = [PERSON, *others]
            rng.shuffle(senders)
            for start in range(0, people, 100):
                said = [
                    kit.new_message(SAYS if sender == PERSON else "taxi", sender=sender)
                    for sender in senders[start : start + 100]
                ]
                body = body_of(said)
                if any(one.sender == PERSON for one in said):
                    old.append(body)
                assert await kit.post(router.webhook, body) == 200
            await database.until(lambda count: count == 0)

        async def all_but_the_person() -> list[tuple[Any, ...]]:
            found = await database.fetch(
                "SELECT i.seq, i.message_id, i.session_key, o.outcome, o.service "
                "FROM whatsapp_messages_items i LEFT JOIN message_outcomes o USING (seq, received_at) "
                "WHERE i.session_key NOT LIKE $1 ORDER BY i.seq",
                f"%{PERSON}",
            )
            return [tuple(row) for row in found]

        try:
            await router.ready()
            for days in (140, 105, 70):
                await everybody_writes()
                for statement in _MOVED:
                    await database.fetch(statement, timedelta(days=days))
            await run("jobs", "run", "archive-partitions")
            archives = [
                one["name"] for one in await run("archive", "list", "--json") if one["kind"] == "messages"
            ]
            assert len(archives) == 3
            await everybody_writes()
            await router.stop()
            # One that ended while its database was away: what it had accepted lies in its spool.
            await postgres.stop()
            router = RouterProcess(home, *common, env=environment)
            await router.ready()
            spooled = body_of(
                [kit.new_message(SAYS, sender=PERSON), kit.new_message("taxi", sender=others[0])]
            )
            assert await kit.post(router.webhook, spooled) == 200
            await router.kill()
            await postgres.start()
            router = RouterProcess(
                home, "--port", "0", *common[:1], home / "other", *common[2:], env=environment
            )
            await router.ready()
            assert in_files(home / "data" / "spool", PERSONAL) == set(PERSONAL)
            before = await all_but_the_person()

            looked = await run("erase", "--wa-id", PERSON, "--dry-run", "--json")
            assert in_archives(home / "data" / "archive", PERSONAL) == set(PERSONAL)
            told = await run("erase", "--wa-id", f"+{PERSON}", "--json")
            assert sorted(name for name in told["archives"] if name in archives) == sorted(archives)
            assert told["archives"] == looked["archives"]
            assert told["items"] == looked["items"] == 4  # the spooled one came in as erased
            await database.until(lambda count: count == 0)

            for _ in range(2):
                assert occurrences(await pg_dump(dsn), PERSONAL) == set()
                assert in_archives(home / "data" / "archive", PERSONAL) == set()
                assert in_files(home / "data" / "spool", PERSONAL) == set()
                assert occurrences(logs(home), PERSONAL) == set()
                assert [row for row in await all_but_the_person() if row[0] <= before[-1][0]] == before
                await run("check")
                for body in (*old, spooled):  # long after, and a moment after
                    assert await kit.post(router.webhook, body) == 200
                await database.until(lambda count: count == 0)
            assert (await run("erase", "--wa-id", PERSON, "--json"))["items"] == 0
            assert await router.stop() == 0
        finally:
            router.end()
            await postgres.stop()


async def test_one_person_of_many_is_erased_everywhere(home: Path) -> None:
    await one_of(home, 300)


@pytest.mark.acceptance
async def test_one_person_of_ten_thousand_is_erased_everywhere(home: Path) -> None:
    await one_of(home, 10_000)


async def test_what_is_wrong_with_the_arguments_is_said(home: Path) -> None:
    for arguments, said in (
        ((), "give one of --wa-id and --user-id"),
        (("--wa-id", "1", "--user-id", "2"), "give one of --wa-id and --user-id"),
        (("--wa-id", "+123"), "too short"),
        (("--wa-id", "250788\n111"), "characters that no name has"),
        (("--wa-id", PERSON, "--within", "-1"), "--within"),
    ):
        done = await kit.postroom("erase", *arguments, "--data-dir", home / "data", cwd=home)
        assert done.returncode == 2
        assert said in done.stderr.decode()


async def test_without_json_it_is_for_people(home: Path) -> None:
    done = await kit.postroom("erase", "--wa-id", PERSON, "--dry-run", "--data-dir", home / "data", cwd=home)
    assert done.returncode == 0, done.stderr.decode()
    assert "nothing was changed" in done.stdout.decode()
    assert PERSON not in done.stdout.decode()
    assert os.listdir(home / "data")
