"""The router inside another program: two at once, every kind of answer, state that lasts, cancellation."""

# ruff: noqa: ASYNC110 - tables send no events

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, Message

from router import (
    Ack,
    Config,
    Envelope,
    Reject,
    Reply,
    Retry,
    Router,
    ServiceConfig,
    SessionChange,
    inbound,
    open_router,
)

pytestmark = pytest.mark.postgres


def config(data_dir: Path) -> Config:
    rides = ServiceConfig(name="rides", timeout_ms=500, deadline_ms=1000)
    return Config.for_embedding(
        app_secret=kit.SECRET, verify_token=kit.VERIFY_TOKEN, data_dir=data_dir, services=[rides]
    )


async def submit(router: Router, message: Message) -> None:
    await router.submit(inbound(phone_number_id=message.number, message=message.json))


async def test_two_routers_in_one_program_share_nothing(home: Path) -> None:
    subprocess.run(["cp", "-a", home / "data", home / "other"], check=True)  # noqa: ASYNC221
    heard: dict[str, list[str | None]] = {"data": [], "other": []}

    def handler(name: str):
        async def handle(envelope: Envelope) -> Ack:
            heard[name].append(envelope.message_id)
            return Ack()

        return handle

    first, second, both = (kit.new_message("taxi") for _ in range(3))
    async with (
        open_router(config(home / "data"), {"rides": handler("data")}) as one,
        open_router(config(home / "other"), {"rides": handler("other")}) as other,
    ):
        await submit(one, first)
        await submit(other, second)
        for router in (one, other, one):
            await submit(router, both)
        for name in heard:
            await Database.of(home / name).until(lambda count: count == 0)
        counts = [await Database.of(home / name).recount() for name in heard]
    assert heard == {
        "data": [first.message_id, both.message_id],
        "other": [second.message_id, both.message_id],
    }
    assert [counted.ok for counted in counts] == [True, True]
    assert [counted.duplicates for counted in counts] == [1, 0]


async def test_every_kind_of_answer_has_its_place(home: Path) -> None:
    attempts: list[tuple[str, int, bool]] = []

    async def rides(envelope: Envelope) -> Ack | Retry | Reject:
        word = envelope.text.split()[-1]
        attempts.append((word, envelope.attempt, envelope.redelivered))
        if word == "reject":
            return Reject("no such street")
        if word == "raise":
            raise RuntimeError("broken")
        if word == "later" and envelope.attempt == 1:
            return Retry(0.05, reason="busy")
        if word == "never":
            return Retry(3600, reason="closed")
        if word == "nothing":
            return None  # type: ignore[return-value]
        return Ack((Reply("it comes"), Reply(message={"type": "image", "image": {"id": "1"}})))

    async with open_router(config(home / "data"), {"rides": rides}) as router:
        database = Database.of(home / "data")
        # Once one was delivered, the router follows the journal: none that comes was attempted before.
        await submit(router, kit.new_message("taxi first", sender="999000003100"))
        await database.until(lambda count: count == 0)
        for n, word in enumerate(("ack", "reject", "raise", "later", "never", "nothing")):
            await submit(router, kit.new_message(f"taxi {word}", sender=f"9990000030{n:02}"))
        await database.until(lambda count: count == 0)
        places = await database.fetch(
            "SELECT payload #>> '{text,body}' AS text, place, attempts FROM whatsapp_messages "
            "WHERE direction = 'inbound' ORDER BY seq"
        )
        letters = await database.fetch(
            "SELECT status, resolution, error_message, next_retry_at - created_at > '50 minutes' AS far "
            "FROM webhook_dlq ORDER BY seq"
        )
        outbox = await database.fetch("SELECT status, recipient, payload FROM whatsapp_outbox ORDER BY id")
        conservation = await database.recount()
    assert conservation.ok, conservation.problems
    by_word = {row["text"].split()[-1]: (row["place"], row["attempts"]) for row in places}
    assert by_word["ack"] == ("delivered", 1)
    assert by_word["reject"] == ("rejected", 1)
    assert by_word["later"] == ("delivered", 2)
    assert by_word["never"] == ("dead_letter", 1)
    assert by_word["raise"][0] == by_word["nothing"][0] == "dead_letter"
    assert [one for one in attempts if one[0] == "later"] == [("later", 1, False), ("later", 2, True)]
    told = {row["error_message"]: row for row in letters}
    assert told["no such street"]["status"] == "failed"
    assert told["no such street"]["resolution"] == "rejected"
    assert told["handler raised RuntimeError"]["status"] == "pending"
    assert told["closed"]["far"]
    # Nothing sends, so what should be sent is recorded and never sent later by surprise.
    assert {row["status"] for row in outbox} == {"unsent"}
    of_ack = [json.loads(row["payload"]) for row in outbox if row["recipient"] == "999000003000"]
    assert of_ack == [{"type": "text", "text": {"body": "it comes"}}, {"type": "image", "image": {"id": "1"}}]


