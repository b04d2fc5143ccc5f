"""What operators do with dead letters by command line, beside a running server: what the services see of it,
what the tables say of it afterwards, and that wrong use changes nothing.
"""

# ruff: noqa: ASYNC110 - tables send no events

from __future__ import annotations

import json
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import scenarios_kit as kit
import trio
from click.testing import CliRunner, Result
from scenarios_kit import Database, Message, Plan, RouterProcess, Services, Sight

from router.cli import main

pytestmark = pytest.mark.postgres

DOWN, REJECTS = 500, 422
SHOWN = {  # of a letter, under the names of the table
    "id", "phone_number", "service", "status", "resolution", "error_message", "retry_count", "attempts",
    "revision", "next_retry_at", "created_at", "updated_at", "seq", "message_id", "session_key",
    "correlation_id",
}  # fmt: skip


@dataclass
class Desk:
    """A running router, its services and an operator's command line. `troubled` says how a service answers
    a message by its id; any other it takes.
    """

    home: Path
    common: tuple[str | Path, ...]
    router: RouterProcess
    services: Services
    database: Database
    troubled: dict[str, int] = field(default_factory=dict)

    async def dlq(self, *arguments: str | Path, exits: int = 0) -> str:
        """What one `postroom dlq` printed, a process of its own."""
        ended = await kit.postroom("dlq", *arguments, *self.common, cwd=self.home)
        assert ended.returncode == exits, f"{arguments}: {ended.stderr.decode()}"
        return ended.stdout.decode()

    async def here(self, *arguments: str | Path) -> Result:
        """The same command in this process: without the second that a start takes, for tables of cases."""
        unset = dict.fromkeys(os.environ.keys() - kit.environment().keys())
        line = ["dlq", *map(str, (*arguments, *self.common))]
        with trio.fail_after(kit.HANGS):
            return await trio.to_thread.run_sync(lambda: CliRunner(env=unset).invoke(main, line))

    async def receive(self, *messages: Message) -> None:
        """Take these in, and wait until each is a dead letter or delivered."""
        assert await kit.post(self.router.webhook, kit.body_of(*messages)) == 200
        await self.database.until(lambda count: count == 0)

    async def settled(self) -> None:
        """Wait until all that was asked for was tried."""
        with trio.fail_after(kit.HANGS):
            while await self.database.fetch(
                "SELECT FROM webhook_dlq WHERE status = 'processing' OR retry_requested_at IS NOT NULL"
            ):
                await trio.sleep(0.02)

    async def letter(self, message: Message) -> Mapping[str, Any]:
        [row] = await self.database.fetch(
            "SELECT d.*, o.outcome FROM webhook_dlq d JOIN message_outcomes o USING (seq) "
            "WHERE d.message_id = $1",
            message.message_id,
        )
        found: Mapping[str, Any] = row
        return found

    async def id_of(self, message: Message) -> str:
        return str((await self.letter(message))["id"])

    async def everything(self) -> list[Any]:
        """All that an act could change, as it stands."""

        async def read(connection: asyncpg.Connection) -> list[Any]:
            tables = ("webhook_dlq", "message_outcomes", "delivery_tallies", "audit_log")
            return [await connection.fetch(f"SELECT * FROM {table} ORDER BY 1") for table in tables]

        rows: list[Any] = await self.database.run(read)
        return rows

    def heal(self, *messages: Message) -> None:
        for message in messages:
            del self.troubled[message.message_id]

    def seen(self, message: Message) -> list[Sight]:
        return self.services.of(message.message_id)


@asynccontextmanager
async def open_desk(home: Path) -> AsyncIterator[Desk]:
    async with kit.open_services() as services:
        patient = {domain: {"breaker_failures": 1_000} for domain in kit.TEXTS}
        config = kit.write_config(home, services, **patient)
        common = ("--data-dir", home / "data", "--config", config)
        async with kit.serving(home, *common) as router:
            desk = Desk(home, common, router, services, Database.of(home / "data"))
            services.plan = lambda sight: Plan(status=desk.troubled.get(sight.message_id, 200))
            yield desk
            assert await router.stop() == 0
    assert services.wrong == []


