"""Flushes and completions become columns of equal length, and rows become the items they were."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import UTF8

from actors.messages import (
    Completion,
    DeadLetter,
    Delivery,
    Item,
    Place,
    Session,
)
from router.channels.whatsapp import Splitter
from router.postgres import rows
from router.simulator import payloads
from router.simulator.payloads import Head, Json

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SPLITTER = Splitter("default", dedup_key=b"k" * 32, is_ours=lambda number: number != "999")
SESSION = Session(key="1:250", phone_number_id="1", wa_id="250", state={"a": "\0"}, version=7)


def delivery(*changes: Json, trace: str | None = None) -> Delivery:
    body = payloads.body(payloads.entry("1", *changes))
    return SPLITTER.delivery(body, correlation_id="c-1", traceparent=trace, settle=lambda stored: None)


def texts(*ids: str, number: str = "1") -> Json:
    messages = [payloads.text_message(Head(id, "250", 1, "US.1"), "hi") for id in ids]
    return payloads.change(number, "+1", messages=messages, contacts=[payloads.contact("A", "250", "US.1")])


def statuses(*given: tuple[str, str, int]) -> Json:
    return payloads.change("1", "+1", statuses=[payloads.status(*one, "250") for one in given])


def item(**fields: Any) -> Item:
    given: dict[str, Any] = {
        "seq": 5,
        "key": "msg_" + "0" * 32,
        "message_id": "wamid.1",
        "session_key": "1:250",
        "phone_number_id": "1",
        "wa_id": "250",
        "user_id": None,
        "received_at": NOW,
        "correlation_id": "c-1",
        "traceparent": None,
        "message": {"id": "wamid.1", "x": "\0"},
        "contact": None,
    }
    return Item(**(given | fields))


class TestFlush:
    def test_every_item_has_its_place_and_its_body(self) -> None:
        first = delivery(texts("a", "b"), payloads.other_change("calls", {}), trace="00-t")
        second = delivery(texts("c", number="999"), statuses(("o", "read", 10)))
        second.partial = True
        malformed, handled, bodies, listed, *statuses_of = rows.flush_arguments([first, second])
        assert (malformed, handled) == (1, 2)
        assert bodies == [
            ("default", "c-1", "00-t", False, first.body),
            ("default", "c-1", None, True, second.body),
        ]
        columns = [list(column) for column in zip(*listed, strict=True)]
        events, keys, dedup, kinds, paths, ids, numbers, names, others, types, buckets, reasons = columns
        assert events == [1, 1, 1, 2, 2]
        assert keys == [one.key for one in first.items + second.items]
        assert dedup == [True, True, False, False, True]
        assert [str(kind) for kind in kinds] == ["m", "m", "c", "m", "s"]
        assert paths == ["0.0.m0", "0.0.m1", "0.1", "0.0.m0", "0.1.s0"]
        assert ids == ["a", "b", None, "c", "o"]
        assert numbers == ["1", "1", None, "999", "1"]
        assert names == ["250", "250", None, None, None]
        assert others == ["US.1", "US.1", None, None, None]
        assert types == ["text", "text", None, None, "read"]
        assert buckets == [None, None, "handled", "malformed", "handled"]
        assert reasons == [None, None, "calls", "foreign_number", "status"]
        assert statuses_of == [["1"], ["o"], ["read"], [3], [datetime.fromtimestamp(10, UTC)]]

    def test_only_the_furthest_status_of_a_message_is_written(self) -> None:
        given = [
            ("o", "read", 3),
            ("o", "sent", 1),
            ("p", "sent", 1),
            ("p", "failed", 2),
            ("o", "delivered", 2),
        ]
        arguments = rows.flush_arguments([delivery(statuses(*given[:2])), delivery(statuses(*given[2:]))])
        assert arguments[-4:-1] == [["o", "p"], ["read", "failed"], [3, 2]]

    def test_a_failure_after_delivery_does_not_take_its_place(self) -> None:
        arguments = rows.flush_arguments([delivery(statuses(("o", "delivered", 1), ("o", "failed", 2)))])
        assert arguments[-3] == ["delivered"]

    def test_a_status_without_a_possible_time_has_none(self) -> None:
        change = statuses(("o", "read", 3), ("p", "read", 253_402_300_799))
        change["value"]["statuses"][0]["timestamp"] = "9" * 30  # type: ignore[index]
        at = rows.flush_arguments([delivery(change)])[-1]
        assert at == [None, datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)]

    def test_an_empty_flush_has_every_argument(self) -> None:
        arguments = rows.flush_arguments([])
        assert arguments == [0, 0, *([[]] * 7)]

    @given(st.lists(st.integers(0, 3), max_size=3))
    def test_every_body_and_every_item_has_a_row(self, counts: list[int]) -> None:
        flush = [delivery(texts(*(str(n) for n in range(count)))) for count in counts]
        arguments = rows.flush_arguments(flush)
        assert len(arguments[2]) == len(flush)
        assert len(arguments[3]) == sum(len(one.items) for one in flush)


class TestItems:
    def row(self, given: Delivery, position: int, **fields: Any) -> dict[str, Any]:
        incoming = given.items[position]
        return {
            "seq": position,
            "key": incoming.key,
            "message_id": incoming.message_id,
            "session_key": "1:250",
            "phone_number_id": incoming.phone_number_id,
            "received_at": NOW,
            "path": incoming.path,
            "joins": None,
            "event_id": 1,
            "correlation_id": "c-1",
            "traceparent": "00-t",
            "body": given.body,
        } | fields

    def test_they_are_what_the_body_says(self) -> None:
        given = delivery(texts("a", "b"))
        found = rows.items_of([self.row(given, 0), self.row(given, 1, joins="1:US.1")])
        for one, incoming in zip(found, given.items, strict=True):
            assert one.message == incoming.message
            assert one.contact == incoming.contact
            assert (one.wa_id, one.user_id) == (incoming.wa_id, incoming.user_id)
            assert one.key == f"msg_{incoming.key.hex()}"
            assert (one.session_key, one.correlation_id, one.traceparent) == ("1:250", "c-1", "00-t")
            assert one.received_at == NOW
        assert [one.joins for one in found] == [None, "1:US.1"]

    def test_what_has_no_bytes_or_no_session_is_left_out(self) -> None:
        given = delivery(texts("a", "b"))
        listed = [
            self.row(given, 0, body=None),
            self.row(given, 0, event_id=2, path="5.0.m0"),
            self.row(given, 0, session_key=None),
            self.row(given, 1),
        ]
        assert [one.message_id for one in rows.items_of(listed)] == ["b"]

    def test_a_session_comes_back(self) -> None:
        key, number, wa_id, user_id, active, state, version = rows.session_arguments("k", SESSION)
        row = {
            "session_key": key,
            "phone_number_id": number,
            "wa_id": wa_id,
            "user_id": user_id,
            "active_service": active,
            "state": state,
            "version": version,
        }
        back = rows.session_of(row)
        assert back.state == {"a": "\ufffd"}
        assert (back.key, back.wa_id, back.version) == ("k", "250", 7)


class TestCompletions:
    def test_each_part_has_its_columns(self) -> None:
        delivered = Completion(
            item=item(),
            place=Place.DELIVERED,
            service="rides",
            rule="keyword",
            attempts=2,
            session=SESSION,
            replies=({"type": "text"}, {"x": "\ud800"}),
            unreadable_answer=True,
        )
        dead = Completion(
            item=item(seq=6, wa_id=None, user_id="US.1"),
            place=Place.DEAD_LETTER,
            service="jobs",
            rule="button",
            attempts=3,
            dead_letter=DeadLetter(status="pending", resolution=None, error="no\0 \ud800", retry_in=300.0),
        )
        done, sessions, replies, status, letters = rows.completion_arguments(
            [delivered, dead], NOW, "pending"
        )
        assert status == "pending"
        assert done == [
            (5, NOW, "delivered", "rides", "keyword", 2, True),
            (6, NOW, "dead_letter", "jobs", "button", 3, False),
        ]
        assert sessions == [("1:250", "1", "250", None, None, '{"a":"\\ufffd"}', 7)]
        assert replies == [
            (5, 1, "1:250", "1", "250", "rides", '{"type":"text"}', "c-1"),
            (5, 2, "1:250", "1", "250", "rides", '{"x":"\\ufffd"}', "c-1"),
        ]
        [letter] = letters
        assert letter[:4] == (6, NOW, "US.1", "jobs")
        assert json.loads(letter[4]) == {"id": "wamid.1", "x": "\ufffd"}
        assert letter[5] == "no\ufffd ?"
        assert letter[6:9] == ("pending", None, NOW + timedelta(seconds=300))
        assert letter[9:] == ("wamid.1", "1:250", 3, "c-1", False)

    def test_the_last_change_of_a_session_counts(self) -> None:
        changes = [
            Completion(
                item=item(seq=version, session_key=key),
                place=Place.HANDLED,
                service=None,
                rule="menu",
                attempts=0,
                session=Session(key=key, phone_number_id="1", version=version),
            )
            for version, key in enumerate(["b", "a", "b"])
        ]
        _, sessions, *_ = rows.completion_arguments(changes, NOW, "pending")
        assert [(row[0], row[-1]) for row in sessions] == [("a", 1), ("b", 2)]

    def test_nothing_is_nothing(self) -> None:
        assert rows.completion_arguments([], NOW, "unsent") == [[], [], [], "unsent", []]

    @pytest.mark.parametrize(
        ("letter", "expected"),
        [
            (None, ["delivered", "reprocessed", "reprocessed", None, None, 1, True, False]),
            (
                DeadLetter(status="failed", resolution="rejected", error="no\0", retry_in=None),
                ["rejected", "rejected", "failed", "no\ufffd", None, 1, True, False],
            ),
            (
                DeadLetter(
                    status="pending",
                    resolution=None,
                    error="later",
                    retry_in=60.0,
                    counted=False,
                    keeps_order=True,
                ),
                ["rejected", None, "pending", "later", NOW + timedelta(seconds=60), 1, False, True],
            ),
        ],
    )
    def test_a_replay(self, letter: DeadLetter | None, expected: list[Any]) -> None:
        completion = Completion(
            item=item(dead_letter="00000000-0000-0000-0000-000000000001"),
            place=Place.REJECTED if letter else Place.DELIVERED,
            service="rides",
            rule="replay",
            attempts=1,
            session=None if letter else SESSION,
            replies=({"type": "text"},),
            dead_letter=letter,
        )
        arguments = rows.replay_arguments(completion, NOW, "pending")
        assert len(arguments) == 19
        assert arguments[0].int == 1
        assert arguments[1:9] == expected
        assert (arguments[9] is None) is (letter is not None)
        assert arguments[16:] == ["250", ['{"type":"text"}'], "pending"]

    @given(st.text(UTF8))
    def test_text_is_what_postgres_takes(self, value: str) -> None:
        kept = rows.text(value)
        assert "\0" not in kept
        assert kept.encode().decode() == kept
        assert len(kept) == len(value)


def stored_text(text: str) -> dict[str, Any]:
    return {"type": "text", "from": "250", "text": {"body": text}}


LETTER: dict[str, Any] = {
    "id": uuid.UUID(int=7),
    "seq": 3,
    "service": "rides",
    "revision": 0,
    "resolution": None,
    "retry_count": 2,
    "attempts": 3,
    "keeps_order": False,
    "message_id": "wamid.1",
    "session_key": "100:250",
    "received_at": NOW,
    "phone_number": "250",
    "correlation_id": "c",
    "payload": json.dumps(stored_text("kept")),
    "key": b"k" * 16,
    "phone_number_id": "100",
    "path": "0.0.m0",
    "traceparent": None,
    "body": json.dumps({"entry": [{"changes": [{"value": {"messages": [stored_text("stored")]}}]}]}).encode(),
}


class TestReplays:
    @pytest.mark.parametrize(
        ("changed", "text"),
        [
            ({}, "stored"),
            ({"revision": 1}, "kept"),
            ({"body": None}, "kept"),
            ({"path": "0.0.m5"}, "kept"),
            ({"payload": "[" * 1_000 + "]" * 1_000}, "stored"),
        ],
    )
    def test_where_the_message_comes_from(self, changed: dict[str, Any], text: str) -> None:
        found = rows.replay_of(LETTER | changed)
        assert found.message["text"]["body"] == text
        assert (found.wa_id, found.phone_number_id, found.domain, found.retries) == ("250", "100", "rides", 2)
        assert (found.key, found.dead_letter) == ("msg_" + "6b" * 16, str(uuid.UUID(int=7)))

    @pytest.mark.parametrize(
        ("changed", "told"),
        [
            ({}, (True, True, False)),
            ({"attempts": 0, "resolution": "no_service"}, (False, True, False)),
            ({"attempts": 0, "resolution": "deferred", "keeps_order": True}, (False, False, True)),
            ({"attempts": 1, "resolution": "deferred", "keeps_order": True}, (True, False, True)),
            ({"keeps_order": True}, (True, False, False)),
        ],
    )
    def test_what_it_says_of_its_past(self, changed: dict[str, Any], told: tuple[bool, ...]) -> None:
        found = rows.replay_of(LETTER | changed)
        assert (found.redelivered, found.overtaken, found.deferred) == told

    @pytest.mark.parametrize("payload", ["[" * 1_000 + "]" * 1_000, "[]", "7", "null"])
    def test_what_cannot_be_read_is_empty_and_stops_nobody(self, payload: str) -> None:
        found = rows.replay_of(LETTER | {"body": None, "payload": payload})
        assert (found.message, found.wa_id) == ({}, "250")

    @pytest.mark.parametrize("body", [LETTER["body"], None])
    def test_an_edit_does_not_change_who_is_answered(self, body: bytes | None) -> None:
        edited = {**stored_text("kept"), "from": "666"}
        found = rows.replay_of(LETTER | {"revision": 1, "body": body, "payload": json.dumps(edited)})
        assert found.message == edited
        assert (found.wa_id, found.user_id) == ("250", None)
