"""The format of a spool file: what was written is read, and what was not written is not, whatever happens to
the bytes.
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.messages import Spooled
from router.spool.records import MAGIC, Damage, Record, encode, scan

KEY = bytes(range(16))
BODIES = st.builds(
    Spooled,
    app=st.text(st.characters(codec="ascii"), max_size=20),
    body=st.binary(max_size=200),
    correlation_id=st.text("abc-", max_size=20),
    traceparent=st.none() | st.just("00-" + "1" * 32 + "-" + "2" * 16 + "-01"),
)


def body(text: bytes) -> Spooled:
    return Spooled("default", text, "c-1", None)


def written(bodies: list[Spooled]) -> bytes:
    return b"".join(encode(KEY, number, one) for number, one in enumerate(bodies, 1))


def read(data: bytes, after: int = 0) -> list[Spooled]:
    return [found.spooled for found in scan(data, KEY, after) if isinstance(found, Record)]


@given(st.lists(BODIES, max_size=8))
def test_what_was_written_is_read(bodies: list[Spooled]) -> None:
    found = list(scan(written(bodies), KEY))
    assert [one.spooled for one in found if isinstance(one, Record)] == bodies
    assert [one.number for one in found if isinstance(one, Record)] == list(range(1, len(bodies) + 1))
    assert sum(one.size for one in found if isinstance(one, Record)) == len(written(bodies))


@given(st.lists(BODIES, min_size=1, max_size=4), st.data())
def test_a_torn_end_costs_what_was_being_written(bodies: list[Spooled], data: st.DataObject) -> None:
    whole = written(bodies)
    last = len(encode(KEY, len(bodies), bodies[-1]))
    kept = data.draw(st.integers(len(whole) - last, len(whole) - 1))
    found = list(scan(whole[:kept], KEY))
    assert [one.spooled for one in found if isinstance(one, Record)] == bodies[:-1]
    damages = [one for one in found if isinstance(one, Damage)]
    assert all(one.torn and one.end == kept for one in damages)
    assert bool(damages) == (kept > len(whole) - last)


def mutated(rng: Random, whole: bytes) -> bytes:
    """The file after something happened to it: bytes changed, cut out, put in, or moved."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randint(0, len(whole))
        end = rng.randint(start, min(len(whole), start + 300))
        if rng.random() < 0.5:
            put = rng.randbytes(rng.randint(0, 40))
        else:
            again = rng.randint(0, len(whole))
            put = whole[again : again + 300]
        whole = whole[:start] + put + whole[end:]
    return whole


def judge(bodies: list[Spooled], changed: bytes) -> None:
    """What is read of a mutated file is some of what was written, in order, and the rest is accounted for."""
    found = list(scan(changed, KEY))
    numbers = [one.number for one in found if isinstance(one, Record)]
    assert numbers == sorted(set(numbers))
    for one in found:
        if isinstance(one, Record):
            assert one.spooled == bodies[one.number - 1]
    sizes = [one.size if isinstance(one, Record) else one.end - one.start for one in found]
    assert sum(sizes) == len(changed)


def judge_files(bodies: list[Spooled], seed: int, files: int) -> None:
    rng, whole = Random(seed), written(bodies)
    for _ in range(files):
        judge(bodies, mutated(rng, whole))


SEEDS = st.integers(0, 2**64)
SOME = st.lists(BODIES, min_size=1, max_size=5)


@given(SOME, SEEDS)
def test_nothing_is_invented_and_nothing_raised(bodies: list[Spooled], seed: int) -> None:
    judge_files(bodies, seed, 10)


@pytest.mark.acceptance
@settings(max_examples=1_000)
@given(SOME, SEEDS)
def test_nothing_is_invented_in_a_hundred_thousand_files(bodies: list[Spooled], seed: int) -> None:
    judge_files(bodies, seed, 100)


def test_a_record_that_cannot_be_read_costs_no_other() -> None:
    bodies = [body(b"a" * 50), body(b"b" * 50), body(b"c" * 50)]
    whole = bytearray(written(bodies))
    at = whole.index(b"b" * 50)
    whole[at] ^= 1
    first, damage, last = scan(bytes(whole), KEY)
    assert isinstance(first, Record)
    assert isinstance(last, Record)
    assert (first.number, last.number) == (1, 3)
    assert isinstance(damage, Damage)
    assert not damage.torn
    assert (damage.start, damage.end) == (first.size, len(whole) - last.size)


def test_a_record_inside_a_body_is_none() -> None:
    """Whoever signs a body may write what looks like a record: without the key of the file it is none."""
    forged = body(encode(bytes(16), 1, body(b"forged")) + encode(b"\1" * 16, 2, body(b"forged")))
    whole = bytearray(written([forged]))
    assert read(bytes(whole)) == [forged]
    whole[0] ^= 1
    assert read(bytes(whole)) == []


def test_an_older_number_is_none() -> None:
    assert read(written([body(b"a")]) * 2) == [body(b"a")]
    assert read(written([body(b"a"), body(b"b")]), after=1) == [body(b"b")]


def test_lengths_are_believed_only_as_far_as_there_are_bytes() -> None:
    data = MAGIC + (1).to_bytes(8) + (2**32 - 1).to_bytes(4) * 2 + bytes(16)
    [damage] = scan(data, KEY)
    assert isinstance(damage, Damage)
    assert damage.torn
