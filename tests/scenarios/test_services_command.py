"""`postroom services`: each change is a version that stays, looked at before it is written, and on record."""

from __future__ import annotations

import base64
import getpass
import hashlib
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database

from router.postgres.embedded import EmbeddedPostgres

pytestmark = pytest.mark.postgres

FILE = """
[services.rides]
url = "http://127.0.0.1:9/rides"
lanes = 4
[routing]
fallback = "profile"
"""


@pytest.fixture
async def database(home: Path) -> AsyncIterator[Database]:
    """That of `home`, which runs: commands need not start it each."""
    (home / "postroom.toml").write_text(FILE)
    postgres = EmbeddedPostgres(home / "data")
    try:
        await postgres.start()
        yield Database.of(home / "data")
    finally:
        with trio.CancelScope(shield=True):
            await postgres.stop()


async def services(home: Path, *arguments: str, exits: int = 0) -> str:
    """What it printed: to standard output, or, where it fails, to standard error."""
    done = await kit.postroom("services", *arguments, "--data-dir", home / "data", cwd=home)
    assert done.returncode == exits, done.stderr.decode()
    return done.stdout.decode() if exits == 0 else done.stderr.decode()


async def said(home: Path, *arguments: str) -> Any:
    return json.loads(await services(home, *arguments, "--json"))


async def shown(home: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await services(home, "show", name))
    return found


async def refused(database: Database, statement: str, *, role: str, error: type[Exception]) -> None:
    async def attempt(connection: asyncpg.Connection) -> None:
        await connection.execute(f"SET ROLE {role}")
        with pytest.raises(error):
            await connection.execute(statement)

    await database.run(attempt)


async def test_a_service_is_changed_paused_removed_and_rolled_back(home: Path, database: Database) -> None:
    assert (await shown(home, "rides"))["version"] == 0
    assert await services(home, "history", "rides") == "it is as the configuration file has it\n"

    url = "https://rides-2.example.com/hook"
    assert (
        await services(home, "set", "rides", f"url={url}", "lanes=16", "order=strict", "--note", "a move")
        == f"rides is active, {url} (version 1)\n"
    )
    rides = await shown(home, "rides")
    assert (rides["url"], rides["lanes"], rides["order"], rides["version"]) == (url, 16, "strict", 1)
    assert rides["changed"] == {"url": url, "lanes": 16, "order": "strict"}
    assert rides["public_only"] == ["url"]

    # A setting without a value is as the file has it; another name is the same service.
    changed = await said(home, "set", "mobility", "lanes=", "timeout_ms=2500")
    assert changed == {"name": "rides", "version": 2, "state": "active", "dry_run": False}
    rides = await shown(home, "mobility")
    assert (rides["url"], rides["lanes"], rides["timeout_ms"]) == (url, 4, 2500)

    for command, state, version in (
        ("pause", "paused", 3),
        ("resume", "active", 4),
        ("drain", "draining", 5),
        ("remove", "removed", 6),
    ):
        assert await said(home, command, "rides", "--note", command) == {
            "name": "rides",
            "version": version,
            "state": state,
            "dry_run": False,
        }
    assert "rides" not in [one["name"] for one in (await said(home, "list"))["services"]]
    assert "no service 'rides'; there are: insurance, jobs" in await services(home, "show", "rides", exits=1)

    assert await services(home, "rollback", "rides", "3") == f"rides is paused, {url} (version 7)\n"
    rides = await shown(home, "rides")
    assert (rides["state"], rides["timeout_ms"], rides["version"]) == ("paused", 2500, 7)
    listed = await services(home, "list")
    assert [line.split() for line in listed.splitlines() if line.startswith("rides")] == [
        ["rides", "paused", "version", "7", url]
    ]

    history = await said(home, "history", "rides")
    assert [(one["version"], one["state"], one["note"]) for one in history] == [
        (7, "paused", "as version 3"),
        (6, "removed", "remove"),
        (5, "draining", "drain"),
        (4, "active", "resume"),
        (3, "paused", "pause"),
        (2, "active", None),
        (1, "active", "a move"),
    ]
    assert history[-1]["definition"] == {"url": url, "lanes": 16, "order": "strict"}
    assert {one["created_by"] for one in history} == {f"cli:{getpass.getuser()}"}
    last = (await services(home, "history", "rides")).splitlines()[-1]
    assert all(setting in last for setting in (f"url={url}", "lanes=16", "order=strict"))
    assert last.endswith("  # a move")

    rows = await database.fetch(
        "SELECT actor, object_type, object_id, detail::text FROM audit_log "
        "WHERE action = 'service.change' ORDER BY acted_at, id"
    )
    assert [json.loads(row["detail"])["version"] for row in rows] == list(range(1, 8))
    assert {(row["actor"], row["object_type"], row["object_id"]) for row in rows} == {
        (f"cli:{getpass.getuser()}", "service_versions", "rides")
    }


