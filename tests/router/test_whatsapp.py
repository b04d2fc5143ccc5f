"""Whatever bytes Meta signed: each item gets one place, is found again by its path, and can be cut out."""

from __future__ import annotations

import copy
import hmac
import json
from collections.abc import Callable
from hashlib import sha256
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import each
from texts import texts

from actors.messages import Bucket, Delivery, Incoming, Kind
from router.channels import whatsapp
from router.channels.bodies import MAX_ID_CHARS, cut, item_at, sender
from router.channels.whatsapp import AppSecret, Splitter, challenge, signature_is_valid
from router.json_text import MAX_NESTING, parse
from router.simulator import payloads, signature
from router.simulator.payloads import Head, Json

NUMBER, DISPLAY = "106540352242922", "15550783881"
HEAD = Head("wamid.QQ==", "250788000001", 1_700_000_000)
RNG = Random(3)
CONTACT = payloads.contact("Ada", "250788000001")


def splitter(**settings: Any) -> Splitter:
    given: dict[str, Any] = {"dedup_key": b"k" * 32, "is_ours": lambda number: True}
    return Splitter("default", **(given | settings))


def delivery(body: bytes, **settings: Any) -> Delivery:
    return splitter(**settings).delivery(
        body, correlation_id="c-1", traceparent=None, settle=lambda stored: None
    )


def items(body: bytes, **settings: Any) -> list[Incoming]:
    return delivery(body, **settings).items


def written(value: object, field: object = "messages") -> bytes:
    """A body with one change, by hand."""
    document = {
        "object": "whatsapp_business_account",
        "entry": [{"id": "1", "changes": [{"field": field, "value": value}]}],
    }
    return json.dumps(document).encode()


def with_messages(*messages: object, contacts: object = (CONTACT,)) -> bytes:
    return written({"metadata": {"phone_number_id": NUMBER}, "contacts": contacts, "messages": messages})


def one_change(number: str = NUMBER, **lists: Any) -> bytes:
    return payloads.body(payloads.entry("1", payloads.change(number, DISPLAY, **lists)))


