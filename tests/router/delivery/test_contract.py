"""Bodies fit docs/delivery.schema.json; an answer is read exactly when docs/answer.schema.json takes it."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tables import each
from texts import patterns, texts

from actors.messages import UNCHANGED, Ack, Envelope, Reply, Session, SessionChange
from actors.ports import Unreadable
from router.delivery.contract import VERSION, body_of, checked, read_answer

DOCS = Path(__file__).parents[3] / "docs"
DELIVERY = json.loads((DOCS / "delivery.schema.json").read_text())
ANSWER = json.loads((DOCS / "answer.schema.json").read_text())
FITS_DELIVERY = Draft202012Validator(DELIVERY, format_checker=Draft202012Validator.FORMAT_CHECKER)
FITS_ANSWER = Draft202012Validator(ANSWER)

ENVELOPE = Envelope(
    id="msg_" + "0a" * 16,
    message_id="wamid.QQ==",
    domain="rides",
    session=Session(key="1:250", phone_number_id="1", wa_id="250", active_service="rides", state={"n": 1}),
    message={"id": "wamid.QQ==", "from": "250", "type": "text", "text": {"body": "taxi"}},
    contact={"wa_id": "250"},
    received_at=datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
    correlation_id="c-1",
)


def known(name: str) -> bool:
    return name in {"rides", "jobs"}


def read(body: bytes | dict[str, Any]) -> Ack | Unreadable:
    return read_answer(body if isinstance(body, bytes) else json.dumps(body).encode(), known)


class TestBody:
    @pytest.mark.parametrize("schema", [DELIVERY, ANSWER], ids=["delivery", "answer"])
    def test_the_schemas_are_schemas(self, schema: dict[str, Any]) -> None:
        Draft202012Validator.check_schema(schema)
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"

    def test_a_body_says_what_the_envelope_says(self) -> None:
        assert json.loads(body_of(ENVELOPE)) == {
            "version": 1,
            "id": ENVELOPE.id,
            "message_id": "wamid.QQ==",
            "domain": "rides",
            "attempt": 1,
            "redelivered": False,
            "replay": False,
            "received_at": "2026-01-02T03:04:05.000678+00:00",
            "correlation_id": "c-1",
            "session": {
                "key": "1:250",
                "phone_number_id": "1",
                "wa_id": "250",
                "user_id": None,
                "active_service": "rides",
                "state": {"n": 1},
                "version": 0,
            },
            "contact": {"wa_id": "250"},
            "message": ENVELOPE.message,
        }

    def test_the_schema_names_every_property_and_no_other(self) -> None:
        body = json.loads(body_of(ENVELOPE))
        for written, schema in ((body, DELIVERY), (body["session"], DELIVERY["properties"]["session"])):
            assert set(written) == set(schema["properties"]) == set(schema["required"])
        assert DELIVERY["properties"]["version"]["const"] == VERSION

    @given(
        st.builds(
            Envelope,
            id=patterns(r"msg_[0-9a-f]{32}(_r[1-9][0-9]?)?"),
            message_id=st.one_of(st.none(), texts(min_size=1)),
            domain=st.sampled_from(["rides", "ai_agents"]),
            session=st.builds(
                Session,
                key=texts(),
                phone_number_id=texts(),
                wa_id=st.one_of(st.none(), texts()),
                user_id=st.one_of(st.none(), texts()),
                active_service=st.sampled_from([None, "jobs"]),
                state=st.dictionaries(texts(), st.floats(), max_size=2),
                version=st.integers(0, 2**62),
            ),
            message=st.dictionaries(texts(), st.one_of(texts(), st.floats(), st.none()), max_size=3),
            contact=st.one_of(st.none(), st.dictionaries(texts(), texts(), max_size=2)),
            received_at=st.datetimes(min_value=datetime(2020, 1, 1), timezones=st.just(UTC)),
            correlation_id=patterns(r"[A-Za-z0-9._:\-]{1,128}"),
            attempt=st.integers(1, 9),
            redelivered=st.booleans(),
            replay=st.booleans(),
        )
    )
    def test_every_body_fits_the_schema(self, envelope: Envelope) -> None:
        FITS_DELIVERY.validate(json.loads(body_of(envelope), parse_constant=pytest.fail))

    @each(
        ("name", "value"),
        [
            ("version", 2),
            ("id", "wamid.1"),
            ("attempt", 0),
            ("attempt", "1"),
            ("received_at", "yesterday"),
            ("message", None),
            ("session", {}),
            ("domain", "Rides"),
        ],
    )
    def test_the_schema_refuses_another_body(self, name: str, value: object) -> None:
        assert not FITS_DELIVERY.is_valid(json.loads(body_of(ENVELOPE)) | {name: value})

    def test_a_message_that_has_no_utf8_form_is_sent_in_escapes(self) -> None:
        body = body_of(Envelope(**(fields_of(ENVELOPE) | {"message": {"x": "\ud83d", "n": math.nan}})))
        assert json.loads(body, parse_constant=pytest.fail)["message"] == {"x": "\ud83d", "n": None}


def fields_of(envelope: Envelope) -> dict[str, Any]:
    return {name: getattr(envelope, name) for name in Envelope.__dataclass_fields__}


class TestAnswer:
    @each("body", [b"", b" \r\n", b"{}", b'{"replies":[],"session":null}', b'{"more":1}'])
    def test_nothing_said_is_an_ack(self, body: bytes) -> None:
        assert read(body) == Ack(session=None)

    def test_replies_keep_their_order_and_their_content(self) -> None:
        message = {"type": "image", "image": {"link": "https://x"}}
        answer = read({"replies": [{"text": "one"}, message, {"type": "text", "text": {"body": "three"}}]})
        assert isinstance(answer, Ack)
        assert answer.replies == (
            Reply("one"),
            Reply(message=message),
            Reply(message={"type": "text", "text": {"body": "three"}}),
        )

    @each(
        ("session", "active", "state"),
        [
            ({}, UNCHANGED, UNCHANGED),
            ({"active_service": None}, None, UNCHANGED),
            ({"active_service": "jobs"}, "jobs", UNCHANGED),
            ({"state": {}}, UNCHANGED, {}),
            ({"state": {"a": [1]}, "active_service": None}, None, {"a": [1]}),
        ],
    )
    def test_absent_is_unchanged_and_null_is_cleared(
        self, session: dict[str, Any], active: object, state: object
    ) -> None:
        assert read({"session": session}) == Ack(session=SessionChange(active_service=active, state=state))  # type: ignore[arg-type]

    @each(
        ("body", "reason"),
        [
            (b"OK", "not JSON"),
            (b"<html>", "not JSON"),
            (b"\xff", "not JSON"),
            (b"NaN", "not JSON"),
            (b'{"session":{"state":{"a":NaN}}}', "not JSON"),
            (b"null", "not an object"),
            (b"[]", "not an object"),
            (b'"ok"', "not an object"),
            ({"replies": {}}, "not a list"),
            ({"replies": "hi"}, "not a list"),
            ({"replies": ["hi"]}, "not an object"),
            ({"replies": [{}]}, "neither"),
            ({"replies": [{"text": 5}]}, "neither"),
            ({"replies": [{"text": "hi", "to": "250"}]}, "neither"),
            ({"replies": [{"type": "text", "text": {"body": "x"}, "to": "250"}]}, "neither"),
            ({"replies": [{"text": "hi"}, {"type": 5}]}, "neither"),
            ({"replies": [{"text": "a\0b"}]}, "stored"),
            ({"replies": [{"type": "text", "x": {"\0": 1}}]}, "stored"),
            ({"session": []}, "not an object"),
            ({"session": {"active_service": 5}}, "neither null nor a name"),
            ({"session": {"active_service": ""}}, "no domain"),
            ({"session": {"active_service": "taxis"}}, "no domain"),
            ({"session": {"state": None}}, "not an object"),
            ({"session": {"state": [1]}}, "not an object"),
            ({"session": {"state": {"a": "\0"}}}, "stored"),
        ],
    )
    def test_what_cannot_be_read_says_why(self, body: bytes | dict[str, Any], reason: str) -> None:
        answer = read(body)
        assert isinstance(answer, Unreadable)
        assert reason in answer.reason

    def test_deep_nesting_is_unreadable_not_an_error(self) -> None:
        for levels in (260, 1000, 100_000):
            deep = b"[" * levels + b"]" * levels
            assert isinstance(read(b'{"session":{"state":{"a":' + deep + b"}}}"), Unreadable)

    TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
    VALUES = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-5, 5), TEXTS),
        lambda inner: st.one_of(
            st.lists(inner, max_size=2),
            st.dictionaries(st.sampled_from(["text", "type", "to", "state", "x"]), inner, max_size=3),
        ),
        max_leaves=4,
    )
    REPLIES = st.fixed_dictionaries(
        {}, optional={"text": st.one_of(TEXTS, VALUES), "type": st.one_of(TEXTS, VALUES), "to": TEXTS}
    )
    SESSIONS = st.fixed_dictionaries(
        {},
        optional={
            "active_service": st.sampled_from(["rides", "jobs", None, 5]),
            "state": st.one_of(VALUES, st.just({"a": 1})),
        },
    )
    ANSWERS = st.one_of(
        VALUES,
        st.fixed_dictionaries(
            {},
            optional={
                "replies": st.one_of(st.lists(st.one_of(REPLIES, VALUES), max_size=3), VALUES),
                "session": st.one_of(SESSIONS, VALUES),
            },
        ),
    )

    @given(ANSWERS)
    def test_the_schema_and_the_reader_agree(self, answer: Any) -> None:
        assert isinstance(read(json.dumps(answer).encode()), Ack) is FITS_ANSWER.is_valid(answer)

    @given(st.binary())
    def test_any_bytes_are_read(self, body: bytes) -> None:
        assert isinstance(read(body), Ack | Unreadable)


class TestChecked:
    """What a handler in process may hand over, whatever its annotations say."""

    @each(
        "ack",
        [
            Ack(None),  # type: ignore[arg-type]
            Ack("hi"),  # type: ignore[arg-type]
            Ack(("hi",)),  # type: ignore[arg-type]
            Ack((Reply(message="hi"),)),  # type: ignore[arg-type]
            Ack((Reply(message={"type": "text", "n": math.nan}),)),
            Ack((Reply(message={"type": "text", "at": timedelta(1)}),)),
            Ack((Reply("\ud800"),)),
            Ack(session={"state": {}}),  # type: ignore[arg-type]
            Ack(session=SessionChange(active_service=5)),  # type: ignore[arg-type]
            Ack(session=SessionChange(active_service="taxis")),
            Ack(session=SessionChange(state=[])),  # type: ignore[arg-type]
            Ack(session=SessionChange(state=None)),  # type: ignore[arg-type]
            Ack(session=SessionChange(state={"at": datetime(2026, 1, 1, tzinfo=UTC)})),
            Ack(session=SessionChange(state={1: 2})),  # type: ignore[dict-item]
            Ack(session=SessionChange(state={"n": math.inf})),
        ],
    )
    def test_what_could_not_be_committed_is_unreadable(self, ack: Ack) -> None:
        assert isinstance(checked(ack, known), Unreadable)

    def test_the_rest_is_the_same_ack(self) -> None:
        ack = Ack((Reply("hi"),), SessionChange(active_service="rides", state={"a": [1]}))
        assert checked(ack, known) is ack

    def test_a_state_that_is_another_mapping_becomes_an_object(self) -> None:
        ack = checked(Ack(session=SessionChange(state=MappingProxyType({"a": 1}))), known)
        assert isinstance(ack, Ack)
        assert ack.session is not None
        assert type(ack.session.state) is dict
