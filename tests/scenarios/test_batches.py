"""Large, repeated, mixed and hostile bodies through a running `postroom serve`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import NUMBERS, Database, Message, open_services

from router.simulator import WebhookClient, payloads

pytestmark = pytest.mark.postgres


async def test_a_thousand_items_for_three_numbers_of_which_one_is_malformed(home: Path) -> None:
    messages = [
        kit.new_message(f"taxi {n}", sender=f"99900000{n % 97:04}", number=NUMBERS[n % 3])
        for n in range(1000)
    ]
    spoiled = messages[500]
    del spoiled.json["id"]
    async with open_services() as services:
        config = kit.write_config(home, services)
        async with kit.serving(home, "--data-dir", home / "data", "--config", config) as router:
            database = Database.of(home / "data")
            assert await kit.post(router.webhook, kit.body_of(*messages)) == 200
            await database.until(lambda count: count == 0)
            conservation = await database.recount()
            malformed = await database.fetch(
                "SELECT reason, phone_number_id FROM whatsapp_messages_items WHERE bucket = 'malformed'"
            )
            assert await router.stop() == 0
    assert conservation.ok, conservation.problems
    assert conservation.received == 1000
    assert conservation.places["delivered"] == 999
    assert [(row["reason"], row["phone_number_id"]) for row in malformed] == [("no_id", spoiled.number)]
    sent = [message for message in messages if message is not spoiled]
    assert sorted(sight.message_id for sight in services.sights) == sorted(m.message_id for m in sent)
    for key in {(message.sender, message.number) for message in sent}:
        order = [m.message_id for m in sent if (m.sender, m.number) == key]
        assert [s.message_id for s in services.sights if s.message_id in set(order)] == order


async def send_at_once(url: str, body: bytes, times: int, connections: int) -> list[int]:
    answers: list[int] = []

    async def connection(share: int) -> None:
        client = WebhookClient(url, kit.SECRET, timeout=30)
        try:
            for _ in range(share):
                answers.append((await client.post(body)).status)
        finally:
            client.close()

    async with trio.open_nursery() as nursery:
        for _ in range(connections):
            nursery.start_soon(connection, times // connections)
    return answers


async def test_one_message_two_hundred_times_at_once_and_again_after_a_restart(home: Path) -> None:
    message = kit.new_message("taxi")
    async with open_services() as services:
        config = kit.write_config(home, services)
        database = Database.of(home / "data")
        for start in (1, 2):
            async with kit.serving(home, "--data-dir", home / "data", "--config", config) as router:
                answers = await send_at_once(router.webhook, kit.body_of(message), 200, 20)
                assert answers == [200] * 200
                await database.until(lambda count: count == 0)
                conservation = await database.recount()
                assert conservation.ok, conservation.problems
                assert (conservation.received, conservation.duplicates) == (200 * start, 200 * start - 1)
                assert len(services.sights) == 1
                assert await router.stop() == 0
    assert [sight.message_id for sight in services.sights] == [message.message_id]


async def test_of_a_mixed_body_only_what_is_new_is_stored_and_delivered(home: Path) -> None:
    old = [kit.new_message(f"taxi {n}", sender=f"99900000000{n}") for n in range(3)]
    new = [kit.new_message(f"moto {n}", sender=f"99900000001{n}") for n in range(2)]
    async with open_services() as services:
        config = kit.write_config(home, services)
        async with kit.serving(home, "--data-dir", home / "data", "--config", config) as router:
            database = Database.of(home / "data")
            assert await kit.post(router.webhook, kit.body_of(*old)) == 200
            mixed = [old[0], new[0], old[1], new[1], old[2]]
            assert await kit.post(router.webhook, kit.body_of(*mixed)) == 200
            assert await kit.post(router.webhook, kit.body_of(*mixed)) == 200
            await database.until(lambda count: count == 0)
            events = await database.fetch("SELECT partial, body FROM wa_events ORDER BY event_id")
            conservation = await database.recount()
            assert await router.stop() == 0
    assert conservation.ok, conservation.problems
    assert (conservation.received, conservation.duplicates) == (13, 8)
    assert [row["partial"] for row in events] == [False, True]
    kept = json.loads(events[1]["body"])["entry"][0]["changes"][0]["value"]
    assert [message["id"] for message in kept["messages"]] == [message.message_id for message in new]
    assert [contact["wa_id"] for contact in kept["contacts"]] == [message.sender for message in new]
    seen = [sight.message_id for sight in services.sights]
    assert sorted(seen) == sorted(message.message_id for message in old + new)


HOSTILE = {
    "nul": "a\x00b",
    "lone surrogate": "\ud83d and \udc00\ud800",
    "four bytes": "👩🏽‍🚀🇷🇼 \U0001d54f",
    "escapes": '\\u0000 "\\" \u2028\x7f\x01',
    "long": "taxi " * 20_000,
}


async def test_hostile_texts_share_a_body_with_good_ones(home: Path) -> None:
    sent: dict[str, tuple[Message, str]] = {}
    for n, (name, text) in enumerate({**HOSTILE, "good": "taxi please"}.items()):
        # "taxi" first, so that it is routed whatever comes after.
        sent[name] = (kit.new_message(f"taxi {text}", sender=f"9990000010{n:02}"), f"taxi {text}")
    deep = kit.new_message("taxi", sender="999000001099")
    nested: object = "bottom"
    for _ in range(90):
        nested = {"deeper": [nested]}
    deep.json["extra"] = nested
    body = kit.body_of(*(message for message, _ in sent.values()), deep)
    async with open_services() as services:
        config = kit.write_config(home, services)
        async with kit.serving(home, "--data-dir", home / "data", "--config", config) as router:
            database = Database.of(home / "data")
            assert await kit.post(router.webhook, body) == 200
            await database.until(lambda count: count == 0)
            conservation = await database.recount()
            stored = await database.fetch(
                "SELECT message_id, payload #>> '{text,body}' AS text, place FROM whatsapp_messages"
            )
            assert await database.value("SELECT body FROM wa_events") == body
            assert await router.stop() == 0
    assert conservation.ok, conservation.problems
    assert conservation.places["delivered"] == len(sent) + 1
    for message, text in sent.values():
        [sight] = services.of(message.message_id)
        assert sight.text == text
    [sight] = services.of(deep.message_id)
    assert sight.body["message"] == deep.json
    shown = {row["message_id"]: row["text"] for row in stored}
    good, text = sent["good"]
    assert shown[good.message_id] == text
    assert shown[sent["four bytes"][0].message_id] == sent["four bytes"][1]
    assert shown[sent["nul"][0].message_id] == "taxi a\ufffdb"
    assert all(text is not None for text in shown.values())


async def test_deliveries_that_carry_nothing_to_route_are_answered_and_kept(home: Path) -> None:
    too_deep = kit.new_message("taxi")
    too_deep.json["extra"] = json.loads("[" * 500 + "]" * 500)
    bodies = [
        b"{",
        kit.body_of(too_deep),
        b"[]",
        b'{"object": "page", "entry": [{}]}',
        payloads.body(payloads.entry("1", payloads.other_change("account_update", {"event": "X"}))),
        payloads.body(payloads.entry("1", payloads.change(NUMBERS[0], "1555"))),
    ]
    async with open_services() as services:
        config = kit.write_config(home, services)
        async with kit.serving(home, "--data-dir", home / "data", "--config", config) as router:
            for body in bodies:
                assert await kit.post(router.webhook, body) == 200
            rows = await Database.of(home / "data").fetch(
                "SELECT i.bucket, i.reason, e.body FROM whatsapp_messages_items i "
                "JOIN wa_events e USING (event_id) ORDER BY seq"
            )
            assert await router.stop() == 0
    assert [bytes(row["body"]) for row in rows] == bodies
    assert [(row["bucket"], row["reason"]) for row in rows] == [
        ("malformed", "unparseable"),
        ("malformed", "unparseable"),
        ("malformed", "not_an_object"),
        ("malformed", "wrong_object"),
        ("handled", "account_update"),
        ("handled", "messages"),
    ]
    assert services.sights == []
