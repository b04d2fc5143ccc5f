"""What `bench recover` concludes from what it saw, and one short call of it on real processes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.recover import Found, Rates, RecoverSettings, judge, run
from bench.verdicts import missed

FOUND = Found(first_seconds=1.0, all_seconds=1.5, problems=[])
RATES = Rates(normal=1_000.0, recovering=600.0, problems=[])


@pytest.mark.parametrize(
    ("found", "rates"),
    [
        (replace(FOUND, first_seconds=2.1), RATES),
        (FOUND, replace(RATES, recovering=499.0)),
        (FOUND, replace(RATES, problems=["one is missing"])),
        (replace(FOUND, problems=["one is missing"]), RATES),
    ],
)
def test_each_line_can_be_missed(found: Found, rates: Rates) -> None:
    assert missed(judge(FOUND, RATES)) == []
    assert len(missed(judge(found, rates))) == 1


@pytest.mark.postgres
def test_a_short_call(tmp_path: Path) -> None:
    result = tmp_path / "recover.json"
    settings = RecoverSettings(completed=5_000, old=20, undelivered=500, seconds=1.0, connections=4)
    run(settings, result)
    told = json.loads(result.read_text())
    assert told["found"]["problems"] == told["rates"]["problems"] == []
    assert told["found"]["all_seconds"] >= told["found"]["first_seconds"] > 0
