"""One person is taken out of stored bodies: nothing of theirs is left, nothing of others changes."""

from __future__ import annotations

import base64
import json
import re
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import each
from texts import texts

from actors.messages import Bucket
from router.channels.bodies import ERASED, part_at, without
from router.channels.redaction import REDACTED, Redaction
from router.channels.whatsapp import Splitter
from router.json_text import encode, parse
from router.simulator import payloads
from router.simulator.payloads import Head, Json

NUMBER = "100200300"
PERSON, USER_ID, OTHER = "250788111222", "RW.13491208655302741918", "250788333444"
SECRET = "my PIN is 4711"
RNG = Random(11)
REDACTION = Redaction([PERSON, USER_ID])


def body(*messages: Json, contacts: Any = None, **lists: Any) -> bytes:
    change = payloads.change(NUMBER, "15550783881", messages=messages, contacts=contacts, **lists)
    return payloads.body(payloads.entry("1", change))


def said(sender: str | None, text: str, **head: Any) -> Json:
    return payloads.text_message(
        Head(payloads.wamid(sender or PERSON, RNG), sender, 1_700_000_000, **head), text
    )


def without_person(*messages: Json, **more: Any) -> tuple[Any, frozenset[str]]:
    redacted = REDACTION.body(body(*messages, **more))
    assert redacted is not None
    assert PERSON.encode() not in redacted.body
    assert not any(needle in redacted.body for needle in REDACTION.needles)
    return parse(redacted.body), redacted.paths


def test_what_the_person_sent_is_gone_and_what_others_sent_is_as_it_was() -> None:
    mine, theirs = said(PERSON, SECRET), said(OTHER, "hello")
    contacts = [payloads.contact("Grace Uwase", PERSON), payloads.contact("Ada", OTHER)]
    document, paths = without_person(theirs, mine, contacts=contacts)
    assert paths == {"0.0.m1"}
    assert part_at(document, "0.0.m0") == theirs
    assert part_at(document, "0.0.m1") == ERASED
    assert document["entry"][0]["changes"][0]["value"]["contacts"] == [ERASED, contacts[1]]


@each(
    "message",
    [
        said(PERSON, SECRET),
        said(None, SECRET, user_id=USER_ID),
        said(PERSON, SECRET, user_id="another"),
        said(PERSON, SECRET, group_id="family"),
        payloads.message(Head("wamid.QQ==", OTHER, 1), "system", {"customer": PERSON}),
    ],
)
def test_who_a_message_is_of_is_said_by_any_name(message: Json) -> None:
    document, paths = without_person(message)
    assert (part_at(document, "0.0.m0"), paths) == (ERASED, {"0.0.m0"})


def test_a_status_of_a_message_to_the_person_is_theirs() -> None:
    status = {"id": payloads.wamid(PERSON, RNG, outbound=True), "status": "read", "recipient_id": PERSON}
    redacted = REDACTION.body(body(statuses=[status]))
    assert redacted is not None
    assert redacted.paths == {"0.0.s0"}


def test_others_keep_what_they_said_about_the_person_but_for_the_names() -> None:
    quoting = said(OTHER, f"call +{PERSON} or {USER_ID}, not 1{PERSON}", context={"from": PERSON, "id": "x"})
    card = payloads.contacts_message(Head("wamid.QQ==", OTHER, 1), "Grace", PERSON)
    answering = payloads.reaction_message(Head("wamid.QQ==", OTHER, 1), payloads.wamid(PERSON, RNG), "+")
    redacted = REDACTION.body(body(quoting, card, answering))
    assert redacted is not None
    assert redacted.paths == set()
    value = parse(redacted.body)["entry"][0]["changes"][0]["value"]["messages"]
    assert value[0]["text"]["body"] == f"call +{REDACTED} or {REDACTED}, not 1{PERSON}"
    assert value[0]["context"] == ERASED
    assert value[1]["contacts"] == [ERASED]
    assert value[2]["reaction"] == {"message_id": f"wamid.{REDACTED}", "emoji": "+"}


def test_another_field_about_the_person_is_gone_whole() -> None:
    change = {"field": "user_preferences", "value": {"wa_id": PERSON, "detail": SECRET}}
    both = {"field": "calls", "value": {"calls": [{"from": PERSON}, {"from": OTHER}]}}
    document = {"object": "whatsapp_business_account", "entry": [{"id": "1", "changes": [change, both]}]}
    redacted = REDACTION.body(encode(document))
    assert redacted is not None
    assert redacted.paths == {"0.0"}
    assert parse(redacted.body)["entry"][0]["changes"] == [
        {"field": "user_preferences", "value": ERASED},
        {"field": "calls", "value": {"calls": [ERASED, {"from": OTHER}]}},
    ]


@each(
    "text", [b"no JSON of " + PERSON.encode(), b'["' + PERSON.encode() + b'"]', b'"' + PERSON.encode() + b'"']
)
def test_what_cannot_be_split_is_gone_as_a_whole(text: bytes) -> None:
    redacted = REDACTION.body(text)
    assert redacted is not None
    assert (parse(redacted.body), redacted.paths) == (ERASED, {""})


