"""Durations in buckets: nothing is lost, and a quantile is off by its bucket at most."""

from __future__ import annotations

from bisect import bisect_left
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import each

from actors.histogram import BOUNDS, Histogram, HistogramSnapshot

SECONDS = st.one_of(st.floats(0.0, 20.0), st.floats(0.0, 0.02), st.sampled_from(BOUNDS))


def observed(seconds: list[float]) -> HistogramSnapshot:
    histogram = Histogram()
    for one in seconds:
        histogram.observe(one)
    return histogram.snapshot()


@given(st.lists(SECONDS, min_size=1, max_size=60), st.floats(0.0, 1.0))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(seconds: list[float], share: float) -> None:
    quantile = observed(seconds).quantile(share)
    assert quantile is not None
    true = sorted(seconds)[max(ceil(share * len(seconds)), 1) - 1]
    bucket = bisect_left(BOUNDS, true)
    if bucket == len(BOUNDS):
        assert quantile == BOUNDS[-1]
    else:
        assert (0.0, *BOUNDS)[bucket] <= quantile <= BOUNDS[bucket]


@given(st.lists(SECONDS, max_size=60))
def test_counts_add_up_and_quantiles_do_not_fall(seconds: list[float]) -> None:
    snapshot = observed(seconds)
    assert snapshot.count == len(seconds)
    assert len(snapshot.counts) == len(BOUNDS) + 1
    assert snapshot.seconds == pytest.approx(sum(seconds))
    below = [sum(snapshot.counts[: number + 1]) for number in range(len(BOUNDS))]
    assert below == [sum(one <= bound for one in seconds) for bound in BOUNDS]
    quantiles = [snapshot.quantile(number / 20) or 0.0 for number in range(21)]
    assert quantiles == sorted(quantiles)


def test_of_nothing_there_is_no_quantile() -> None:
    snapshot = Histogram().snapshot()
    assert (snapshot.count, snapshot.seconds) == (0, 0.0)
    assert [snapshot.quantile(share) for share in (0.0, 0.5, 1.0)] == [None] * 3


@each(
    ("share", "expected"), [(0.0, 0.1), (0.25, 0.175), (0.5, 0.25), (0.75, 10.0), (0.99, 10.0), (1.0, 10.0)]
)
def test_within_a_bucket_they_count_as_evenly_spread(share: float, expected: float) -> None:
    assert observed([0.2, 0.2, 11.0, 100.0]).quantile(share) == pytest.approx(expected)


def test_a_snapshot_is_of_its_moment() -> None:
    histogram = Histogram()
    histogram.observe(0.2)
    before = histogram.snapshot()
    histogram.observe(0.2)
    assert (before.count, histogram.snapshot().count) == (1, 2)