def plain(value: Any) -> Any:
    return str(value) if isinstance(value, uuid.UUID | datetime) else value


def keys(sights: Iterable[Sight]) -> list[str]:
    return [sight.key for sight in sights]


def changed(message: Message, text: str) -> dict[str, Any]:
    return {**message.json, "text": {"body": text}}


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


# One day at the desk


async def test_what_an_operator_does_with_dead_letters(home: Path) -> None:
    ada = [kit.new_message(text, sender="999000000301") for text in ("taxi", "taxi to the airport")]
    ben = [kit.new_message("moto please", sender="999000000302")]
    cleo = [kit.new_message(text, sender="999000000303") for text in ("insurance", "my claim")]
    dan = [kit.new_message("insurance", sender="999000000304")]
    eve = [kit.new_message("assurance auto", sender="999000000305")]
    fine = [kit.new_message("a taxi that comes", sender="999000000306")]
    dead = [*ada, *ben, *cleo, *dan, *eve]
    async with open_desk(home) as desk:
        desk.troubled.update((message.message_id, REJECTS) for message in (*ada, *ben))
        desk.troubled.update((message.message_id, DOWN) for message in (*cleo, *dan, *eve))
        await desk.receive(*dead, *fine)
        for message in (*ada, *ben):
            letter = await desk.letter(message)
            assert (letter["status"], letter["resolution"], letter["attempts"]) == ("failed", "rejected", 1)
        for message in (*cleo, *dan, *eve):
            letter = await desk.letter(message)
            assert (letter["status"], letter["resolution"], letter["attempts"]) == ("pending", None, 3)
        assert len(desk.services.sights) == 3 + 4 * 3 + 1

        await each_filter_chooses_what_a_query_does(desk, dead)
        await one_is_shown_with_its_message(desk, eve[0])
        await a_dry_run_changes_nothing(desk)
        await a_letter_is_delivered_under_its_old_key(desk, ada[0])
        await what_fails_again_is_pending_again(desk, cleo[0])
        await each_edit_has_a_key_of_its_own(desk, cleo[1])
        await what_is_discarded_stays_so(desk, ben[0])
        await an_import_delivers_what_was_changed(desk, eve[0], unchanged=len(dead) - 1, then=dan[0])
        await each_filter_chooses_what_a_query_does(desk, dead)

        desk.heal(ada[1])
        counts = json.loads(await desk.dlq("retry", "--all", "--status", "failed", "--json"))
        assert counts["retried"] == 1  # the other one that failed was discarded
        await desk.settled()
        first, replay = desk.seen(ada[1])
        assert replay.key == first.key
        assert len(desk.seen(ben[0])) == 1

        # Two of these replays failed: one of cleo's first message, one of her second.
        replays = [ada[0], ada[1], cleo[0], cleo[0], cleo[1], cleo[1], dan[0], eve[0]]
        await every_replay_is_on_record(desk, processed=len(replays), failed=2)
        asked = {"dlq.retry": [ada[0], cleo[0], cleo[0], dan[0], ada[1]], "dlq.discard": ben}
        await every_act_is_on_record(desk, {**asked, "dlq.edit": [cleo[1], cleo[1], eve[0]]})

        checked = await kit.postroom("check", "--json", "--data-dir", home / "data", cwd=home)
        counted = json.loads(checked.stdout)
        assert (checked.returncode, counted["conservation"], counted["problems"]) == (0, "ok", [])
        places = {place: count for place, count in counted["places"].items() if count}
        assert places == {"delivered": len(dead) - 1 + len(fine), "discarded": 1}
        assert counted["dead_letters"] == {"pending": 0, "processing": 0, "failed": 1, "reprocessed": 6}


