"""What `bench outage` concludes from what it saw, and one short call of it on real processes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.load import LoadResult
from bench.outage import OutageRound, OutageSettings, judge, run
from bench.verdicts import missed

LOAD = LoadResult(
    mode="open",
    connections=2,
    sent=5,
    ok=5,
    failed=0,
    unanswered=0,
    statuses={},
    reconnects=0,
    queued=0,
    seconds=1.0,
    ended_by="time",
    cpu_seconds=0.1,
    cpu_us_per_request=1.0,
    latency_ms={},
)
GOOD = OutageRound(LOAD, LOAD, spooled_bytes=100, catch_up_seconds=1.0, lost=[])


@pytest.mark.parametrize(
    "bad",
    [
        replace(GOOD, away=replace(LOAD, failed=1)),
        replace(GOOD, there=replace(LOAD, unanswered=1)),
        replace(GOOD, lost=["one is missing"]),
    ],
)
def test_one_bad_round_fails_it(bad: OutageRound) -> None:
    assert missed(judge([GOOD, GOOD])) == []
    assert len(missed(judge([GOOD, bad]))) == 1


@pytest.mark.postgres
def test_a_short_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "outage.json"
    assert run(OutageSettings(rounds=1, seconds=3, rate=50, connections=4), result) == 0
    [one] = json.loads(result.read_text())["rounds"]
    assert one["away"]["ok"] == 150
    assert one["spooled_bytes"] > 0
    assert "is away" in capsys.readouterr().out