class TestSignature:
    body = b'{"name":"Zo\\u00eb"}'
    secrets = (AppSecret(b"current"), AppSecret(b"previous"))

    @pytest.mark.parametrize("secret", ["current", "previous"])
    def test_both_live_secrets_sign(self, secret: str) -> None:
        header = signature(secret, self.body)
        assert signature_is_valid(header, self.body, self.secrets)
        assert signature_is_valid(header.encode(), self.body, self.secrets)

    @each(
        "header",
        [
            None,
            "",
            b"",
            "sha256=",
            signature("another", body),
            signature("current", body + b" "),
            signature("current", body).upper(),
            "sha256=" + signature("current", body)[7:].upper(),
            "SHA256=" + signature("current", body)[7:],
            signature("current", body)[7:],
            signature("current", body) + " ",
            signature("current", body)[:-1],
            "sha1=" + signature("current", body)[7:47],
            b"sha256=\xff\xfe" + b"0" * 62,
            "sha256=\u4e2d" + "0" * 63,
            "sha256=\ud800",
        ],
    )
    def test_nothing_else_does(self, header: str | bytes | None) -> None:
        assert not signature_is_valid(header, self.body, self.secrets)

    def test_the_bytes_are_hashed_as_received(self) -> None:
        rewritten = json.dumps(json.loads(self.body)).encode()
        assert not signature_is_valid(signature("current", self.body), rewritten, self.secrets)

    def test_without_secrets_nothing_is_valid(self) -> None:
        assert not signature_is_valid(signature("", self.body), self.body, ())

    @pytest.mark.parametrize("secret", ["current", "previous", "wrong"])
    def test_every_secret_is_tried_in_constant_time(
        self, secret: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compared: list[int] = []
        compare: Callable[[bytes, bytes], bool] = whatsapp.hmac.compare_digest

        def counting(given: bytes, expected: bytes) -> bool:
            compared.append(len(expected))
            return compare(given, expected)

        monkeypatch.setattr(whatsapp.hmac, "compare_digest", counting)
        signature_is_valid(signature(secret, self.body), self.body, self.secrets)
        assert compared == [len("sha256=") + sha256().digest_size * 2] * 2

    @given(st.one_of(st.binary(), texts()), st.binary(), st.lists(st.binary(min_size=1), max_size=2))
    def test_any_header_has_an_answer(self, header: str | bytes, body: bytes, secrets: list[bytes]) -> None:
        assert signature_is_valid(header, body, map(AppSecret, secrets)) is False

    @given(st.binary(max_size=200), st.binary())
    def test_it_is_the_hmac_of_the_standard_library(self, secret: bytes, body: bytes) -> None:
        expected = b"sha256=" + hmac.digest(secret, body, "sha256").hex().encode()
        assert AppSecret(secret).signature(body) == expected


class TestHandshake:
    right = (("hub.mode", "subscribe"), ("hub.challenge", "1158201444"), ("hub.verify_token", "toké"))

    def test_the_challenge_is_given_back(self) -> None:
        assert challenge(self.right, "toké") == "1158201444"

    @pytest.mark.parametrize("missing", ["hub.mode", "hub.challenge", "hub.verify_token"])
    def test_each_part_is_needed(self, missing: str) -> None:
        assert challenge([pair for pair in self.right if pair[0] != missing], "toké") is None

    @each(
        ("name", "value"),
        [
            ("hub.mode", "unsubscribe"),
            ("hub.verify_token", "wrong"),
            ("hub.verify_token", ""),
            ("hub.verify_token", "\ud800"),
        ],
    )
    def test_each_part_must_be_right(self, name: str, value: str) -> None:
        assert challenge([*self.right, (name, value)], "toké") is None


EVERY_MESSAGE = [
    payloads.text_message(HEAD, "hi"),
    payloads.image_message(HEAD, RNG, "a view"),
    payloads.audio_message(HEAD, RNG),
    payloads.video_message(HEAD, RNG),
    payloads.document_message(HEAD, RNG, "a.pdf"),
    payloads.sticker_message(HEAD, RNG),
    payloads.location_message(HEAD, -1.95, 30.06, "Kigali"),
    payloads.contacts_message(HEAD, "Bo", "250788000002"),
    payloads.reaction_message(HEAD, "wamid.Qg==", "👍"),
    payloads.reaction_message(HEAD, "wamid.Qg==", None),
    payloads.button_reply_message(HEAD, "rides", "Ride"),
    payloads.list_reply_message(HEAD, "rides", "Ride"),
    payloads.nfm_reply_message(HEAD, {"seats": 2}),
    payloads.button_message(HEAD, "yes", "Yes"),
    payloads.order_message(HEAD, "cat", [("sku", 2, 1.5)], "RWF"),
    payloads.system_message(HEAD, "250788000003"),
    payloads.request_welcome_message(HEAD),
    payloads.unsupported_message(HEAD),
    payloads.edit_message(HEAD, "wamid.Qg==", "hello"),
    payloads.revoke_message(HEAD, "wamid.Qg=="),
    payloads.future_message(HEAD),
]


class TestMessages:
    @each("message", EVERY_MESSAGE)
    def test_every_type_is_a_message_for_a_session(self, message: Json) -> None:
        (item,) = items(one_change(messages=[message], contacts=[CONTACT]))
        assert (item.kind, item.bucket, item.deduplicated) == (Kind.MESSAGE, None, True)
        assert (item.type, item.message_id, item.phone_number_id) == (message["type"], HEAD.id, NUMBER)
        assert (item.names, item.wa_id, item.user_id) == ((HEAD.sender,), HEAD.sender, None)
        assert item.message == message
        assert item.contact == CONTACT
        assert len(item.key) == 16

    def test_a_reply_and_an_ad_click_arrive_whole(self) -> None:
        head = Head("wamid.1", "250788000001", 1, context={"forwarded": True}, referral={"ctwa_clid": "x"})
        (item,) = items(one_change(messages=[payloads.text_message(head, "hi")]))
        assert item.message is not None
        assert item.message["context"] == {"forwarded": True}
        assert item.message["referral"] == {"ctwa_clid": "x"}

    @each("type", [None, 5, [], {"a": 1}, "", "a\0b", "\ud800", "x" * 2000])
    def test_a_type_that_cannot_be_stored_is_no_error(self, type: object) -> None:
        (item,) = items(with_messages({"id": "a", "from": "1", "type": type}))
        assert item.bucket is None
        assert item.type is None

    @each("stamp", [None, "", "soon", "-1", "9" * 400, 1e300, [], {"a": 1}, "0", True])
    def test_the_time_of_a_message_decides_nothing(self, stamp: object) -> None:
        (item,) = items(with_messages({"id": "a", "from": "1", "timestamp": stamp}))
        assert item.bucket is None
        assert item.message is not None
        assert item.message["timestamp"] == stamp

    @each(
        ("message", "reason"),
        [
            ({"from": "1"}, "no_id"),
            ({"from": "1", "id": ""}, "no_id"),
            ({"from": "1", "id": 7}, "no_id"),
            ({"from": "1", "id": None}, "no_id"),
            ({"from": "1", "id": "a\0b"}, "unstorable_id"),
            ({"from": "1", "id": "a\ud800"}, "unstorable_id"),
            ({"from": "1", "id": "a" * (MAX_ID_CHARS + 1)}, "unstorable_id"),
            ({"id": "a"}, "no_sender"),
            ({"id": "a", "from": ""}, "no_sender"),
            ({"id": "a", "from": 250788}, "no_sender"),
            ({"id": "a", "from": "1\0"}, "no_sender"),
            ({"id": "a", "from": "\udfff"}, "no_sender"),
            ({"id": "a", "from": "1" * (MAX_ID_CHARS + 1)}, "no_sender"),
            ("text", "not_an_object"),
            (None, "not_an_object"),
            ([], "not_an_object"),
        ],
    )
    def test_what_no_session_can_take_is_malformed_with_its_reason(
        self, message: object, reason: str
    ) -> None:
        (item,) = items(with_messages(message))
        assert (item.kind, item.bucket, item.reason) == (Kind.MESSAGE, Bucket.MALFORMED, reason)
        stored = [item.message_id or "", item.phone_number_id or "", item.type or "", *item.names]
        assert not any("\0" in text or "\ud800" in text or len(text) > MAX_ID_CHARS for text in stored)

    def test_an_id_at_the_limit_is_taken(self) -> None:
        (item,) = items(with_messages({"id": "a" * MAX_ID_CHARS, "from": "é" * MAX_ID_CHARS}))
        assert item.bucket is None


class TestIdentity:
    def test_a_business_scoped_id_needs_no_phone_number(self) -> None:
        message = payloads.text_message(Head("wamid.1", None, 1, user_id="US.1349"), "hi")
        (item,) = items(one_change(messages=[message], contacts=[payloads.contact("Ada", None, "US.1349")]))
        assert (item.bucket, item.names) == (None, ("US.1349",))
        assert (item.wa_id, item.user_id) == (None, "US.1349")
        assert item.contact is not None

    def test_the_contact_gives_the_other_name(self) -> None:
        message = payloads.text_message(Head("wamid.1", "250788000001", 1), "hi")
        contact = payloads.contact("Ada", "250788000001", "US.1349")
        (item,) = items(one_change(messages=[message], contacts=[contact]))
        assert item.names == ("250788000001", "US.1349")

    def test_a_phone_number_that_only_the_contact_has_comes_first(self) -> None:
        message = payloads.text_message(Head("wamid.1", None, 1, user_id="US.1349"), "hi")
        contact = payloads.contact("Ada", "250788000001", "US.1349")
        (item,) = items(one_change(messages=[message], contacts=[contact]))
        assert item.names == ("250788000001", "US.1349")

    def test_a_parent_id_stands_in(self) -> None:
        (item,) = items(with_messages({"id": "a", "from_parent_user_id": "US.9"}))
        assert item.names == ("US.9",)

    def test_a_name_that_cannot_be_stored_leaves_the_other(self) -> None:
        (item,) = items(with_messages({"id": "a", "from": "1\0", "from_user_id": "US.1"}))
        assert (item.bucket, item.names) == (None, ("US.1",))

    def test_each_sender_has_his_own_contact(self) -> None:
        messages = [{"id": str(n), "from": str(n)} for n in range(5)]
        contacts = [None, "x", {"wa_id": ["1"]}, *({"wa_id": str(n), "n": n} for n in (4, 3, 2, 1))]
        found = items(with_messages(*messages, contacts=contacts))
        assert [item.contact and item.contact["n"] for item in found] == [None, 1, 2, 3, 4]

    def test_the_first_of_two_contacts_counts(self) -> None:
        contacts = [{"user_id": "U", "n": 1}, {"wa_id": "1", "n": 2}, {"wa_id": "1", "n": 3}]
        (item,) = items(with_messages({"id": "a", "from": "1", "from_user_id": "U"}, contacts=contacts))
        assert item.contact is not None
        assert item.contact["n"] == 1

    def test_a_group_is_one_conversation_whoever_writes(self) -> None:
        heads = [Head(f"wamid.{n}", f"25078800000{n}", 1, group_id="G1") for n in range(2)]
        found = items(one_change(messages=[payloads.text_message(head, "hi") for head in heads]))
        assert [item.names for item in found] == [("group:G1",), ("group:G1",)]
        assert [item.wa_id for item in found] == ["250788000000", "250788000001"]

    def test_sender_reads_a_message_as_the_splitter_does(self) -> None:
        for message in EVERY_MESSAGE:
            (item,) = items(one_change(messages=[message], contacts=[CONTACT]))
            assert sender(message, CONTACT) == (item.wa_id, item.user_id)


class TestNumbers:
    def test_a_body_may_be_for_several_numbers(self) -> None:
        changes = [
            payloads.change(
                str(number), DISPLAY, messages=[payloads.text_message(HEAD, "hi")], contacts=[CONTACT]
            )
            for number in range(3)
        ]
        found = items(payloads.body(payloads.entry("1", *changes[:2]), payloads.entry("2", changes[2])))
        assert [item.phone_number_id for item in found] == ["0", "1", "2"]
        assert [item.path for item in found] == ["0.0.m0", "0.1.m0", "1.0.m0"]
        assert len({item.key for item in found}) == 3  # the same wamid, but of another number

    def test_a_foreign_number_is_malformed_and_says_so(self) -> None:
        body = one_change(
            "999",
            messages=[payloads.text_message(HEAD, "hi")],
            statuses=[payloads.status("wamid.O", "read", 1, "1")],
            errors=[payloads.error(1, "t", "d")],
        )
        found = items(body, is_ours=lambda number: number == NUMBER)
        assert [item.kind for item in found] == [Kind.MESSAGE, Kind.STATUS, Kind.ERROR]
        assert {(item.bucket, item.reason) for item in found} == {(Bucket.MALFORMED, "foreign_number")}
        assert not any(item.deduplicated for item in found)  # the true owner's must not be a duplicate

    @each("number", [None, "", 5, [], "1\0", "\ud800", "1" * 600])
    @each("metadata", [True, False])
    def test_without_a_number_there_is_no_conversation(self, number: object, metadata: bool) -> None:
        value = {"metadata": {"phone_number_id": number} if metadata else number, "messages": [HEAD.__dict__]}
        (item,) = items(written(value))
        assert (item.bucket, item.reason) == (Bucket.MALFORMED, "no_phone_number_id")
        assert item.phone_number_id is None


class TestStatuses:
    @each(
        ("name", "rank"),
        [
            ("sent", 1),
            ("delivered", 2),
            ("read", 3),
            ("failed", 2),
            ("deleted", 5),
            ("played", 4),
            ("new", 0),
        ],
    )
    def test_a_status_is_handled_and_has_its_rank(self, name: str, rank: int) -> None:
        (item,) = items(one_change(statuses=[payloads.status("wamid.O", name, 1_700_000_000, "1")]))
        assert (item.kind, item.bucket, item.reason) == (Kind.STATUS, Bucket.HANDLED, "status")
        assert item.deduplicated
        assert item.status is not None
        assert (item.status.status, item.status.rank, item.status.timestamp) == (name, rank, 1_700_000_000)

    def test_forward_is_sent_delivered_read(self) -> None:
        rank = whatsapp.STATUS_RANK
        assert rank["sent"] < rank["delivered"] < rank["read"]
        assert rank["failed"] <= rank["delivered"]

    @each(
        ("status", "reason"),
        [
            ({"status": "sent"}, "no_id"),
            ({"id": 4, "status": "sent"}, "no_id"),
            ({"id": "a"}, "no_status"),
            ({"id": "a", "status": []}, "no_status"),
            ({"id": "a\0", "status": "sent"}, "unstorable_id"),
            ({"id": "a", "status": "\ud800"}, "unstorable_id"),
            (7, "not_an_object"),
        ],
    )
    def test_what_names_no_message_is_malformed(self, status: object, reason: str) -> None:
        (item,) = items(written({"metadata": {"phone_number_id": NUMBER}, "statuses": [status]}))
        assert (item.kind, item.bucket, item.reason) == (Kind.STATUS, Bucket.MALFORMED, reason)

    @each("stamp", [None, "x", "-5", -5, "9" * 5000, 253_402_300_800, 1.5, True, [], "1" * 30])
    def test_a_time_that_cannot_be_is_none(self, stamp: object) -> None:
        body = written(
            {
                "metadata": {"phone_number_id": NUMBER},
                "statuses": [{"id": "a", "status": "read", "timestamp": stamp}],
            }
        )
        (item,) = items(body)
        assert item.bucket is Bucket.HANDLED
        assert item.status is not None
        assert item.status.timestamp is None


class TestOtherChanges:
    @each(
        "field",
        [
            "message_template_status_update",
            "account_update",
            "phone_number_quality_update",
            "security",
            "calls",
            "user_preferences",
            "not_invented_yet",
        ],
    )
    def test_another_field_is_handled_under_its_name(self, field: str) -> None:
        (item,) = items(
            payloads.body(payloads.entry("1", payloads.other_change(field, {"event": "APPROVED"})))
        )
        assert (item.kind, item.bucket, item.reason) == (Kind.CHANGE, Bucket.HANDLED, field)

    @each("field", [None, 5, [], "a\0b", "\ud800", "x" * 600])
    def test_a_field_without_a_name_is_handled_too(self, field: object) -> None:
        (item,) = items(written({}, field))
        assert (item.bucket, item.reason) == (Bucket.HANDLED, "unknown_field")

    def test_errors_are_handled(self) -> None:
        (item,) = items(one_change(errors=[payloads.error(131051, "t", "d")]))
        assert (item.kind, item.bucket, item.reason) == (Kind.ERROR, Bucket.HANDLED, "error")

    @each(
        ("value", "bucket", "reason"),
        [
            ({"metadata": {"phone_number_id": NUMBER}}, Bucket.HANDLED, "messages"),
            ({"metadata": {"phone_number_id": NUMBER}, "messages": []}, Bucket.HANDLED, "messages"),
            ({"metadata": {"phone_number_id": NUMBER}, "messages": {"a": 1}}, Bucket.HANDLED, "messages"),
            ("value", Bucket.MALFORMED, "no_value"),
            (None, Bucket.MALFORMED, "no_value"),
        ],
    )
    def test_a_change_without_items_is_one_item(self, value: object, bucket: Bucket, reason: str) -> None:
        (item,) = items(written(value))
        assert (item.kind, item.path, item.bucket, item.reason) == (Kind.CHANGE, "0.0", bucket, reason)


class TestBodies:
    @each(
        ("body", "reason"),
        [
            (b"", "unparseable"),
            (b"{", "unparseable"),
            (b"hello", "unparseable"),
            (b'{"object":"\xff\xfe"}', "unparseable"),
            (b'{"object":"\xed\xa0\x80"}', "unparseable"),
            (b'\xef\xbb\xbf{"object":"whatsapp_business_account"}', "unparseable"),
            (b"[" * 100_000, "unparseable"),
            (b"[" * 100_000 + b"]" * 100_000, "unparseable"),
            (b"9" * 5_000, "not_an_object"),
            (b"[]", "not_an_object"),
            (b"null", "not_an_object"),
            (b"NaN", "not_an_object"),
            (b'"text"', "not_an_object"),
            (b"{}", "wrong_object"),
            (b'{"object":"page","entry":[]}', "wrong_object"),
            (b'{"object":["whatsapp_business_account"]}', "wrong_object"),
            (b'{"object":"whatsapp_business_account"}', "no_entry"),
            (b'{"object":"whatsapp_business_account","entry":{}}', "no_entry"),
            (b'{"object":"whatsapp_business_account","entry":[]}', "no_entry"),
        ],
    )
    def test_what_cannot_be_split_is_one_malformed_item(self, body: bytes, reason: str) -> None:
        found = delivery(body)
        (item,) = found.items
        assert (item.kind, item.bucket) == (Kind.BODY, Bucket.MALFORMED)
        assert item.reason in {reason, "unparseable"}  # numbers of any length are not JSON to everyone
        assert found.body == body
        assert found.without(frozenset({0})) is None

    @each("entry", [None, 5, {}, {"changes": None}, {"changes": []}, {"changes": {}}])
    def test_an_entry_without_changes_is_one_malformed_item(self, entry: object) -> None:
        body = json.dumps({"object": "whatsapp_business_account", "entry": [entry]}).encode()
        (item,) = items(body)
        assert (item.kind, item.path, item.bucket) == (Kind.CHANGE, "0", Bucket.MALFORMED)
        assert item.reason == "no_changes"

    def test_nesting_is_taken_to_its_limit_and_everything_can_be_written_again(self) -> None:
        around = 8  # levels of a body around what stands in a message
        for levels, taken in ((MAX_NESTING - around, True), (MAX_NESTING - around + 1, False)):
            deep = b"[" * levels + b"]" * levels
            body = with_messages({"id": "a", "from": "1", "x": "HERE"}, {"id": "b", "from": "1"})
            found = delivery(body.replace(b'"HERE"', deep))
            assert (found.items[0].bucket is None) is taken
            if taken:
                rest = found.without(frozenset({1}))
                assert rest is not None
                assert rest.items[0].message == found.items[0].message

    def test_deep_values_where_texts_are_expected(self) -> None:
        deep = b"[" * 900 + b"]" * 900
        message = {"id": "a", "from": "DEEP", "timestamp": "DEEP", "type": "DEEP"}
        status = {"id": "a", "status": "sent", "timestamp": "DEEP"}
        value = {
            "metadata": {"phone_number_id": NUMBER},
            "contacts": [{"wa_id": "DEEP"}],
            "messages": [message],
            "statuses": [status],
        }
        (item,) = items(written(value).replace(b'"DEEP"', deep))
        assert item.reason == "unparseable"

    def test_nan_and_repeated_names_and_long_numbers_do_not_stop_a_message(self) -> None:
        body = written({"metadata": {"phone_number_id": NUMBER}, "messages": "HERE"}).replace(
            b'"HERE"',
            b'[{"id":"old","id":"new","from":"1","x":NaN,"y":-Infinity,"z":1e999,"n":'
            + b"9" * 40
            + b'},{"id":"b","from":"1","t":"\\ud83d"}]',
        )
        found = delivery(body)
        assert [item.message_id for item in found.items] == ["new", "b"]
        for position in (0, 1):
            rest = found.without(frozenset({position}))
            assert rest is not None
            json.loads(rest.body, parse_constant=pytest.fail)
            assert [item.key for item in rest.items] == [found.items[1 - position].key]

    def test_a_thousand_mixed_updates(self) -> None:
        found = items(mixed(1000))
        assert len(found) == 1000
        assert len({item.key for item in found}) == 1000
        kinds = [item.kind for item in found]
        assert [kinds.count(kind) for kind in (Kind.MESSAGE, Kind.STATUS, Kind.ERROR)] == [499, 498, 3]
        assert {item.phone_number_id for item in found} == {"0", "1", "2"}
        assert not any(item.bucket is Bucket.MALFORMED for item in found)

    def test_one_malformed_among_a_thousand_harms_no_other(self) -> None:
        document = json.loads(mixed(1000))
        document["entry"][1]["changes"][0]["value"]["messages"][7] = {"from": "1"}
        found = items(json.dumps(document).encode())
        malformed = [item for item in found if item.bucket is Bucket.MALFORMED]
        assert [(item.path, item.reason) for item in malformed] == [("1.0.m7", "no_id")]
        assert len(found) == 1000

    def test_the_body_is_kept_byte_for_byte(self) -> None:
        body = b" " + mixed(10) + b"\n"
        assert delivery(body).body == body


def mixed(count: int) -> bytes:
    """One body with that many updates, for three numbers: messages, statuses and one error each."""
    changes: list[Json] = []
    for number in range(3):
        share = range(number, count, 3)
        numbered = [Head(f"wamid.{n}", f"25078{n:07}", 1_700_000_000) for n in share]
        half = len(numbered) // 2
        changes.append(
            payloads.change(
                str(number),
                DISPLAY,
                messages=[payloads.text_message(head, "hi") for head in numbered[:half]],
                contacts=[payloads.contact("A", head.sender) for head in numbered[:half]],
                statuses=[payloads.status(head.id, "read", 1, head.sender) for head in numbered[half:-1]],
                errors=[payloads.error(1, "t", "d")],
            )
        )
    return payloads.body(*(payloads.entry("1", change) for change in changes))


class TestKeys:
    def test_equal_for_equal_and_different_otherwise(self) -> None:
        one, other = splitter(), splitter(dedup_key=b"x" * 32)
        assert one.message_key("1", "a") == splitter().message_key("1", "a")
        assert one.message_key("1", "a") != other.message_key("1", "a")
        assert one.status_key("a", "sent", "1") == splitter().status_key("a", "sent", "1")

    @given(st.tuples(texts(), texts()), st.tuples(texts(), texts()))
    def test_message_keys(self, one: tuple[str, str], other: tuple[str, str]) -> None:
        names = [text.replace("\0", "") for text in (*one, *other)]  # an id with NUL has no key
        first, second = (names[0], names[1]), (names[2], names[3])
        same = splitter().message_key(*first) == splitter().message_key(*second)
        assert same is (first == second)

    @given(st.text(alphabet="ab1", max_size=3), st.text(alphabet="ab1", max_size=3), texts(max_size=3))
    def test_a_status_is_no_message(self, message_id: str, name: str, stamp: str) -> None:
        made = splitter()
        assert made.status_key(message_id, name, stamp) != made.message_key(message_id, name)
        assert made.status_key(message_id, name, stamp) != made.status_key(message_id, name, stamp + "x")

    def test_redelivery_has_the_same_keys_and_what_has_no_id_has_a_new_one(self) -> None:
        body = written(
            {
                "metadata": {"phone_number_id": NUMBER},
                "messages": [{"id": "a", "from": "1"}, {"from": "1"}],
                "statuses": [{"id": "a", "status": "read", "timestamp": 5}],
            }
        )
        first, second = items(body), items(body.replace(b": 5", b': "5"'))
        assert [one.key == two.key for one, two in zip(first, second, strict=True)] == [True, False, True]
        assert [item.deduplicated for item in first] == [True, False, True]


KEYS = st.sampled_from(["id", "from", "type", "text", "messages", "wa_id", "x", "\0", "\ud800"])
TEXTS = st.one_of(texts(max_size=5), st.sampled_from(["1", "2", "text", "a\0", "\ud800", "US.1", "messages"]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=6,
)


def sometimes(likely: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly what belongs there, else anything."""
    return st.one_of(likely, likely, likely, VALUES)


NAMES = st.sampled_from(["1", "2", "3"])
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "id": sometimes(st.sampled_from(["a", "b", "c", "d"])),
        "from": sometimes(NAMES),
        "from_user_id": sometimes(st.just("US.1")),
        "group_id": sometimes(st.just("G")),
        "timestamp": VALUES,
        "type": VALUES,
        "text": VALUES,
    },
)
CONTACTS = st.fixed_dictionaries(
    {}, optional={"wa_id": sometimes(NAMES), "user_id": sometimes(st.just("US.1"))}
)
STATUSES = st.fixed_dictionaries(
    {},
    optional={
        "id": sometimes(st.sampled_from(["a", "b"])),
        "status": sometimes(st.sampled_from(["sent", "read"])),
        "timestamp": VALUES,
    },
)
CHANGE_VALUES = st.fixed_dictionaries(
    {},
    optional={
        "metadata": sometimes(st.fixed_dictionaries({"phone_number_id": sometimes(st.just(NUMBER))})),
        "contacts": sometimes(st.lists(sometimes(CONTACTS), max_size=4)),
        "messages": sometimes(st.lists(sometimes(MESSAGES), max_size=4)),
        "statuses": sometimes(st.lists(sometimes(STATUSES), max_size=3)),
        "errors": sometimes(st.lists(VALUES, max_size=2)),
    },
)
CHANGES = st.fixed_dictionaries(
    {"value": sometimes(CHANGE_VALUES), "field": sometimes(st.just("messages"))}, optional={"x": VALUES}
)
ENTRIES = st.fixed_dictionaries(
    {"id": VALUES, "changes": sometimes(st.lists(sometimes(CHANGES), max_size=3))}
)
DOCUMENTS = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {
            "object": sometimes(st.just("whatsapp_business_account")),
            "entry": sometimes(st.lists(sometimes(ENTRIES), max_size=3)),
        }
    ),
)


def facts(item: Incoming) -> tuple[Any, ...]:
    """What an item says, but for where it stands and a random key."""
    return (
        item.kind,
        item.key if item.deduplicated else None,
        item.message_id,
        item.phone_number_id,
        item.names,
        item.wa_id,
        item.user_id,
        item.type,
        item.bucket,
        item.reason,
        item.status,
        json.dumps([item.message, item.contact]).replace("-Infinity", "null").replace("Infinity", "null"),
    )


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return one[:-1] == other[:-1] and one[-1].replace("NaN", "null") == other[-1].replace("NaN", "null")


class TestAnything:
    @given(st.binary())
    def test_any_bytes_give_items(self, body: bytes) -> None:
        assert len(items(body)) >= 1

    @given(DOCUMENTS)
    def test_any_json_gives_items_that_can_be_stored(self, document: Any) -> None:
        found = items(json.dumps(document).encode())
        assert len(found) >= 1
        assert len({item.path for item in found}) == len(found)
        for item in found:
            assert item.bucket is not None or (item.names and item.message is not None and item.message_id)
            texts = [item.path, item.message_id, item.phone_number_id, item.type, item.reason, *item.names]
            for text in texts:
                assert text is None or "\0" not in text
                (text or "").encode()  # no lone surrogate

    @given(DOCUMENTS)
    def test_a_path_leads_back_to_the_same_message(self, document: Any) -> None:
        found = delivery(json.dumps(document).encode())
        for item in found.items:
            if item.message is not None:
                message, contact = item_at(parse(found.body), item.path)
                assert json.dumps([message, contact]) == json.dumps([item.message, item.contact])
                assert sender(message, contact) == (item.wa_id, item.user_id)
            elif item.kind is not Kind.MESSAGE:
                with pytest.raises(LookupError):
                    item_at(parse(found.body) if item.kind is not Kind.BODY else None, item.path)

    @given(DOCUMENTS, st.data())
    def test_without_leaves_exactly_the_others(self, document: Any, data: st.DataObject) -> None:
        found = delivery(json.dumps(document).encode())
        before = copy.deepcopy(found.items)
        everything = range(len(found.items))
        positions = data.draw(st.frozensets(st.sampled_from(everything), min_size=1))
        rest = found.without(positions)
        if len(positions) == len(everything):
            assert rest is None
            return
        assert rest is not None
        assert rest.partial
        assert not found.partial
        json.loads(rest.body, parse_constant=pytest.fail)
        expected = [facts(item) for position, item in enumerate(before) if position not in positions]
        left = [facts(item) for item in rest.items]
        assert len(left) == len(expected)
        assert all(same(one, other) for one, other in zip(left, expected, strict=True))
        assert len(found.items) == len(before)  # the whole one is still whole
        again = rest.without(frozenset({0}))
        assert (again is None) is (len(left) == 1)

    def test_contacts_of_those_who_are_cut_out_are_cut_out_too(self) -> None:
        messages = [{"id": str(n), "from": str(n)} for n in range(3)]
        contacts = [{"wa_id": str(n), "profile": {"name": f"name{n}"}} for n in range(3)]
        rest = delivery(with_messages(*messages, contacts=contacts)).without(frozenset({0, 2}))
        assert rest is not None
        assert json.loads(rest.body)["entry"][0]["changes"][0]["value"]["contacts"] == [contacts[1]]

    def test_a_change_that_is_null_survives_a_cut(self) -> None:
        entry = {"id": "1", "changes": [{"field": "account_update", "value": {}}, None]}
        body = json.dumps({"object": "whatsapp_business_account", "entry": [entry]}).encode()
        rest = delivery(body).without(frozenset({0}))
        assert rest is not None
        assert [(item.kind, item.reason) for item in rest.items] == [(Kind.CHANGE, "not_an_object")]

    def test_an_entry_without_changes_survives_a_cut(self) -> None:
        change = {"field": "messages", "value": {"metadata": {"phone_number_id": "1"}, "messages": []}}
        change["value"]["messages"] = [{"id": "a", "from": "1"}, {"id": "b", "from": "1"}]  # type: ignore[index]
        document = {"object": "whatsapp_business_account", "entry": [{"changes": []}, {"changes": [change]}]}
        rest = delivery(json.dumps(document).encode()).without(frozenset({1}))
        assert rest is not None
        assert [item.reason for item in rest.items] == ["no_changes", None]

    @each("path", ["", "0", "0.0", "0.0.m1", "0.0.s0", "0.0.mx", "0.0.m", "1.0.m0", "a.b.c", "0.0.m0.0"])
    def test_a_path_to_nothing_is_a_lookup_error(self, path: str) -> None:
        document = json.loads(with_messages({"id": "a", "from": "1"}))
        assert item_at(document, "0.0.m0")[0]["id"] == "a"
        with pytest.raises(LookupError):
            item_at(document, path)

    def test_a_cut_costs_no_more_than_the_body_is_long(self) -> None:
        """The contact of each of a thousand senders is looked up, not searched for."""

        class Counting(dict[str, Any]):
            reads = 0

            def get(self, key: str, default: Any = None) -> Any:
                Counting.reads += 1
                return super().get(key, default)

        contacts = [Counting(wa_id=str(n)) for n in range(1000)]
        value = {
            "metadata": {"phone_number_id": NUMBER},
            "contacts": contacts,
            "messages": [{"id": str(n), "from": str(n)} for n in range(1000)],
        }
        document = {
            "object": "whatsapp_business_account",
            "entry": [{"changes": [{"field": "messages", "value": value}]}],
        }
        assert len(splitter().split(document)) == 1000
        cut(document, {"0.0.m1"})
        assert Counting.reads < 20_000