async def each_filter_chooses_what_a_query_does(desk: Desk, dead: list[Message]) -> None:
    """With the first of `dead` two hours old."""
    first = await desk.letter(dead[0])
    await desk.database.value(
        "UPDATE webhook_dlq SET created_at = received_at - interval '2 hours' WHERE id = $1", first["id"]
    )
    session = str(first["session_key"])
    filters: dict[tuple[str, ...], str] = {
        (): "true",
        ("--status", "pending"): "status = 'pending'",
        ("--status", "failed"): "status = 'failed'",
        ("--status", "reprocessed"): "status = 'reprocessed'",
        ("--service", "rides"): "service = 'rides'",
        ("--service", "nobody"): "false",
        ("--resolution", "rejected"): "resolution = 'rejected'",
        ("--resolution", "discarded"): "resolution = 'discarded'",
        ("--session", session): f"session_key = '{session}'",
        ("--older-than", "1h"): "created_at < now() - interval '1 hour'",
        ("--service", "rides", "--status", "failed", "--session", session): (
            f"service = 'rides' AND status = 'failed' AND session_key = '{session}'"
        ),
        ("--service", "insurance", "--limit", "3"): (
            "seq IN (SELECT seq FROM webhook_dlq WHERE service = 'insurance' ORDER BY seq LIMIT 3)"
        ),
    }
    for options, condition in filters.items():
        listed = json.loads((await desk.here("list", "--json", *options)).stdout)
        rows = await desk.database.fetch(f"SELECT * FROM webhook_dlq WHERE {condition} ORDER BY seq")
        assert listed == [{name: plain(row[name]) for name in SHOWN} for row in rows], options
        if not options:
            assert [one["message_id"] for one in listed] == [message.message_id for message in dead]


async def one_is_shown_with_its_message(desk: Desk, message: Message) -> None:
    shown = json.loads(await desk.dlq("show", await desk.id_of(message), "--json"))
    row = await desk.letter(message)
    assert shown == {name: plain(row[name]) for name in SHOWN} | {"payload": message.json}


async def a_dry_run_changes_nothing(desk: Desk) -> None:
    before, attempts = await desk.everything(), len(desk.services.sights)
    assert json.loads(await desk.dlq("retry", "--dry-run", "--all", "--json")) == {"chosen": 7, "retried": 0}
    discarding = ("discard", "--dry-run", "--all", "--service", "insurance", "--reason", "none")
    assert json.loads(await desk.dlq(*discarding, "--json")) == {"chosen": 4, "discarded": 0}
    assert await desk.everything() == before
    assert len(desk.services.sights) == attempts


async def a_letter_is_delivered_under_its_old_key(desk: Desk, message: Message) -> None:
    desk.heal(message)
    await desk.dlq("retry", await desk.id_of(message))
    await desk.settled()
    first, replay = desk.seen(message)
    assert (first.body["replay"], replay.body["replay"]) == (False, True)
    assert replay.key == first.key
    assert replay.body["message"] == message.json
    letter = await desk.letter(message)
    assert (letter["status"], letter["resolution"]) == ("reprocessed", "reprocessed")
    assert (letter["outcome"], letter["attempts"]) == ("delivered", 2)
    await refused(desk, "retry", message)
    await refused(desk, "retry", message, "--dry-run")
    await refused(desk, "discard", message, "--reason", "too late")


async def what_fails_again_is_pending_again(desk: Desk, message: Message) -> None:
    await desk.dlq("retry", await desk.id_of(message))
    await desk.settled()
    letter = await desk.letter(message)
    assert (letter["status"], letter["resolution"], letter["retry_count"]) == ("pending", None, 1)
    assert (letter["outcome"], letter["attempts"]) == ("dead_letter", 6)
    assert letter["next_retry_at"] > letter["updated_at"]
    desk.heal(message)
    await desk.dlq("retry", await desk.id_of(message))
    await desk.settled()
    seen = desk.seen(message)
    assert keys(seen) == [seen[0].key] * 7
    assert [sight.body["replay"] for sight in seen] == [False] * 3 + [True] * 4
    letter = await desk.letter(message)
    assert (letter["status"], letter["outcome"], letter["attempts"]) == ("reprocessed", "delivered", 7)


