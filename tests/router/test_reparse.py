"""What of a stored body can be read after a fix, and as what body it is journaled."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from actors.messages import Bucket
from router.channels.whatsapp import Splitter
from router.reparse import StoredEvent, readable_again

OURS = {"100", "200"}


def splitter(ours: set[str] = OURS) -> Splitter:
    return Splitter("default", dedup_key=b"k", is_ours=lambda number: number in ours)


def message(name: str, **more: Any) -> dict[str, Any]:
    return {"id": f"wamid.{name}", "from": "250", "type": "text", "text": {"body": name}, **more}


def change(number: str, *messages: Any) -> dict[str, Any]:
    return {
        "field": "messages",
        "value": {"metadata": {"phone_number_id": number}, "messages": list(messages)},
    }


def body(*changes: Any, **more: Any) -> bytes:
    whole = {"object": "whatsapp_business_account", "entry": [{"id": "1", "changes": list(changes)}]}
    return json.dumps(whole | more).encode()


def event(raw: bytes, *paths: str) -> StoredEvent:
    return StoredEvent(1, "default", raw, "c", None, paths)


def texts(raw: bytes) -> list[str]:
    found = splitter().split(json.loads(raw))
    return [str(item.message["text"]["body"]) for item in found if item.message is not None]


def test_what_is_readable_now_becomes_a_body_of_its_own() -> None:
    raw = body(change("100", message("a"), message("b")), change("200", message("c"), message("d")))
    delivery, paths = readable_again(splitter(), event(raw, "0.1.m0", "0.1.m1"))
    assert delivery is not None
    assert paths == ["0.1.m0", "0.1.m1"]
    assert texts(delivery.body) == ["c", "d"]
    assert delivery.partial
    assert all(item.bucket is None for item in delivery.items)


def test_what_is_still_malformed_stays() -> None:
    raw = body(change("100", message("a", id=7), message("b")), change("900", message("c")))
    delivery, paths = readable_again(splitter(), event(raw, "0.0.m0", "0.0.m1", "0.1.m0"))
    assert delivery is not None
    assert paths == ["0.0.m1"]
    assert texts(delivery.body) == ["b"]
    assert readable_again(splitter(), event(raw, "0.0.m0", "0.1.m0")) == (None, [])


def test_a_whole_body_that_could_not_be_split_is_journaled_as_it_is() -> None:
    raw = body(change("100", message("a")))
    delivery, paths = readable_again(splitter(), event(raw, ""))
    assert delivery is not None
    assert (paths, delivery.body, delivery.partial) == ([""], raw, False)


def test_a_part_counts_when_all_of_it_is_good() -> None:
    raw = body(change("100", message("a"), message("b", id=None)), change("200", message("c")))
    assert readable_again(splitter(), event(raw, "0.0"))[1] == []
    assert readable_again(splitter(), event(raw, "0.1"))[1] == ["0.1"]


def test_what_cannot_be_parsed_stays() -> None:
    assert readable_again(splitter(), event(b"{", "")) == (None, [])


@given(st.lists(st.tuples(st.sampled_from(["100", "200", "900"]), st.booleans()), max_size=6))
def test_after_it_each_is_readable_or_still_malformed(kinds: list[tuple[str, bool]]) -> None:
    raw = body(
        *(
            change(number, message(str(n), id=f"w{n}" if good else 7))
            for n, (number, good) in enumerate(kinds)
        )
    )
    before = splitter({"100"}).split(json.loads(raw))
    malformed = [item.path for item in before if item.bucket is Bucket.MALFORMED]
    delivery, paths = readable_again(splitter(), event(raw, *malformed))
    expected = [f"0.{n}.m0" for n, (number, good) in enumerate(kinds) if number == "200" and good]
    assert paths == (expected if kinds else [])
    assert (delivery is None) == (not paths)
    if delivery is not None:
        assert [item.bucket for item in delivery.items] == [None] * len(paths)
