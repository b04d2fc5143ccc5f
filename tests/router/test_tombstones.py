"""Who was erased: what they sent before is stored without content, whoever brings it; what they send now is
as from anybody."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from random import Random
from typing import Any

from tables import each

from actors.messages import Bucket, Delivery, Kind
from router.channels.bodies import ERASED, part_at
from router.channels.tombstones import Tombstones
from router.channels.whatsapp import Splitter
from router.json_text import parse
from router.simulator import payloads
from router.simulator.payloads import Head, Json

KEY = b"key of subjects"
ERASED_AT = datetime(2026, 3, 4, 12, tzinfo=UTC)
BEFORE, AFTER = int(ERASED_AT.timestamp()) - 60, int(ERASED_AT.timestamp()) + 60
PERSON, OTHER = "250788111222", "250788333444"
RNG = Random(3)


def tombstones(*names: str) -> Tombstones:
    found = Tombstones()
    found.load(
        KEY, [(sha256(KEY + sha256(KEY + name.encode()).digest()).hexdigest(), ERASED_AT) for name in names]
    )
    return found


def said(sender: str, at: int, **head: Any) -> Json:
    return payloads.text_message(Head(payloads.wamid(sender, RNG), sender, at, **head), "hello")


def split(*messages: Json, names: tuple[str, ...] = (PERSON,), **lists: Any) -> Delivery:
    change = payloads.change("100", "15550783881", messages=messages, **lists)
    return of(payloads.body(payloads.entry("1", change)), names=names)


def of(
    body: bytes, names: tuple[str, ...] = (PERSON,), is_ours: Callable[[str], bool] = lambda number: True
) -> Delivery:
    splitter = Splitter("default", dedup_key=b"k", is_ours=is_ours, tombstones=tombstones(*names))
    return splitter.delivery(body, correlation_id="c-1", traceparent=None, settle=lambda stored: None)


def test_an_old_message_of_somebody_who_was_erased_is_stored_without_content() -> None:
    contacts = [payloads.contact("Grace", PERSON), payloads.contact("Ada", OTHER)]
    delivery = split(said(PERSON, BEFORE), said(OTHER, BEFORE), contacts=contacts)
    assert [item.bucket for item in delivery.items] == [Bucket.ERASED, None]
    assert delivery.partial
    assert PERSON.encode() not in delivery.body
    assert b"Grace" not in delivery.body
    assert part_at(parse(delivery.body), "0.0.m1")["from"] == OTHER
    [gone, _] = delivery.items
    assert (gone.message_id, gone.message, gone.contact, gone.names, gone.wa_id) == (
        None,
        None,
        None,
        (),
        None,
    )


def test_its_hash_is_that_of_the_message_so_that_duplicates_are_found() -> None:
    message = said(PERSON, BEFORE)
    [erased] = split(message).items
    [known] = split(message, names=()).items
    assert erased.deduplicated
    assert erased.key == known.key


def test_a_new_message_is_taken_as_from_anybody() -> None:
    delivery = split(said(PERSON, AFTER))
    assert [item.bucket for item in delivery.items] == [None]
    assert not delivery.partial


def test_without_a_time_nobody_can_say() -> None:
    message = said(PERSON, BEFORE)
    del message["timestamp"]
    assert [item.bucket for item in split(message).items] == [None]


def test_a_name_of_the_two_is_enough_also_in_a_group() -> None:
    assert (
        split(said(OTHER, BEFORE, user_id="RW.1234567"), names=("RW.1234567",)).items[0].bucket
        is Bucket.ERASED
    )
    assert split(said(PERSON, BEFORE, group_id="family")).items[0].bucket is Bucket.ERASED
    assert split(said(OTHER, BEFORE, group_id="family")).items[0].bucket is None


def test_a_status_of_a_message_to_them_is_erased() -> None:
    status = {"id": "wamid.QQ==", "status": "read", "timestamp": str(BEFORE), "recipient_id": PERSON}
    delivery = split(statuses=[status, {**status, "recipient_id": OTHER}])
    assert [(item.kind, item.bucket) for item in delivery.items] == [
        (Kind.STATUS, Bucket.ERASED),
        (Kind.STATUS, Bucket.HANDLED),
    ]
    assert delivery.items[0].status is None
    assert part_at(parse(delivery.body), "0.0.s0") == ERASED


@each(
    "change",
    [
        {
            "field": "smb_message_echoes",
            "value": {"message_echoes": [{"to": PERSON, "timestamp": str(BEFORE)}]},
        },
        {"field": "user_preferences", "value": {"wa_id": PERSON, "timestamp": BEFORE}},
    ],
)
def test_other_fields_about_them_are_erased_too(change: dict[str, Any]) -> None:
    def bucket(one: dict[str, Any]) -> Bucket | None:
        delivery = of(payloads.body({"id": "1", "changes": [one]}))
        assert delivery.items[0].bucket is Bucket.HANDLED or PERSON.encode() not in delivery.body
        return delivery.items[0].bucket

    assert bucket(change) is Bucket.ERASED
    later = json.loads(json.dumps(change).replace(str(BEFORE), str(AFTER)))
    assert bucket(later) is Bucket.HANDLED
    assert bucket(json.loads(json.dumps(change).replace(PERSON, OTHER))) is Bucket.HANDLED


def test_what_is_malformed_anyway_is_erased_too() -> None:
    foreign = payloads.body(payloads.entry("1", payloads.change("666", "1", messages=[said(PERSON, BEFORE)])))
    unnamed = said(PERSON, BEFORE)
    del unnamed["id"]
    for body in (
        foreign,
        payloads.body(payloads.entry("1", payloads.change("100", "1", messages=[unnamed]))),
    ):
        delivery = of(body, is_ours=lambda number: number == "100")
        assert [item.bucket for item in delivery.items] == [Bucket.ERASED]
        assert PERSON.encode() not in delivery.body
    status = {"status": "read", "timestamp": str(BEFORE), "recipient_id": PERSON}
    assert split(statuses=[status]).items[0].bucket is Bucket.ERASED


def test_what_is_cut_or_spooled_after_that_is_split_the_same_way() -> None:
    delivery = split(said(PERSON, BEFORE), said(OTHER, BEFORE), said(OTHER, BEFORE))
    left = delivery.without(frozenset({1}))
    assert left is not None
    assert [item.bucket for item in left.items] == [Bucket.ERASED, None]
    assert left.partial


def test_a_later_erasure_covers_what_came_between() -> None:
    found = tombstones(PERSON)
    assert found.cover(PERSON, BEFORE)
    assert not found.cover(PERSON, AFTER)
    assert not found.cover(OTHER, BEFORE)
    assert found.erased_at(PERSON) == ERASED_AT
    assert found.erased_at(OTHER) is None
    found.load(KEY, [])
    assert not found.newest
    assert not found.cover(PERSON, 0)
