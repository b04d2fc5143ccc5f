"""What may be sent is told from what may not, and errors have the form in which Graph writes them."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tables import each
from texts import texts

from router.simulator.graph_messages import (
    MAX_TEXT,
    PAIR_LIMIT,
    UNREADABLE,
    Asked,
    GraphError,
    asked,
    sending_number,
)

GOOD: dict[str, Any] = {
    "messaging_product": "whatsapp",
    "to": "999123",
    "type": "text",
    "text": {"body": "hi"},
}


def without(*names: str, **more: Any) -> bytes:
    return json.dumps({k: v for k, v in GOOD.items() if k not in names} | more).encode()


def test_a_text_for_a_phone() -> None:
    judged = asked("1001", without(biz_opaque_callback_data="b1", recipient_type="individual"))
    assert isinstance(judged, Asked)
    assert (judged.phone_number_id, judged.recipient, judged.is_phone) == ("1001", "999123", True)
    assert (judged.text, judged.callback_data) == ("hi", "b1")
    assert judged.message == {
        "type": "text",
        "text": {"body": "hi"},
        "biz_opaque_callback_data": "b1",
        "recipient_type": "individual",
    }


@each(
    ("body", "recipient", "text"),
    [
        (without(to="+999123"), "999123", "hi"),
        (without("to", recipient="US.13491"), "US.13491", "hi"),
        (without("text", type="image", image={"id": "7"}), "999123", ""),
        (without("text", type="contacts", contacts=[{}]), "999123", ""),
        (without(text={"body": "ä" * MAX_TEXT}), "999123", "ä" * MAX_TEXT),
    ],
)
def test_what_may_be_sent(body: bytes, recipient: str, text: str) -> None:
    judged = asked("1001", body)
    assert isinstance(judged, Asked)
    assert (judged.recipient, judged.text, judged.callback_data) == (recipient, text, None)


@each(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b"[]",
        b'"text"',
        without("messaging_product"),
        without(messaging_product="sms"),
        without("to"),
        without(recipient="US.13491"),
        without(to=999123),
        without(to="US.13491"),
        without(to=""),
        without("to", recipient="999123"),
        without("to", recipient="US.ä"),
        without("to", recipient="x" * 129),
        without("type"),
        without("text"),
        without(type="to"),
        without(type=["text"]),
        without(text="hi"),
        without(text={}),
        without(text={"body": ""}),
        without(text={"body": "x" * (MAX_TEXT + 1)}),
        without(type="image", image=[]),
        without(type="contacts", contacts={}),
    ],
)
def test_what_may_not_be_sent(body: bytes) -> None:
    judged = asked("1001", body)
    assert isinstance(judged, GraphError)
    assert (judged.status, judged.code) == (400, UNREADABLE)


@given(st.binary() | st.recursive(st.none() | texts(), st.lists).map(lambda v: json.dumps(v).encode()))
def test_nothing_raises(body: bytes) -> None:
    assert isinstance(asked("1001", body), GraphError)


@each(
    ("target", "number"),
    [
        ("/v23.0/1001/messages", "1001"),
        ("/v9.12/1/messages", "1"),
        ("/1001/messages", None),
        ("/v23/1001/messages", None),
        ("/v23.0//messages", None),
        ("/v23.0/a/messages", None),
        ("/v23.0/1001/messages/", None),
        ("/v23.0/1001/messages?x=1", None),
        ("/v23.0/1001/media", None),
    ],
)
def test_the_path_names_the_number(target: str, number: str | None) -> None:
    assert sending_number(target) == number


def test_errors_have_the_form_of_graph() -> None:
    error: Any = PAIR_LIMIT.answer(Random(1))["error"]
    assert set(error) == {"message", "type", "code", "error_data", "fbtrace_id"}
    assert (error["type"], error["code"]) == ("OAuthException", 131056)
    assert error["message"].startswith("(#131056) ")
    assert error["error_data"]["messaging_product"] == "whatsapp"
    assert error["error_data"]["details"]