async def test_a_new_service_may_be_looked_at_before_it_is_added(home: Path, database: Database) -> None:
    settings = (
        "url=https://chess.example.com/hook",
        'keywords={en = ["chess", "rook"]}',
        "canary_url=https://canary.example.com/",
        "canary_share=0.25",
    )
    looked = await said(home, "set", "chess", *settings, "--dry-run")
    assert looked == {"name": "chess", "version": 1, "state": "active", "dry_run": True}
    assert "would be active" in await services(home, "set", "chess", *settings, "--dry-run")
    assert "no service 'chess'" in await services(home, "show", "chess", exits=1)

    await services(home, "set", "chess", *settings)
    for live in ((), ("--live",)):
        explained = await kit.postroom(
            "explain", "--text", "rook", *live, "--data-dir", home / "data", cwd=home
        )
        assert (json.loads(explained.stdout)["domain"] == "chess") is bool(live), explained.stderr
    chess = await shown(home, "chess")
    assert chess["keywords"] == {"en": ["chess", "rook"]}
    assert chess["public_only"] == ["canary_url", "url"]
    assert "canary 25% https://canary.example.com/" in await services(home, "list")
    await services(home, "set", "chess", "url=http://10.1.2.3/in", "canary_url=", "allow_private=true")
    assert (await shown(home, "chess"))["public_only"] == []


async def test_what_could_not_be_used_is_not_written_and_everything_wrong_with_it_said(
    home: Path, database: Database
) -> None:
    told = await services(
        home, "set", "rides", "lanes=0", "lanse=3", "url=ftp://a/", "timeout_ms=fast", "state=paused", exits=2
    )
    for problem in (
        "services.rides.lanes: 0 is not between 1 and 1024; fix: ",
        "services.rides.lanse: is not a setting; fix: did you mean lanes?",
        "services.rides.url: is not http:// or https://; fix: ",
        "services.rides.timeout_ms: is not a whole number; fix: ",
        "services.rides.state: does not belong into a definition; fix: use postroom services pause",
    ):
        assert problem in told
    for settings, problem in (
        (("lanes",), "'lanes' is not KEY=VALUE"),
        (("=3",), "'=3' is not KEY=VALUE"),
        (('keywords={en = ["job"]}',), "'job' is claimed by rides and by jobs"),
        (("canary_url=https://a.example/", "canary_share=0"), "services.rides.canary_share: 0"),
    ):
        assert problem in await services(home, "set", "rides", *settings, exits=2)
    assert "cannot be the name of a domain" in await services(home, "set", "Chess", "lanes=3", exits=2)
    told = await services(home, "remove", "profile", exits=2)
    assert "routing.fallback: 'profile' is not a domain" in told
    for command in ("pause", "remove", "secret", "show"):
        assert "no service 'chess'; there are: rides" in await services(home, command, "chess", exits=1)
    assert "no service 'rides 5'" in await services(home, "rollback", "rides", "5", exits=1)
    await services(home, "rollback", "rides", "0", exits=2)
    assert await database.value("SELECT count(*) FROM service_versions") == 0


