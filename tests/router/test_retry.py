"""How long a failed attempt waits for the next one, and when there is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.config import DEAD_LETTER_POLICIES
from router.retry import ATTEMPTS, REDELIVERY, Backoff

SHORT, LONG = Backoff(lambda: 0.0), Backoff(lambda: 1.0)
SECONDS = st.floats(min_value=0, max_value=1e6)


def test_waits_double_and_the_jitter_takes_at_most_half() -> None:
    assert [SHORT.next_attempt(n, 0, 15, None) for n in (1, 2)] == [0.125, 0.25]
    assert [LONG.next_attempt(n, 0, 15, None) for n in (1, 2)] == [0.25, 0.5]


def test_the_third_failure_is_the_last() -> None:
    assert ATTEMPTS == 3
    assert LONG.next_attempt(3, 0, 15, None) is None
    assert LONG.next_attempt(4, 0, 15, None) is None


def test_the_deadline_leaves_no_room_for_a_wait_that_ends_on_it() -> None:
    assert LONG.next_attempt(1, 14.7, 15, None) is not None
    assert LONG.next_attempt(1, 14.75, 15, None) is None
    assert LONG.next_attempt(1, 20, 15, None) is None


def test_what_the_service_asks_for_is_waited_within_the_deadline_and_not_counted() -> None:
    assert LONG.next_attempt(0, 0, 15, 5.0) == 5.0
    assert LONG.next_attempt(99, 0, 15, 5.0) == 5.0
    assert LONG.next_attempt(0, 0, 15, 15.0) is None
    assert LONG.next_attempt(0, 11, 15, 5.0) is None


@pytest.mark.parametrize("asked", [0.0, -3.0, 0.01])
def test_nobody_is_hammered_who_asks_for_it(asked: float) -> None:
    assert LONG.next_attempt(0, 0, 15, asked) == 0.1


def test_a_dead_letter_is_due_when_the_service_asked_for_it_at_most_a_day_later() -> None:
    assert LONG.put_off(60.0) == 60
    assert LONG.put_off(0.0) == 0
    assert LONG.put_off(-1.0) == 0
    assert LONG.put_off(1e9) == 86_400
    assert LONG.put_off(float("inf")) == 86_400


def test_the_policies_of_dead_letters() -> None:
    assert tuple(REDELIVERY) == DEAD_LETTER_POLICIES
    standard, fast = ([policy.due_in(retries) for retries in range(7)] for policy in REDELIVERY.values())
    minutes, hours = 60.0, 3_600.0
    assert standard == [5 * minutes, 15 * minutes, hours, 4 * hours, 12 * hours, None, None]
    assert fast == [2 * minutes, 4 * minutes, 8 * minutes, None, None, None, None]


@given(
    st.integers(0, 50),
    SECONDS,
    SECONDS,
    st.one_of(st.none(), st.floats(allow_nan=False)),
    st.floats(min_value=0, max_value=1, exclude_max=True),
)
def test_a_wait_is_positive_and_within_the_deadline(
    failed: int, elapsed: float, deadline: float, asked: float | None, random: float
) -> None:
    wait = Backoff(lambda: random).next_attempt(failed, elapsed, deadline, asked)
    if wait is not None:
        assert wait > 0
        assert elapsed + wait < deadline
        assert asked is not None or failed < ATTEMPTS
    assert asked is None or 0 <= LONG.put_off(asked) <= 86_400
