"""What `bench hang` concludes from what it saw, and one short call of it on real processes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tables import each

from bench.hang import Accounts, HangRound, HangRounds, HangSettings, acked_of, judge, run, what_was_lost
from bench.load import LoadResult
from bench.rounds import Round
from bench.verdicts import missed

SERVED = Accounts(rides={"delivered": 6}, insurance={"delivered": 5}, recoverable=0, problems=[])
HUNG = replace(SERVED, insurance={"journaled": 4, "dead_letter": 1}, recoverable=4)


def load(acked: int) -> Round:
    result = LoadResult(
        mode="open",
        connections=2,
        sent=acked,
        ok=acked,
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
    return Round("one hangs", 1, result, acked, 1, 1, 0.1, 0.1, 0, 1.0, 1, 1, [])


LOADS = (load(3), load(8))


def hang_round(p95: float, *, hang: bool, void: bool = False, peak: float = 50.0) -> HangRound:
    reasons = ["too few rows"] if void else []
    return HangRound(hang, load(8), 4, {"p95": p95}, peak, HUNG if hang else SERVED, void=reasons)


def rounds(*pairs: tuple[float, float]) -> HangRounds:
    made = HangRounds()
    made.pairs = [(hang_round(calm, hang=False), hang_round(hung, hang=True)) for calm, hung in pairs]
    return made


def test_senders_take_turns():
    assert (acked_of(LOADS, 0), acked_of(LOADS, 1)) == (6, 5)


def test_nothing_is_lost_while_everything_is_somewhere():
    assert what_was_lost(False, LOADS, SERVED, 4) == []
    assert what_was_lost(True, LOADS, HUNG, 4) == []


@each(
    ("accounts", "seen", "said"),
    [
        (replace(HUNG, problems=["item 3 is missing"]), 4, "item 3 is missing"),
        (replace(HUNG, rides={"delivered": 5, "journaled": 1}), 4, "6 rides were acked"),
        (HUNG, 3, "their handler was called 3 times"),
        (replace(HUNG, insurance={"journaled": 4}), 4, "5 for insurance were acked"),
        (replace(HUNG, insurance={"journaled": 4, "rejected": 1}), 4, "in no place"),
        (replace(HUNG, recoverable=3), 4, "recovery would find 3"),
    ],
)
def test_what_disagrees_is_named(accounts, seen, said):
    [reason] = what_was_lost(True, LOADS, accounts, seen)
    assert said in reason


def test_the_median_of_the_pairs_decides():
    assert missed(judge(rounds((10, 11), (10, 30), (10, 11.5)))) == []
    [verdict] = missed(judge(rounds((10, 11), (10, 12.5), (10, 13))))
    assert verdict.value == pytest.approx(1.25)


def test_a_void_round_takes_its_pair_out_and_too_few_pairs_decide_nothing():
    result = rounds((10, 11), (10, 11))
    result.pairs[0] = (result.pairs[0][0], hang_round(99, hang=True, void=True))
    assert result.ratios() == [pytest.approx(1.1)]
    assert [verdict.value for verdict in missed(judge(result))] == [None]


def test_memory_and_losses_decide_too():
    result = rounds((10, 10))
    result.pairs[0][1].peak_rss_mib = 300.0
    result.pairs[0][0].lost.append("item 3 is missing")
    assert [verdict.value for verdict in missed(judge(result))] == [300.0, 1.0]
    assert len(missed(judge(HangRounds()))) == 3


@pytest.mark.postgres
def test_a_short_call(tmp_path: Path):
    """Its latencies say nothing in so short a time, but nothing may be lost."""
    path = tmp_path / "hang.json"
    assert run(HangSettings(rounds=1, seconds=0.5, saturation_rounds=1), path) in (0, 1)
    result = json.loads(path.read_text())
    assert [one["hang"] for one in result["rounds"]] == [False, True]
    assert [one["lost"] for one in result["rounds"]] == [[], []]
    calm, hung = (one["accounts"]["insurance"] for one in result["rounds"])
    assert set(calm) == {"delivered"}
    assert hung
    assert set(hung) <= {"journaled", "deferred"}
    assert result["offered_per_second"] == pytest.approx(0.4 * result["saturation_per_second"])