def test_escapes_hide_nobody() -> None:
    escaped = "".join(f"\\u{ord(char):04x}" for char in PERSON)
    text = body(said(OTHER, "call HIM")).replace(b"HIM", escaped.encode())
    assert PERSON.encode() not in text
    assert REDACTION.may_concern(text)
    redacted = REDACTION.body(text)
    assert redacted is not None
    assert PERSON not in str(parse(redacted.body))


def test_a_number_that_is_no_text_is_found() -> None:
    assert REDACTION.part({"count": int(PERSON), "one": 1, "yes": True}) == {
        "count": REDACTED,
        "one": 1,
        "yes": True,
    }


@pytest.mark.parametrize("before", range(4))
def test_a_name_inside_base64_is_found_wherever_it_begins(before: int) -> None:
    for name in (PERSON, USER_ID):
        hidden = base64.b64encode(b"\x1c" * before + name.encode() + b"\x15\x02").decode()
        assert REDACTION.text(f"id {hidden}!") == f"id {REDACTED}!"
    longer = base64.b64encode(b"\x1c" * before + PERSON.encode() + b"9\x15").decode()
    assert REDACTION.text(longer) == longer


def test_a_message_is_theirs_also_where_only_its_contact_says_so() -> None:
    message = {**said(OTHER, SECRET, user_id="RW.2"), "id": "wamid.QQ=="}
    del message["from"]
    contact = payloads.contact("Grace", PERSON, "RW.2")
    document, paths = without_person(message, contacts=[contact, payloads.contact("Ada", OTHER)])
    assert paths == {"0.0.m0"}
    assert part_at(document, "0.0.m0") == ERASED
    assert document["entry"][0]["changes"][0]["value"]["contacts"][0] == ERASED


def test_short_names_are_looked_for_in_no_text() -> None:
    redaction = Redaction(["1"])
    assert redaction.text("1 2 1") == "1 2 1"
    redacted = redaction.body(body(said("1", "1"), said(OTHER, "1")))
    assert redacted is not None
    assert redacted.paths == {"0.0.m0"}


_PEOPLE = st.sampled_from([PERSON, OTHER, "250788555666", f"1{PERSON}", f"{PERSON}0"])
_WORDS = st.lists(st.one_of(_PEOPLE, texts(max_size=8)), max_size=4).map(" ".join)
_MESSAGES = st.builds(
    said, _PEOPLE, _WORDS, context=st.none() | st.builds(lambda who: {"from": who}, _PEOPLE)
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | _WORDS | st.just(PERSON),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(_WORDS | st.sampled_from(["from", "wa_id"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.lists(_MESSAGES | _JSON, min_size=1, max_size=5))
def test_whatever_a_body_holds_the_person_is_out_of_it_and_the_paths_stay(messages: list[Any]) -> None:
    text = body(*messages)
    redacted = REDACTION.body(text)
    after = parse(text if redacted is None else redacted.body)
    left = encode(after)
    assert REDACTION.body(left) is None  # done again, it changes nothing
    assert re.search(rf"(?<!\d){PERSON}(?!\d)", left.decode()) is None
    listed = part_at(after, "0.0")["value"]["messages"]
    assert len(listed) == len(messages)
    for position, (before, now) in enumerate(zip(messages, listed, strict=True)):
        if redacted is not None and f"0.0.m{position}" in redacted.paths:
            assert now == ERASED
        elif PERSON not in json.dumps(before):
            assert now == parse(encode(before))


_ANY = st.recursive(
    _WORDS | st.just(PERSON) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "object",
                    "entry",
                    "changes",
                    "field",
                    "value",
                    "messages",
                    "contacts",
                    "statuses",
                    "from",
                    "phones",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(_ANY)
def test_whatever_a_body_is_the_person_is_out_of_it(document: Any) -> None:
    redacted = REDACTION.body(encode(document))
    left = encode(document) if redacted is None else redacted.body
    assert REDACTION.body(left) is None
    assert re.search(rf"(?<!\d){PERSON}(?!\d)", left.decode()) is None


def test_a_body_that_was_redacted_is_split_into_erased_items() -> None:
    splitter = Splitter("default", dedup_key=b"k", is_ours=lambda number: True)
    redacted = REDACTION.body(body(said(PERSON, SECRET), said(OTHER, "hello")))
    assert redacted is not None
    assert [item.bucket for item in splitter.split(parse(redacted.body))] == [Bucket.ERASED, None]
    assert [item.bucket for item in splitter.split(ERASED)] == [Bucket.ERASED]


def test_contacts_that_others_have_too_stay_when_items_go() -> None:
    document = parse(body(said(OTHER, "a"), said(OTHER, "b"), contacts=[payloads.contact("Ada", OTHER)]))
    one = without(document, ["0.0.m0"])
    assert part_at(one, "0.0")["value"]["contacts"] == [payloads.contact("Ada", OTHER)]
    assert part_at(without(one, ["0.0.m1"]), "0.0")["value"]["contacts"] == [ERASED]
    assert parse(body(said(OTHER, "a")))["entry"]  # the original is as it was
    assert part_at(document, "0.0.m0") != ERASED
