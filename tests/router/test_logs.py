"""Logs: nothing personal or secret survives masking, our ids do, and a host program's logging is kept."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from tables import each
from texts import patterns, texts

from router.observe.logs import configure_logging, get_logger, mask_event
from router.observe.masking import MASKED, format_exception, mask, mask_text

SEPARATORS = ["", " ", "-", "\u2011", "\xa0", ") ", " - ", "\u200e"]
PHONES = patterns(r"[1-9][0-9]{6,14}")
READABLE = ["timestamp", "port", "seq", "pid", "count", "elapsed_ms", "body_bytes"]


@st.composite
def written_phones(draw: st.DrawFn) -> tuple[str, str]:
    """The digits of a number, and one of the ways in which people write it."""
    digits = draw(PHONES)
    written = digits[0] + "".join(draw(st.sampled_from(SEPARATORS)) + digit for digit in digits[1:])
    return digits, draw(st.sampled_from(["", "+", "00"])) + written


def digits_of(text: str) -> str:
    return "".join(char for char in text if char.isdigit())


def strings_of(value: Any) -> Iterator[str]:
    """Every text in what `mask` returned, keys included."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from (key, *strings_of(item))
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item)
    else:
        yield str(value)


AROUND = st.text(st.characters(exclude_categories=["Nd", "Cs"]), max_size=12)


@given(phone=written_phones(), before=AROUND, after=AROUND, key=texts(max_size=12))
def test_no_phone_number_survives_under_any_key(
    phone: tuple[str, str], before: str, after: str, key: str
) -> None:
    digits, written = phone
    text = f"{before} {written} {after}"
    event = {key: text, "a": [{key: (text,)}], "b": text.encode(), f"c {written}": ValueError(text)}
    for shown in strings_of(mask(event)):
        assert written not in shown
        assert digits not in digits_of(shown)


@given(number=st.integers(min_value=1_000_000, max_value=10**15), key=texts(max_size=12))
def test_numbers_are_masked_except_under_the_keys_of_counts(number: int, key: str) -> None:
    assert str(number) not in json.dumps(mask({f"{key}_x": number, "deep": [number, -number]}))
    for readable in READABLE:
        assert mask({readable: number}) == {readable: number}


@given(texts() | st.text("0123456789 -+.:/abcdefABCDEF_[]*\"'=wsnamehotk\\", max_size=80))
def test_masking_twice_changes_nothing_more(text: str) -> None:
    once = mask_text(text)
    assert mask_text(once) == once


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | texts()
    | st.binary()
    | st.uuids()
    | st.datetimes(),
    lambda inner: st.lists(inner) | st.dictionaries(texts() | st.integers(), inner) | st.tuples(inner),
    max_leaves=10,
)


@given(st.dictionaries(texts(), VALUES))
def test_any_event_can_be_written_as_json(event: dict[str, Any]) -> None:
    json.dumps(mask(event))


@each(
    "key",
    [
        "name",
        "profile",
        "contact",
        "contacts",
        "body",
        "text",
        "payload",
        "authorization",
        "Authorization",
        "signature",
        "secret",
        "token",
        "app_secret",
        "verify_token",
        "X-Hub-Signature-256",
        "password",
        "raw_body",
        "profile.name",
        "displayPhoneNumber",
        "wa_id",
        "message",
    ],
)
def test_these_values_are_replaced_whole(key: str) -> None:
    for value in ("Aline", 7_654_321, b"Aline", {"first": "Aline"}, ["Aline"]):
        assert mask({key: value}) == {key: MASKED}


def wamid(phone: str) -> str:
    return (
        "wamid." + base64.b64encode(b"\x1d\x18\x0c" + phone.encode() + b"\x15\x02\x00\x12\x18\x14AB").decode()
    )


@each(
    ("text", "shown"),
    [
        ("call +250 788-123-456 now", "call ***56 now"),
        (f"stored {wamid('250788123456')}.", "stored wamid.***"),
        ("HBgMMjUwNzg4MTIzNDU2FQIAEhg", "wamid.***"),
        ("Authorization: Bearer EAAG.x-y_z", "Authorization: Bearer [masked]"),
        ("key whsec_MfKQ9r8GKYqrTwjUPD8=", "key whsec_***"),
        ("postgresql://u:p@ss/w:rd@db:5432/x", "postgresql://u:[masked]@db:5432/x"),
        ("X-Hub-Signature-256: sha256=" + "a1" * 32, "X-Hub-Signature-256: sha256=[masked]"),
        ("GET /?hub.verify_token=open&hub.mode=x", "GET /?hub.verify_token=[masked]&hub.mode=x"),
        ('{"profile": {"name": "Aline \\" U."}}', '{"profile": {"name": [masked]}}'),
        ("{'body': 'see you', 'id': 7}", "{'body': [masked], 'id': 7}"),
        ('"{\\"text\\": \\"see you\\"}"', '"{\\"text\\": [masked]}"'),
        ('{"text": "cut of', '{"text": [masked]'),
    ],
)
def test_what_is_recognised_inside_a_text(text: str, shown: str) -> None:
    assert mask({"event": text}) == {"event": shown}


OURS = {
    "id": "msg_" + "0123456789abcdef" * 2 + "_r2",
    "correlation_id": "12345678901234567890123456789012",
    "span_id": "1234567890123456",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba90203-01",
    "flush": str(uuid.UUID(int=5**50)),
    "received_at": "2025-11-22T15:39:01.123456Z",
    "peer": "127.0.0.1:54321",
    "service": "rides",
    "rows": 12_345_678,
    "delivery_seq": 9_876_543_210,
    "elapsed_ms": 1234567.25,
    "ready": True,
    "error": None,
    "table": "whatsapp_messages_2025_w47",
}