async def each_edit_has_a_key_of_its_own(desk: Desk, message: Message) -> None:
    identity = await desk.id_of(message)
    first, second = changed(message, "my claim of monday"), changed(message, "my claim of tuesday")
    file = write_json(desk.home / "message.json", first)
    assert "edit 1 " in await desk.dlq("edit", identity, "--message", file)
    await desk.settled()
    assert (await desk.letter(message))["status"] == "pending"
    unchanged = await desk.dlq("edit", identity, "--message", file)
    assert "nothing was changed" in unchanged
    desk.heal(message)
    write_json(file, second)
    assert "edit 2 " in await desk.dlq("edit", identity, "--message", file)
    await desk.settled()
    seen = desk.seen(message)
    key = seen[0].key
    assert keys(seen) == [key] * 3 + [f"{key}_r1"] * 3 + [f"{key}_r2"]
    assert [sight.body["message"] for sight in seen] == [message.json] * 3 + [first] * 3 + [second]
    assert [sight.body["replay"] for sight in seen] == [False] * 3 + [True] * 4
    letter = await desk.letter(message)
    assert (letter["status"], letter["revision"], json.loads(letter["payload"])) == ("reprocessed", 2, second)
    before = await desk.everything()
    await desk.dlq("edit", identity, "--message", write_json(file, first), exits=1)
    assert await desk.everything() == before


async def what_is_discarded_stays_so(desk: Desk, message: Message) -> None:
    await desk.dlq("discard", await desk.id_of(message), "--reason", "the campaign is over")
    letter = await desk.letter(message)
    assert (letter["status"], letter["resolution"], letter["outcome"]) == ("failed", "discarded", "discarded")
    desk.heal(message)
    await refused(desk, "retry", message)
    await refused(desk, "discard", message, "--reason", "twice")
    file = write_json(desk.home / "message.json", changed(message, "after all"))
    await refused(desk, "edit", message, "--message", file)


async def an_import_delivers_what_was_changed(
    desk: Desk, message: Message, *, unchanged: int, then: Message
) -> None:
    """`then` is retried after the second import: whatever that asked for was tried before it ends."""
    file = desk.home / "letters.jsonl"
    await desk.dlq("export", "--output", file)
    exported = [json.loads(line) for line in file.read_text().splitlines()]
    rows = await desk.database.fetch("SELECT * FROM webhook_dlq ORDER BY seq")
    assert exported == [
        {name: plain(row[name]) for name in SHOWN} | {"payload": json.loads(row["payload"])} for row in rows
    ]
    for letter in exported:
        if letter["message_id"] == message.message_id:
            letter["payload"]["text"]["body"] = "assurance de la voiture"
    file.write_text("".join(json.dumps(letter) + "\n" for letter in exported))
    desk.heal(message)
    others = [sight for sight in desk.services.sights if sight.message_id != message.message_id]
    nothing = {"edited": 0, "unchanged": unchanged, "refused": 0, "unknown": 0}

    before = await desk.everything()
    assert json.loads(await desk.dlq("import", file, "--dry-run", "--json")) == {**nothing, "edited": 1}
    assert await desk.everything() == before
    assert json.loads(await desk.dlq("import", file, "--json")) == {**nothing, "edited": 1}
    await desk.settled()
    seen = desk.seen(message)
    assert keys(seen) == [seen[0].key] * 3 + [f"{seen[0].key}_r1"]
    assert seen[-1].text == "assurance de la voiture"
    assert (await desk.letter(message))["status"] == "reprocessed"

    before = await desk.everything()
    again = json.loads(await desk.dlq("import", file, "--json"))
    assert again == {**nothing, "unchanged": unchanged + 1}
    assert await desk.everything() == before
    assert [sight for sight in desk.services.sights if sight.message_id != message.message_id] == others
    desk.heal(then)
    await desk.dlq("retry", await desk.id_of(then))
    await desk.settled()
    assert keys(desk.seen(then)) == [desk.seen(then)[0].key] * 4
    assert len(desk.seen(message)) == 4


async def refused(desk: Desk, act: str, message: Message, *options: str | Path) -> None:
    """One that is done: the act fails, and nothing is otherwise than before."""
    before = await desk.everything()
    await desk.dlq(act, await desk.id_of(message), *options, exits=1)
    assert await desk.everything() == before


