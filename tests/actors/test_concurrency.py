"""The limit of concurrent attempts: within its bounds, down after timeouts, up while latency is flat."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import each

from actors.concurrency import Concurrency

TIMEOUT = 4.0


def timed_out(concurrency: Concurrency, rounds: int) -> None:
    """One attempt after the other that got no answer."""
    for number in range(rounds):
        concurrency.timed_out(began=number * TIMEOUT, now=(number + 1) * TIMEOUT)


def answered(concurrency: Concurrency, seconds: float, times: int = 1) -> None:
    """So many answers while as many attempts run as may."""
    for _ in range(times):
        concurrency.answered(seconds, running=concurrency.limit)


SECONDS = st.floats(0.0, 1e6)
SAID = st.one_of(
    st.tuples(st.just("answered"), SECONDS, st.integers(0, 2_000)),
    st.tuples(st.just("timed out"), SECONDS, SECONDS),
)


@given(st.integers(1, 1_024), st.integers(0, 1_023), st.lists(SAID, max_size=100))
def test_the_limit_stays_within_its_bounds_whatever_is_said(
    least: int, more: int, said: list[tuple[str, float, float]]
) -> None:
    concurrency = Concurrency(least, least + more)
    assert concurrency.limit == concurrency.most == least + more
    for what, first, second in said:
        before = concurrency.limit
        if what == "answered":
            concurrency.answered(first, running=int(second))
            assert before <= concurrency.limit <= before + 1
        else:
            concurrency.timed_out(began=first, now=second)
            assert concurrency.limit <= before
        assert least <= concurrency.limit <= least + more


def test_timeouts_of_attempts_that_ran_together_shrink_it_once() -> None:
    concurrency = Concurrency(1, 10)
    for began in (0.0, 0.5, 3.9):
        concurrency.timed_out(began=began, now=4.0 + began)
        assert concurrency.limit == 7
    concurrency.timed_out(began=4.0, now=8.0)  # began when the first one was given up
    assert concurrency.limit == 4


def test_it_grows_by_one_for_as_many_answers_as_the_limit_is() -> None:
    concurrency = Concurrency(1, 100)
    timed_out(concurrency, 1)
    assert concurrency.limit == 70
    answered(concurrency, 0.1, 65)
    assert concurrency.limit == 70
    answered(concurrency, 0.1, 10)
    assert concurrency.limit == 71


@each(("running", "grows"), [(1, False), (6, False), (7, True), (8, True)])
def test_it_grows_only_while_as_many_run_as_may(running: int, grows: bool) -> None:
    concurrency = Concurrency(1, 10)
    timed_out(concurrency, 1)
    for _ in range(50):
        concurrency.answered(0.1, running=running)
    assert (concurrency.limit > 7) is grows


def test_it_does_not_grow_while_latency_has_risen() -> None:
    concurrency = Concurrency(1, 100)
    answered(concurrency, 0.1, 200)
    timed_out(concurrency, 1)
    answered(concurrency, 0.3, 5)  # the last ten tell it, not one that was slow
    before = concurrency.limit
    answered(concurrency, 0.3, 50)
    assert concurrency.limit <= before + 1
    assert concurrency.limit < 75
    answered(concurrency, 0.1, 30)
    before = concurrency.limit
    answered(concurrency, 0.1, 2 * before)
    assert concurrency.limit > before


def test_a_latency_that_stays_becomes_the_usual_one() -> None:
    concurrency = Concurrency(1, 10)
    answered(concurrency, 0.1, 200)
    timed_out(concurrency, 5)
    answered(concurrency, 0.5, 100)
    risen = concurrency.limit
    answered(concurrency, 0.5, 1_000)
    assert risen < concurrency.limit == 10


@each(("least", "most"), [(1, 1), (1, 8), (3, 8), (8, 8), (1, 200)])
def test_nothing_but_timeouts_end_at_the_least_and_flat_answers_bring_it_back(least: int, most: int) -> None:
    concurrency = Concurrency(least, most)
    timed_out(concurrency, 50)
    assert concurrency.limit == least
    answered(concurrency, 0.1, 2 * most * most)
    assert concurrency.limit == most


@each(("least", "most"), [(0, 1), (0, 0), (-1, 5), (2, 1)])
def test_bounds_that_are_none_are_refused(least: int, most: int) -> None:
    with pytest.raises(ValueError, match=f"between {least} and {most}"):
        Concurrency(least, most)
