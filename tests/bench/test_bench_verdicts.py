"""The arithmetic of the benchmarks: percentiles, void rounds, ratios and goals."""

import pytest
from tables import each

from bench.ack import AckRounds, AckSettings, chosen_targets, judge
from bench.load import LoadResult
from bench.rounds import Round
from bench.verdicts import (
    Verdict,
    generator_saturated,
    latency_summary,
    missed,
    percentile,
    ratio,
    void_reasons,
)

FINE = {"generator_share": 0.4, "server_share": 0.95, "failed": 0, "unanswered": 0, "acks": 10, "rows": 10}


def round_of(
    target, connections=128, rate=1_000.0, server_us=100.0, postgres_us=50.0, void=(), mode="closed"
):
    load = LoadResult(
        mode=mode,
        connections=connections,
        sent=int(rate),
        ok=int(rate),
        failed=0,
        unanswered=0,
        statuses={"200": int(rate)},
        reconnects=0,
        queued=0,
        seconds=1.0,
        ended_by="time",
        cpu_seconds=0.1,
        cpu_us_per_request=20.0,
        latency_ms=latency_summary([0.010, 0.020]),
    )
    return Round(
        target=target,
        number=1,
        load=load,
        rows=int(rate),
        server_us=server_us,
        postgres_us=postgres_us,
        server_share=0.9,
        generator_share=0.1,
        others_share=0.0,
        settled_seconds=2.0,
        settled_server_us=server_us,
        settled_postgres_us=postgres_us,
        void=list(void),
    )


def test_percentiles_are_nearest_rank():
    ordered = [float(n) for n in range(1, 101)]
    assert [percentile(ordered, p) for p in (50, 95, 99, 99.9)] == [50, 95, 99, 100]
    assert percentile([], 50) == 0.0
    assert latency_summary([0.002, 0.001]) == {"p50": 1.0, "p95": 2.0, "p99": 2.0, "p99.9": 2.0, "max": 2.0}


@each(
    ("generator", "server", "saturated"),
    [
        (0.95, 1.0, True),
        (0.90, 1.0, True),
        (0.89, 0.99, False),
        (0.80, 0.60, True),
        (0.80, 0.75, False),
        (0.50, 0.30, False),
    ],
)
def test_generator_saturation(generator, server, saturated):
    assert generator_saturated(generator, server) is saturated


def test_a_sound_round_counts():
    assert void_reasons(**FINE) == []
    assert void_reasons(**{**FINE, "rows": None}) == []


@each(
    ("change", "reason"),
    [
        ({"generator_share": 0.97}, "generator at 97%"),
        ({"rows": 9}, "9 rows for 10 acks"),
        ({"rows": 11}, "11 rows for 10 acks"),
        ({"failed": 2}, "2 answers were not 200"),
        ({"unanswered": 3}, "3 requests were not answered"),
        ({"acks": 0, "rows": 0}, "nothing was acked"),
    ],
)
def test_what_makes_a_round_void(change, reason):
    (found,) = void_reasons(**{**FINE, **change})
    assert reason in found


def test_ratio_of_missing_values_is_missing():
    assert ratio(6.0, 2.0) == 3.0
    assert ratio(None, 2.0) is None
    assert ratio(6.0, None) is None
    assert ratio(6.0, 0.0) is None


def test_verdicts():
    assert Verdict("a", 3.0, 3.0, at_least=True, required=True).passed
    assert not Verdict("a", 2.99, 3.0, at_least=True, required=True).passed
    assert Verdict("a", 0.1, 1 / 6, at_least=False, required=True).passed
    without_value = Verdict("a", None, 3.0, at_least=True, required=True)
    optional = Verdict("b", 1.0, 3.0, at_least=True, required=False)
    assert missed([without_value, optional]) == [without_value]


def test_median_leaves_out_void_rounds_but_needs_a_majority():
    rounds = AckRounds(closed=[round_of("router", rate=r) for r in (100.0, 300.0, 200.0)])
    rounds.closed.append(round_of("router", rate=9_000.0, void=["generator"]))
    assert rounds.median("router", 128, lambda r: r.rate) == 200.0
    rounds.closed += [round_of("router", void=["rows"])] * 2
    assert rounds.median("router", 128, lambda r: r.rate) is None


def complete(router_rate=6_000.0, router_us=60.0):
    closed = []
    for connections in (32, 128):
        closed += [
            round_of("router", connections, router_rate, router_us, 20.0),
            round_of("fastapi", connections, 1_500.0, 600.0, 300.0),
            round_of("quart", connections, 400.0, 2_000.0, 300.0),
        ]
    names = ("fastapi bare", "fastapi hello", "quart bare", "quart hello")
    return AckRounds(
        closed=closed,
        ceilings=[round_of(name, 32) for name in names],
        open=[round_of("router", mode="open")],
    )


def test_a_good_run_misses_nothing(monkeypatch):
    monkeypatch.delenv("WA_CORE_P95_SLO_MS", raising=False)
    verdicts = judge(AckSettings(), complete())
    assert missed(verdicts) == []
    values = {v.name: v.value for v in verdicts}
    assert values["acks/s, router / fastapi, 128 connections"] == 4.0
    assert values["acks/s, router / quart, 32 connections"] == 15.0
    assert values["CPU per ack with Postgres, router / fastapi, 128 connections"] == pytest.approx(80 / 900)


@pytest.mark.parametrize(
    ("result", "name"),
    [
        (complete(router_rate=4_400.0), "acks/s, router / fastapi, 128 connections"),
        (complete(router_us=200.0), "CPU per ack with Postgres, router / fastapi, 128 connections"),
    ],
)
def test_a_missed_goal_is_named(result, name):
    assert [v.name for v in missed(judge(AckSettings(), result))] == [name]


def test_the_latency_limit_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("WA_CORE_P95_SLO_MS", "15")
    assert [v.name for v in missed(judge(AckSettings(), complete()))] == [
        "router p95 at 40% of its closed rate"
    ]


def test_a_peer_slower_than_its_framework_is_a_miss():
    result = complete()
    result.ceilings[0] = round_of("quart bare", 32, rate=100.0)
    assert missed(judge(AckSettings(), result))


def test_targets_are_chosen_by_name():
    present, absent = chosen_targets(["fastapi", "quart"])
    assert ([target.name for target in present], absent) == (["fastapi", "quart"], [])
    with pytest.raises(ValueError, match="no such target: nginx"):
        chosen_targets(["nginx"])