def test_our_own_ids_times_and_counts_stay_readable() -> None:
    assert mask(OURS) == OURS
    text = f"attempt of {OURS['id']} in {OURS['flush']} by {OURS['traceparent']}"
    assert mask_text(text) == text


class Color(Enum):
    RED = "red"


class Point(NamedTuple):
    name: str
    x: int


@dataclass
class Envelope:
    text: str
    hidden: str = field(repr=False)
    attempt: int


def test_objects_are_shown_by_their_fields_or_only_by_their_type() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert mask(
        {
            "envelope": Envelope("hello", "hello", 2),
            "point": Point("Aline", 3),
            "color": Color.RED,
            "path": Path("/data/250788123456"),
            "when": datetime(2025, 1, 2, tzinfo=UTC),
            "other": io.BytesIO(b"hello"),
            "messages": 12,
        }
    ) == {
        "envelope": {"text": MASKED, "attempt": 2},
        "point": {"name": MASKED, "x": 3},
        "color": "red",
        "path": "/data/***56",
        "when": "2025-01-02T00:00:00+00:00",
        "other": "<BytesIO>",
        "messages": 12,
    }
    assert "[...]" in json.dumps(mask({"loop": loop}))


def test_keys_that_become_equal_keep_their_values() -> None:
    assert mask({"1234567": 1, "7654367": 2}) == {"***67": 1, "***67'": 2}


def test_tracebacks_are_masked_with_their_causes_and_groups() -> None:
    try:
        try:
            raise ValueError("no route for +250788123456")
        except ValueError as cause:
            raise ExceptionGroup("two", [KeyError("whsec_abc"), OSError("250 788 123 457")]) from cause
    except ExceptionGroup as error:
        shown = format_exception(error)
    assert "no route for ***56" in shown
    assert "whsec_***" in shown
    assert "***57" in shown
    assert not re.search(r"\d{7}", shown)


@pytest.fixture
def untouched_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.usefixtures("untouched_logging")
def test_unconfigured_events_go_to_the_hosts_own_logging(caplog: pytest.LogCaptureFixture) -> None:
    log = get_logger("router.somewhere", correlation_id="c1").bind(service="rides")
    with caplog.at_level("INFO", logger="router.somewhere"):
        log.debug("unseen")
        log.info("delivered", text="hello", rows=2)
        try:
            raise ValueError("+250788123456")
        except ValueError:
            log.exception("failed")
    first, second = caplog.records
    assert first.getMessage() == f"delivered correlation_id=c1 service=rides text={MASKED} rows=2"
    assert first.__dict__["postroom"] == {
        "correlation_id": "c1",
        "service": "rides",
        "text": MASKED,
        "rows": 2,
    }
    assert (first.funcName, second.levelname) == (
        "test_unconfigured_events_go_to_the_hosts_own_logging",
        "ERROR",
    )
    assert "ValueError: ***56" in second.getMessage()


@pytest.mark.usefixtures("untouched_logging")
def test_a_hosts_structlog_gets_masked_events() -> None:
    with structlog.testing.capture_logs() as events:
        structlog.configure(processors=structlog.get_config()["processors"])
        get_logger("x").warning("for +250788123456", token="t")
    assert events == [{"event": "for ***56", "token": MASKED, "log_level": "warning"}]
    assert mask_event(None, "info", {"event": "x", "secret": "s"}) == {"event": "x", "secret": MASKED}


@pytest.mark.usefixtures("untouched_logging")
def test_json_logs_of_ours_and_of_libraries_are_masked() -> None:
    stream = io.StringIO()
    configure_logging(form="json", level="info", stream=stream)
    get_logger("router.x", correlation_id="c1").info("accepted", rows=3, wa_id="250788123456")
    logging.getLogger("hypercorn").warning("peer %s", "+250788123456")
    try:
        raise ValueError("+250788123456")
    except ValueError:
        logging.getLogger("lib").exception("broken")
        get_logger("router.x").exception("broken too")
    get_logger("router.x").debug("unseen")
    ours, theirs, broken, broken_too = map(json.loads, stream.getvalue().splitlines())
    assert datetime.fromisoformat(ours.pop("timestamp")).tzinfo is not None
    assert ours == {
        "event": "accepted",
        "level": "info",
        "logger": "router.x",
        "correlation_id": "c1",
        "rows": 3,
        "wa_id": MASKED,
    }
    assert (theirs["event"], theirs["logger"]) == ("peer ***56", "hypercorn")
    assert broken["exception"].endswith("ValueError: ***56")
    assert broken_too["exception"].endswith("ValueError: ***56")


@pytest.mark.usefixtures("untouched_logging")
def test_console_logs_are_one_readable_line() -> None:
    stream = io.StringIO()
    configure_logging(stream=stream)
    get_logger("router.x").info("accepted", rows=3)
    (line,) = stream.getvalue().splitlines()
    assert re.search(r"\[info +\] accepted .*rows=3", line)


@pytest.mark.parametrize("piece", ["1 ", "a.", "x://a:", '"name":"', "\\", "HBg", "token", "a1", "wamid."])
def test_hostile_text_is_masked_in_linear_time(piece: str) -> None:
    started = time.process_time()
    mask_text(piece * (20_000 // len(piece)))
    assert time.process_time() - started < 1
