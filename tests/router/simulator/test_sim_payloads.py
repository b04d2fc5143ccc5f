"""Bodies have Meta's shape and encoding, ids are unique, signatures verify, and the package stands alone."""

from __future__ import annotations

import ast
import base64
import hashlib
import hmac
import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import each
from texts import texts

import router.simulator
from router.simulator import payloads, signature
from router.simulator.payloads import Head

HEAD = Head("wamid.QQ==", "999123", 1_700_000_000, "US.77")
RNG = Random(5)

EVERY_TYPE = {
    "text": payloads.text_message(HEAD, "hi"),
    "image": payloads.image_message(HEAD, RNG, "a view"),
    "audio": payloads.audio_message(HEAD, RNG),
    "video": payloads.video_message(HEAD, RNG),
    "document": payloads.document_message(HEAD, RNG, "a.pdf"),
    "sticker": payloads.sticker_message(HEAD, RNG),
    "location": payloads.location_message(HEAD, -1.25, 36.8, "here"),
    "contacts": payloads.contacts_message(HEAD, "Ada", "999124"),
    "reaction": payloads.reaction_message(HEAD, "wamid.Qg==", "👍"),
    "button": payloads.button_message(HEAD, "yes", "Yes"),
    "order": payloads.order_message(HEAD, "cat", [("sku", 2, 1.5)], "KES"),
    "system": payloads.system_message(HEAD, "999125"),
    "request_welcome": payloads.request_welcome_message(HEAD),
    "unsupported": payloads.unsupported_message(HEAD),
    "edit": payloads.edit_message(HEAD, "wamid.Qg==", "hello"),
    "revoke": payloads.revoke_message(HEAD, "wamid.Qg=="),
    "hologram": payloads.future_message(HEAD),
}

EVERY_REPLY = {
    "button_reply": payloads.button_reply_message(HEAD, "id1", "One"),
    "list_reply": payloads.list_reply_message(HEAD, "id2", "Two"),
    "nfm_reply": payloads.nfm_reply_message(HEAD, {"seats": 2}),
}


@each("name", EVERY_TYPE)
def test_every_message_has_the_common_fields_and_its_content_under_its_type(name: str) -> None:
    message = EVERY_TYPE[name]
    common = {"from": "999123", "from_user_id": "US.77", "id": "wamid.QQ==", "timestamp": "1700000000"}
    assert common.items() <= message.items()
    assert message["type"] == name
    beside = set(message) - set(common) - {"type"}
    assert beside == {"request_welcome": set(), "unsupported": {"errors"}}.get(name, {name})


@pytest.mark.parametrize("name", EVERY_REPLY)
def test_interactive_replies_stand_under_their_own_name(name: str) -> None:
    message: dict[str, Any] = EVERY_REPLY[name]
    assert message["type"] == "interactive"
    assert message["interactive"]["type"] == name
    assert isinstance(message["interactive"][name], dict)


def test_a_flow_answers_with_json_inside_a_string() -> None:
    reply: dict[str, Any] = EVERY_REPLY["nfm_reply"]
    assert json.loads(reply["interactive"]["nfm_reply"]["response_json"]) == {"seats": 2}


def test_what_a_head_does_not_have_is_absent() -> None:
    message = payloads.text_message(Head("wamid.QQ==", None, 1, "US.77", context={"id": "wamid.Qg=="}), "x")
    assert "from" not in message
    assert message["context"] == {"id": "wamid.Qg=="}
    assert "emoji" not in json.dumps(payloads.reaction_message(HEAD, "wamid.Qg==", None))


def test_a_body_nests_entries_changes_and_only_lists_that_are_not_empty() -> None:
    failed = payloads.status(
        "wamid.QQ==", "failed", 7, "999", errors=[payloads.error(131026, "No", "No phone")]
    )
    change = payloads.change("42", "15550000001", statuses=[failed])
    other = payloads.other_change("account_update", {"event": "VERIFIED_ACCOUNT"})
    read = json.loads(payloads.body(payloads.entry("9", change, other)))
    assert read["object"] == "whatsapp_business_account"
    (entry,) = read["entry"]
    assert entry["id"] == "9"
    first, second = entry["changes"]
    assert first["field"] == "messages"
    assert first["value"]["metadata"] == {"display_phone_number": "15550000001", "phone_number_id": "42"}
    assert set(first["value"]) == {"messaging_product", "metadata", "statuses"}
    assert first["value"]["statuses"][0]["errors"][0]["code"] == 131026
    assert "conversation" not in first["value"]["statuses"][0]
    assert second == {"field": "account_update", "value": {"event": "VERIFIED_ACCOUNT"}}


@given(texts())
def test_any_text_survives_the_body_which_is_ascii(text: str) -> None:
    message = payloads.text_message(HEAD, text)
    body = payloads.body(payloads.entry("9", payloads.change("42", "1", messages=[message])))
    assert body.isascii()
    assert json.loads(body)["entry"][0]["changes"][0]["value"]["messages"][0]["text"]["body"] == text


def test_bodies_are_encoded_as_meta_encodes_them() -> None:
    body = payloads.body(payloads.entry("9", payloads.other_change("f", {"t": "ä b", "n": 1})))
    expected = '{"object":"whatsapp_business_account","entry":[{"id":"9","changes":'
    expected += r'[{"value":{"t":"\u00e4 b","n":1},"field":"f"}]}]}'
    assert body == expected.encode()


def test_wamids_hold_the_number_and_are_unique() -> None:
    rng = Random(1)
    made = [payloads.wamid("999123456789", rng) for _ in range(5_000)]
    assert len(set(made)) == len(made)
    raw = base64.b64decode(made[0].removeprefix("wamid."), validate=True)
    assert b"999123456789" in raw
    assert payloads.wamid("999123456789", rng, outbound=True) not in made


@given(texts(min_size=1), st.binary())
def test_the_signature_is_the_hmac_of_the_bytes(secret: str, body: bytes) -> None:
    expected = hmac.new(secret.encode("utf-8"), body, hashlib.sha256).hexdigest()
    assert signature(secret, body) == f"sha256={expected}"


def test_the_signature_of_a_published_vector() -> None:
    # RFC 4231, test case 2
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert signature("Jefe", b"what do ya want for nothing?") == f"sha256={expected}"


def test_the_package_imports_nothing_of_ours_but_itself() -> None:
    imported = set()
    for file in Path(router.simulator.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module if node.level == 0 and node.module else "relative")
    foreign = {name for name in imported if name.split(".")[0] not in {*sys.stdlib_module_names, "trio"}}
    assert foreign
    assert all(name == "router.simulator" or name.startswith("router.simulator.") for name in foreign)
