"""`python -m bench deliver`: what its numbers mean, and one small round of each kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import scenarios_kit as kit

from bench.deliver import DeliverRound, DeliverSettings, judge, measured, medians
from bench.deliver_client import KINDS
from bench.deliver_service import whole


@pytest.fixture
def home() -> Iterator[Path]:
    with kit.new_home() as home:
        yield home


def rounds(**per_second: float) -> list[DeliverRound]:
    return [DeliverRound(kind, 1_000, 1_000, 1_000 / rate, 1.0) for kind, rate in per_second.items()]


def passed(found: list[DeliverRound]) -> list[bool]:
    return [one.passed for one in judge(found)]


def test_the_goals_are_ratios() -> None:
    assert passed(rounds(router=10_000, httpx=500, httpcore=3_333)) == [True, True]
    assert passed(rounds(router=10_000, httpx=501, httpcore=3_400)) == [False, False]


def test_what_was_not_recorded_does_not_count() -> None:
    lost = DeliverRound("router", 1_000, 999, 0.01, 1.0)
    assert medians([lost])["router"] is None
    assert passed([lost, *rounds(httpx=500, httpcore=3_000)]) == [False, False]


def test_the_service_knows_where_a_request_ends() -> None:
    request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    assert whole(bytearray(request)) == len(request)
    assert whole(bytearray(request + b"POST")) == len(request)
    assert whole(bytearray(request[:-1])) == 0
    assert whole(bytearray(b"POST / HT")) == 0


@pytest.mark.postgres
async def test_each_kind_delivers_and_records(home: Path) -> None:
    settings = DeliverSettings(rounds=1, lanes=4, router=40, httpcore=20, httpx=20)
    found = await measured(settings, home, lambda line: None)
    assert [one.kind for one in found] == list(KINDS)
    assert all(one.recorded == one.deliveries for one in found)
    assert all(one.cpu_seconds > 0 for one in found)