async def test_a_secret_and_a_token_are_printed_once_and_nobody_reads_them(
    home: Path, database: Database
) -> None:
    secret = (await services(home, "secret", "rides")).strip()
    token = (await services(home, "token", "mobility")).strip()
    newer = (await services(home, "token", "rides")).strip()
    assert len(base64.b64decode(secret.removeprefix("whsec_"))) == 32
    assert len({token, newer}) == 2
    [row] = await database.fetch("SELECT * FROM service_secrets")
    assert (row["service"], row["secret"]) == ("rides", secret)
    assert row["token_sha256"] == hashlib.sha256(newer.encode()).hexdigest()
    everything = await database.fetch("SELECT to_jsonb(s)::text FROM service_secrets s")
    everything += await database.fetch("SELECT to_jsonb(a)::text FROM audit_log a")
    assert not any(one in row[0] for row in everything for one in (token, newer))
    rows = await database.fetch(
        "SELECT actor, object_id, detail::text FROM audit_log WHERE action = 'service.secret' ORDER BY id"
    )
    assert [json.loads(row["detail"]) for row in rows] == [
        {"changed": "secret"},
        {"changed": "token"},
        {"changed": "token"},
    ]
    assert {(row["actor"], row["object_id"]) for row in rows} == {(f"cli:{getpass.getuser()}", "rides")}
    assert not any(secret in row["detail"] for row in rows)

    printed = await services(home, "show", "rides") + await services(home, "list", "--json")
    assert not any(one in printed for one in (secret, token, newer, row["token_sha256"]))
    rides = await shown(home, "rides")
    assert (rides["signed"], rides["has_token"], rides["version"]) == (True, True, 0)

    denied = asyncpg.InsufficientPrivilegeError
    for role in ("router_reader", "router_service"):
        await refused(
            database,
            "INSERT INTO service_secrets VALUES ('a', 'b', NULL, now(), 'c')",
            role=role,
            error=denied,
        )
    await refused(database, "SELECT service FROM service_secrets", role="router_reader", error=denied)
    await refused(database, "DELETE FROM service_secrets", role="router_admin", error=denied)


async def test_versions_are_only_added_and_of_two_writers_one_writes(home: Path, database: Database) -> None:
    await services(home, "set", "rides", "lanes=2")
    now = datetime.now(UTC)

    async def add(expected: int) -> Any:
        return await database.value(
            "SELECT postroom_add_service_version($1, 'another', 'rides', $2, 'active', $3, NULL)",
            now,
            expected,
            '{"lanes": 3}',
        )

    assert await add(0) is None
    assert await add(2) is None
    assert (await shown(home, "rides"))["lanes"] == 2
    assert await add(1) == 2
    assert await add(1) is None
    assert (await shown(home, "rides"))["lanes"] == 3
    assert await database.value("SELECT count(*) FROM audit_log WHERE actor = 'another'") == 1

    for statement in (
        "UPDATE service_versions SET note = 'x'",
        "DELETE FROM service_versions",
        "TRUNCATE service_versions",
    ):
        with pytest.raises(asyncpg.PostgresError, match="only added to"):
            await database.fetch(statement)
        for role in ("router_admin", "router_service", "router_reader"):
            await refused(database, statement, role=role, error=asyncpg.InsufficientPrivilegeError)
    for role in ("router_service", "router_reader"):
        await refused(
            database,
            "INSERT INTO service_versions VALUES ('rides', 9, 'active', '{}', NULL, now(), 'me')",
            role=role,
            error=asyncpg.InsufficientPrivilegeError,
        )
    assert len(await said(home, "history", "rides")) == 2


async def test_a_version_that_was_written_by_hand_and_cannot_be_used_is_listed(
    home: Path, database: Database
) -> None:
    await services(home, "set", "rides", "lanes=2")
    await database.fetch(
        "INSERT INTO service_versions VALUES ('rides', 2, 'active', '{\"lanes\": 0}', NULL, now(), 'me')"
    )
    listed = await services(home, "list")
    assert "rides: version 2 cannot be used, and the one before it is:\n  services.rides.lanes: 0" in listed
    [unusable] = (await said(home, "list"))["unusable"]
    assert (unusable["service"], unusable["version"]) == ("rides", 2)
    rides = await shown(home, "rides")
    assert (rides["lanes"], rides["version"]) == (2, 1)
    assert "services.rides.lanes: 0" in await services(home, "pause", "rides", exits=2)
    await services(home, "set", "rides", "lanes=5")
    assert (await shown(home, "rides"))["version"] == 3