async def test_the_state_of_a_conversation_lasts(home: Path) -> None:
    seen: list[tuple[str | None, object, int]] = []

    async def rides(envelope: Envelope) -> Ack:
        session = envelope.session
        seen.append((session.active_service, dict(session.state), session.version))
        step = int(session.state.get("step", 0)) + 1
        return Ack(session=SessionChange(state={"step": step}))

    async def one_message(text: str) -> None:
        async with open_router(config(home / "data"), {"rides": rides}) as router:
            await submit(router, kit.new_message(text))
            await Database.of(home / "data").until(lambda count: count == 0)
            stored.append(
                await Database.of(home / "data").fetch(
                    "SELECT active_service, state, version FROM user_sessions"
                )
            )

    stored: list[list] = []
    # "and then?" goes to rides only because the conversation is with rides.
    for text in ("taxi", "and then?", "and now?"):
        await one_message(text)
    assert [active for active, _, _ in seen] == [None, "rides", "rides"]
    assert [state for _, state, _ in seen] == [{}, {"step": 1}, {"step": 2}]
    versions = [version for _, _, version in seen]
    assert versions == sorted(set(versions))
    assert [json.loads(rows[0]["state"]) for rows in stored] == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert {rows[0]["active_service"] for rows in stored} == {"rides"}
    after = [rows[0]["version"] for rows in stored]
    assert after == sorted(set(after))
    assert all(one > before for one, before in zip(after, versions, strict=True))


async def test_a_host_that_is_cancelled_ends_soon_and_loses_nothing(home: Path) -> None:
    messages = [kit.new_message("taxi", sender=f"99900000{n:04}") for n in range(60)]
    keys: dict[str | None, set[str]] = {}
    acked: list[str | None] = []
    begun = trio.Event()

    async def slow(envelope: Envelope) -> Ack:
        keys.setdefault(envelope.message_id, set()).add(envelope.id)
        begun.set()
        await trio.sleep(0.3)
        acked.append(envelope.message_id)
        return Ack()

    async def host(scope: trio.CancelScope) -> None:
        with scope:
            async with open_router(config(home / "data"), {"rides": slow}) as router:
                for message in messages:
                    await submit(router, message)
                await trio.sleep_forever()

    scope = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host, scope)
        await begun.wait()
        while len(keys) < 5:
            await trio.sleep(0.01)
        cancelled = trio.current_time()
        scope.cancel()
    # At most 5 s of draining and 5 of closing the database; it must not wait for all that is journaled.
    assert trio.current_time() - cancelled < 20
    submitted = len(keys)

    async def quick(envelope: Envelope) -> Ack:
        keys.setdefault(envelope.message_id, set()).add(envelope.id)
        acked.append(envelope.message_id)
        return Ack()

    async with open_router(config(home / "data"), {"rides": quick}):
        database = Database.of(home / "data")
        await database.until(lambda count: count == 0)
        stored = await database.fetch("SELECT message_id, place FROM whatsapp_messages")
        assert (await database.recount()).ok
    assert submitted >= 5
    assert {row["place"] for row in stored} == {"delivered"}
    assert {row["message_id"] for row in stored} == set(acked)
    assert all(len(used) == 1 for used in keys.values())


async def test_what_cannot_be_routed_is_refused_and_not_stored(home: Path) -> None:
    async with open_router(config(home / "data")) as router:
        message = kit.new_message("taxi")
        del message.json["id"]
        with pytest.raises(ValueError, match="no_id"):
            await submit(router, message)
        assert (await Database.of(home / "data").recount()).received == 0


async def test_a_handler_for_an_unknown_domain_is_an_error(home: Path) -> None:
    async def handler(envelope: Envelope) -> Ack:
        return Ack()

    with pytest.raises(ValueError, match="weather"):
        async with open_router(config(home / "data"), {"weather": handler}):
            pass