async def every_replay_is_on_record(desk: Desk, *, processed: int, failed: int) -> None:
    """A run puts its row there after its letters; another one adds nothing to the sums."""

    async def sums() -> tuple[int, int, int]:
        [row] = await desk.database.fetch(
            "SELECT count(*), coalesce(sum(entries_processed), 0), coalesce(sum(entries_failed), 0) "
            "FROM dlq_processing_log"
        )
        return tuple(row)

    async def until(holds: Callable[[tuple[int, int, int]], bool]) -> tuple[int, int, int]:
        with trio.fail_after(kit.HANGS):
            while not holds(found := await sums()):
                await trio.sleep(0.02)
        return found

    runs, _, _ = await until(lambda found: found[1] >= processed)
    await desk.database.value("SELECT process_dlq_entries()")
    _, *counted = await until(lambda found: found[0] > runs)
    assert counted == [processed, failed]
    assert await desk.database.value("SELECT bool_and(status = 'completed') FROM dlq_processing_log")


async def every_act_is_on_record(desk: Desk, acts: Mapping[str, list[Message]]) -> None:
    rows = await desk.database.fetch(
        "SELECT actor, action, object_type, object_id, detail FROM audit_log ORDER BY id"
    )
    for action, messages in acts.items():
        found = [row["object_id"] for row in rows if row["action"] == action]
        assert found == [await desk.id_of(message) for message in messages], action
    assert len(rows) == sum(map(len, acts.values()))
    assert all(row["actor"].startswith("cli") and row["object_type"] == "webhook_dlq" for row in rows)
    details = [(row["action"], json.loads(row["detail"])) for row in rows if row["action"] != "dlq.retry"]
    assert details == [
        ("dlq.edit", {"revision": 1}),
        ("dlq.edit", {"revision": 2}),
        ("dlq.discard", {"reason": "the campaign is over"}),
        ("dlq.edit", {"revision": 1}),
    ]


# Many at once


async def test_a_rate_spreads_the_letters_and_reaches_all(home: Path) -> None:
    messages = [
        kit.new_message(text, sender=f"99900000040{n}")
        for n in range(5)
        for text in ("taxi", "taxi to the airport")
    ]
    async with open_desk(home) as desk:
        desk.troubled.update((message.message_id, REJECTS) for message in messages)
        await desk.receive(*messages)
        desk.heal(*messages)
        attempts = len(desk.services.sights)
        counts = json.loads(await desk.dlq("retry", "--all", "--rate", "5", "--json"))
        assert counts == {"chosen": 10, "retried": 10}
        await desk.settled()
        letters = [await desk.letter(message) for message in messages]
        assert {letter["status"] for letter in letters} == {"reprocessed"}
        replayed = [sight.message_id for sight in desk.services.sights[attempts:]]
        assert sorted(replayed) == sorted(message.message_id for message in messages)
        for first, second in zip(messages[::2], messages[1::2], strict=True):
            assert replayed.index(first.message_id) < replayed.index(second.message_id)
        # Nine pauses of 0.2 s, however slow the machine is.
        took = await desk.database.value("SELECT max(acted_at) - min(acted_at) FROM audit_log")
        assert took.total_seconds() >= 1.5


# Wrong use


