"""`python -m bench storage`: what its numbers mean, without a load."""

from __future__ import annotations

from typing import Any

from bench.load import LoadResult
from bench.queries import Query, share
from bench.rounds import Round
from bench.storage import Found, Held, Life, judge


def load(rate: float, void: list[str] | None = None) -> Round:
    result: Any = object.__new__(LoadResult)
    object.__setattr__(result, "ok", int(rate * 10))
    object.__setattr__(result, "seconds", 10.0)
    return Round("router", 1, result, None, 1, 1, 1, 0.1, 0, 10, 1, 1, void or [])


def life(batch: int, records: float) -> Life:
    return Life(batch=batch, items=1, checkpoints=2, record_bytes=records, image_bytes=0, payload_bytes=600)


def query(milliseconds: float) -> Query:
    return Query("command", "file.name", [milliseconds / 1_000])


def passed(lives: list[Life], pairs: list[Held], dead: list[int]) -> list[bool]:
    return [one.passed for one in judge(Found(lives, pairs, dead, [query(1)]))]


def test_full_page_images_are_apart_and_the_payload_is_not_counted() -> None:
    assert life(100, 1_624).beyond_payload == 1_024
    assert passed([life(100, 1_624)], [], [])[0]
    assert not passed([life(100, 1_625)], [], [])[0]


def test_only_the_large_batch_must_reach_the_goal() -> None:
    verdicts = judge(Found([life(1, 9_000), life(100, 1_000)], [], [1]))
    assert [one.required for one in verdicts] == [False, True, True, True, True]


def test_nothing_measured_is_not_passed() -> None:
    assert passed([life(100, 1_000)], [], []) == [True, False, False, True]
    void = Held(load(100), load(100, ["the generator was the bottleneck"]))
    assert passed([life(100, 1_000)], [void], [5]) == [True, False, True, True]


def test_the_median_of_the_pairs_counts() -> None:
    pairs = [Held(load(100), load(share)) for share in (50, 91, 99)]
    assert passed([life(100, 1_000)], pairs, [5]) == [True, True, True, True]
    assert passed([life(100, 1_000)], [*pairs, *pairs[:1], *pairs[:1]], [5]) == [True, False, True, True]


def test_nineteen_of_twenty_queries_must_be_fast() -> None:
    assert share([query(1)] * 19 + [query(101)]) == 0.95
    assert share([]) is None
    slow = Found([life(100, 1_000)], [], [1], [query(1)] * 18 + [query(101)])
    assert [one.passed for one in judge(slow)][-1] is False
    assert [one.passed for one in judge(Found())][-1] is False
    assert Query("command", "file.name").milliseconds == float("inf")
