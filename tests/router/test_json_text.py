"""What is read leniently can be written strictly: no NUL, no half of a pair, no NaN reaches jsonb."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tables import each
from texts import texts

from router.json_text import MAX_NESTING, encode, is_storable, parse, storable

TEXTS = st.one_of(
    texts(max_size=6),
    st.text(
        alphabet=[chr(92), "u", "0", "d", "8", "\0", "\ud83d", "\ude00", "😀", '"', "\ud800"], max_size=8
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)


def texts_of(value: Any) -> str:
    """Every text in a value, one after the other."""
    if isinstance(value, dict):
        return " ".join(f"{key} {texts_of(one)}" for key, one in value.items())
    if isinstance(value, list):
        return " ".join(map(texts_of, value))
    return value if isinstance(value, str) else ""


def is_plain(text: str) -> bool:
    return not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in text)


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


class TestParse:
    @each(
        ("body", "value"),
        [
            (b'{"a":"\\ud800"}', {"a": "\ud800"}),
            (b'{"a":"\\ud83d\\ude00"}', {"a": "😀"}),
            (b'"\\u0000"', "\0"),
            (b'{"a":1,"a":2}', {"a": 2}),
            (b"[Infinity]", [math.inf]),
            (b"  7\n", 7),
        ],
    )
    def test_it_is_lenient(self, body: bytes, value: Any) -> None:
        assert parse(body) == value

    def test_nan(self) -> None:
        assert math.isnan(parse(b"NaN"))

    @each(
        "body",
        [
            b"",
            b"{",
            b"'a'",
            b'"\xff"',
            b'"\xed\xa0\x80"',
            b"\xef\xbb\xbf1",
            b'"\x00"',
            b"9" * 5000 + b"x",
            b"[1,]",
        ],
    )
    def test_what_is_not_json_is_a_value_error(self, body: bytes) -> None:
        with pytest.raises(ValueError, match="not JSON"):
            parse(body)

    @pytest.mark.parametrize("inner", [b"", b'"\\ud800"', b"NaN"])
    def test_nesting_has_one_limit_whoever_reads(self, inner: bytes) -> None:
        body = b"[" * MAX_NESTING + inner + b"]" * MAX_NESTING
        assert encode({"message": parse(body)})
        assert storable({"message": parse(body)})
        for levels in (MAX_NESTING + 1, 990, 1024, 1025, 100_000):
            with pytest.raises(ValueError, match=r"nested|not JSON"):
                parse(b"[" * levels + inner + b"]" * levels)

    def test_objects_count_as_levels_and_brackets_in_texts_do_not(self) -> None:
        assert parse(b'["' + b"[{" * 5000 + b'"]')
        assert len(parse(b"[" + b",".join([b"{}"] * 5000) + b"]")) == 5000
        with pytest.raises(ValueError, match="nested"):
            parse(b'{"a":' * (MAX_NESTING + 1) + b"1" + b"}" * (MAX_NESTING + 1))

    @given(st.binary())
    def test_any_bytes(self, body: bytes) -> None:
        with contextlib.suppress(ValueError):
            parse(body)


class TestWriting:
    @given(VALUES)
    def test_what_is_stored_loads_and_has_nothing_that_jsonb_refuses(self, value: Any) -> None:
        text = storable(value)
        assert text.isascii()
        loaded = json.loads(text, parse_constant=pytest.fail)
        orjson.loads(text)
        assert is_plain(texts_of(loaded))

    @given(VALUES)
    @example({"a": math.nan})
    @example({"a": "\0"})
    @example({"\0": 1})
    @example({"a": "\\u0000"})
    @example({"a": "\\\0"})
    @example(["\ud83d\ude00"])
    def test_storable_values_are_those_that_storing_leaves_unchanged(self, value: Any) -> None:
        back = json.loads(storable(value))
        if is_storable(value):
            assert back == value
        else:
            too_long = any(abs(one) >= 2**63 for one in integers_of(value))
            assert back != value or too_long or not is_plain(texts_of(value))

    @each(
        ("value", "text"),
        [
            ("a\0b", '"a\\ufffdb"'),
            ("\ud800", '"\\ufffd"'),
            ("\udc00\ud800", '"\\ufffd\\ufffd"'),
            ("😀", '"\\ud83d\\ude00"'),
            ("\ud83d😀", '"\\ufffd\\ud83d\\ude00"'),
            ("\\u0000", '"\\\\u0000"'),
            ("\\\0", '"\\\\\\ufffd"'),
            ({"\0": math.inf, "b": [math.nan, 1]}, '{"\\ufffd":null,"b":[null,1]}'),
        ],
    )
    def test_what_it_looks_like(self, value: Any, text: str) -> None:
        assert storable(value) == text

    @given(VALUES)
    def test_what_is_sent_is_json(self, value: Any) -> None:
        json.loads(encode(value), parse_constant=pytest.fail)

    @given(VALUES)
    def test_what_was_read_is_read_again(self, value: Any) -> None:
        once = parse(json.dumps(value).encode())
        assert encode(parse(encode(once))) == encode(once)


@dataclass
class Thing:
    a: int = 1


class TestStorable:
    def circle() -> list[Any]:  # type: ignore[misc]
        made: list[Any] = []
        made.append(made)
        return made

    @each(
        "value",
        [
            math.nan,
            -math.inf,
            {"a": [math.inf]},
            {1: "a"},
            {"a": {1, 2}},
            {"a": b"x"},
            {"a": datetime(2026, 1, 1, tzinfo=UTC)},
            {"a": UUID(int=1)},
            {"a": Thing()},
            {"a": object()},
            json.loads(nested(300)),
            circle(),
        ],
    )
    def test_what_would_come_back_as_something_else_is_refused(self, value: Any) -> None:
        assert not is_storable(value)

    @each("value", [{}, [], None, "", 1.5, {"a": [1, "é", None, True, {"b": "😀"}]}, "\\u0000"])
    def test_plain_json_is_taken(self, value: Any) -> None:
        assert is_storable(value)


def integers_of(value: Any) -> list[int]:
    if isinstance(value, dict):
        return [one for inner in value.values() for one in integers_of(inner)]
    if isinstance(value, list):
        return [one for inner in value for one in integers_of(inner)]
    return [value] if isinstance(value, int) else []