async def test_wrong_use_names_what_is_wrong_and_changes_nothing(home: Path) -> None:
    messages = [kit.new_message("taxi", sender=f"99900000050{n}") for n in range(2)]
    nobody = "5f0c7d4e-0000-4000-8000-000000000001"
    async with open_desk(home) as desk:
        desk.troubled.update((message.message_id, REJECTS) for message in messages)
        await desk.receive(*messages)
        desk.heal(*messages)
        one = await desk.id_of(messages[0])
        before, attempts = await desk.everything(), len(desk.services.sights)

        # Each file begins with a letter that could be imported: it is not, as another line is wrong.
        payload = changed(messages[0], "a cab")
        good = json.dumps({"id": one, "payload": payload})
        other = await desk.id_of(messages[1])

        def file(name: str, content: str | bytes) -> Path:
            path = home / name
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            return path

        def lines(name: str, second: str | bytes) -> Path:
            return file(
                name, good.encode() + b"\n" + (second if isinstance(second, bytes) else second.encode())
            )

        wrong: list[tuple[tuple[str | Path, ...], int, str]] = [
            (("retry",), 2, "name the ids, or say --all"),
            (("retry", one, "--all"), 2, "name the ids, or say --all"),
            (("retry", "5f0c"), 2, "'5f0c' is not a valid UUID"),
            (("retry", nobody), 1, "1 of 1 are not there"),
            (("retry", "--all", "--older-than", "soon"), 2, "'soon' is not a time span"),
            (("retry", "--all", "--older-than", "3"), 2, "'3' is not a time span"),
            (("retry", "--all", "--older-than", "999999999w"), 2, "999999999w is too long"),
            (("retry", "--all", "--older-than", "99999999d"), 2, "before the calendar begins"),
            (("retry", "--all", "--status", "lost"), 2, "'lost' is not one of"),
            (("retry", "--all", "--rate", "0"), 2, "--rate"),
            (("discard", "--all"), 2, "--reason"),
            (("discard", "--reason", "none"), 2, "name the ids, or say --all"),
            (("discard", nobody, "--reason", "none"), 1, "1 of 1 are not there"),
            (("list", "--limit", "0"), 2, "--limit"),
            (("show", nobody), 1, f"there is no dead letter {nobody}"),
            (("edit", nobody, "--message", file("new.json", json.dumps(payload))), 1, nobody),
            (("edit", one, "--message", home / "absent.json"), 2, "absent.json"),
            (("edit", one, "--message", file("text.json", "taxi")), 1, "the message cannot be taken"),
            (("edit", one, "--message", file("list.json", "[]")), 1, "the message is not a message"),
            (("edit", one, "--message", file("untyped.json", '{"text": {"body": "taxi"}}')), 1, '"type"'),
            (("edit", one, "--message", file("numbered.json", '{"type": 1}')), 1, '"type"'),
            (
                ("edit", one, "--message", file("latin.json", "caf\u00e9".encode("latin-1"))),
                1,
                "the message is not UTF-8",
            ),
            (
                (
                    "edit",
                    one,
                    "--message",
                    file("deep.json", '{"type":"text","y":' + "[" * 500 + "]" * 500 + "}"),
                ),
                1,
                "the message cannot be taken",
            ),
            (("list", "--service", "\udcff"), 2, "--service"),
            (("discard", one, "--reason", "\udcff"), 2, "--reason"),
            (("import", home / "absent.jsonl"), 2, "absent.jsonl"),
            (("import", lines("text.jsonl", "taxi")), 1, "line 2 is not a dead letter"),
            (("import", lines("list.jsonl", "[]")), 1, "line 2 is not a dead letter"),
            (("import", lines("anonymous.jsonl", json.dumps({"payload": payload}))), 1, "line 2 "),
            (
                ("import", lines("misnamed.jsonl", json.dumps({"id": "5f0c", "payload": payload}))),
                1,
                "line 2 ",
            ),
            (("import", lines("numbered.jsonl", json.dumps({"id": 7, "payload": payload}))), 1, "line 2 "),
            (("import", lines("empty.jsonl", json.dumps({"id": other}))), 1, "line 2 "),
            (("import", lines("null.jsonl", json.dumps({"id": other, "payload": None}))), 1, "line 2 "),
            (("import", lines("untyped.jsonl", json.dumps({"id": other, "payload": {}}))), 1, '"type"'),
            (("import", lines("latin.jsonl", "caf\u00e9".encode("latin-1"))), 1, "the file is not UTF-8"),
        ]
        for arguments, status, says in wrong:
            ended = await desk.here(*arguments)
            expected = isinstance(ended.exception, SystemExit)  # anything else is a traceback for its user
            assert (ended.exit_code, expected) == (status, True), (arguments, ended.exception)
            assert says in ended.output, (arguments, ended.output)
            assert await desk.everything() == before, arguments
        assert len(desk.services.sights) == attempts
        # None of it was in the way of the letter itself.
        assert json.loads(await desk.dlq("import", file("good.jsonl", good), "--json"))["edited"] == 1
        await desk.settled()
        assert desk.seen(messages[0])[-1].body["message"] == payload
