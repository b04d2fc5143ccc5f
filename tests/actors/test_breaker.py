"""The breaker: when it opens, what it lets through, and that it never stays open for good."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from actors.breaker import MINIMUM, WINDOW, Breaker, BreakerState, RetryBudget, Trips
from router.retry import Backoff


@dataclass
class Bench:
    """A breaker that opens after three failures, and its clock; pauses of 1, 2, 4 ... 30 seconds."""

    trips: Trips = field(default_factory=lambda: Trips(3, slow_after=2.0))
    now: float = 0.0
    states: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.breaker = Breaker(
            self.trips,
            pause=Backoff(lambda: 1.0).pause,
            clock=lambda: self.now,
            on_change=lambda: self.states.append(str(self.breaker.state)),
        )

    def attempt(self, succeeded: bool | None, seconds: float = 0.0) -> bool:
        """Whether it could be made."""
        ticket = self.breaker.admit()
        if ticket is not None:
            self.breaker.record(ticket, succeeded, "down", seconds=seconds)
        return ticket is not None

    def fail(self, times: int = 3) -> None:
        for _ in range(times):
            assert self.attempt(False)


def test_failures_in_a_row_open_it() -> None:
    bench = Bench()
    bench.fail(2)
    assert bench.attempt(True)
    bench.fail(2)
    assert bench.breaker.state is BreakerState.CLOSED
    bench.fail(1)
    assert bench.breaker.state is BreakerState.OPEN
    assert bench.breaker.reason == "down"
    assert not bench.attempt(True)


def test_failures_of_several_at_the_same_time_open_it_once() -> None:
    bench = Bench()
    tickets = [bench.breaker.admit() for _ in range(10)]
    for ticket in tickets:
        assert ticket is not None
        bench.breaker.record(ticket, False)
    assert bench.states == ["open"]
    assert bench.breaker.probe_in() == 1.0


def test_what_says_nothing_neither_opens_it_nor_makes_up_for_a_failure() -> None:
    bench = Bench()
    bench.fail(2)
    assert bench.attempt(None)
    bench.fail(1)
    assert bench.breaker.state is BreakerState.OPEN


def test_after_the_pause_one_may_try() -> None:
    bench = Bench()
    bench.fail()
    bench.now = 0.9
    assert bench.breaker.admit() is None
    bench.now = 1.0
    ticket = bench.breaker.admit()
    assert ticket is not None
    assert bench.breaker.admit() is None
    assert bench.breaker.probe_in() is None
    bench.breaker.record(ticket, True)
    assert bench.states == ["open", "half-open", "closed"]
    assert bench.breaker.probe_in() == 0.0


def test_the_pauses_grow_to_half_a_minute_and_begin_anew_after_a_success() -> None:
    bench = Bench()
    bench.fail()
    pauses = []
    for _ in range(7):
        pause = bench.breaker.probe_in()
        assert pause is not None
        pauses.append(pause)
        bench.now += pause
        assert bench.attempt(False)
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    bench.now += 30
    assert bench.attempt(True)
    bench.fail()
    assert bench.breaker.probe_in() == 1.0


def test_a_try_that_was_broken_off_leaves_it_open_and_another_one_may_follow() -> None:
    bench = Bench()
    bench.fail()
    bench.now = 1.0
    assert bench.attempt(None)
    assert bench.breaker.state is BreakerState.OPEN
    bench.now += bench.breaker.probe_in() or 0.0
    assert bench.attempt(True)
    assert bench.breaker.state is BreakerState.CLOSED


def test_an_attempt_from_before_says_nothing_about_now() -> None:
    bench = Bench()
    old = bench.breaker.admit()
    assert old is not None
    bench.fail()
    bench.breaker.record(old, True)
    assert bench.breaker.state is BreakerState.OPEN
    bench.now = 1.0
    assert bench.attempt(True)
    bench.breaker.record(old, False)
    bench.fail(2)
    assert bench.breaker.state is BreakerState.CLOSED


def test_a_share_of_failures_opens_it_that_are_never_many_in_a_row() -> None:
    bench = Bench()
    for number in range(MINIMUM - 1):
        assert bench.attempt(number % 2 == 0)
    assert bench.breaker.state is BreakerState.CLOSED
    assert bench.attempt(False)
    assert bench.breaker.state is BreakerState.OPEN
    assert bench.breaker.reason == f"{MINIMUM // 2} of the last {MINIMUM} attempts failed: down"


def test_only_the_last_attempts_count() -> None:
    bench = Bench()
    for _ in range(10):
        for _ in range(WINDOW):
            assert bench.attempt(True)
        for _ in range(WINDOW // 5):
            assert bench.attempt(False)
            assert bench.attempt(True)
            assert bench.attempt(True)
    assert bench.states == []


def test_a_service_that_answers_slowly_is_left_alone_too() -> None:
    bench = Bench()
    for number in range(MINIMUM):
        assert bench.breaker.state is BreakerState.CLOSED
        assert bench.attempt(True, 1.9 if number % 5 == 4 else 2.0)
    assert bench.breaker.state is BreakerState.OPEN
    assert bench.breaker.reason == f"{MINIMUM * 4 // 5} of the last {MINIMUM} attempts took 2 s or longer"
    bench.now += 1.0
    assert bench.attempt(True, 2.0)
    assert bench.breaker.state is BreakerState.OPEN
    assert bench.breaker.reason == "down"
    bench.now += 2.0
    assert bench.attempt(True, 0.1)
    assert bench.breaker.state is BreakerState.CLOSED


def test_without_a_bound_nothing_is_slow() -> None:
    bench = Bench(Trips(3))
    for _ in range(3 * WINDOW):
        assert bench.attempt(True, 10**6)
    assert bench.states == []


def test_what_was_before_an_opening_is_not_held_against_it_afterwards() -> None:
    bench = Bench()
    for number in range(MINIMUM):
        bench.attempt(number % 2 == 1)
    assert bench.states == ["open"]
    bench.now += 1.0
    assert bench.attempt(True)
    assert bench.attempt(False)
    assert bench.breaker.state is BreakerState.CLOSED


@given(
    st.lists(st.tuples(st.sampled_from([True, False, None]), st.floats(0, 4)), max_size=120),
    st.integers(1, 8),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
)
def test_the_table(
    outcomes: list[tuple[bool | None, float]], in_a_row: int, failure_ratio: float, slow_ratio: float
) -> None:
    """As long as it is closed, by a reckoning of its own from all that was recorded."""
    bench = Bench(Trips(in_a_row, failure_ratio, 2.0, slow_ratio))
    said: list[tuple[bool, float]] = []
    for succeeded, seconds in outcomes:
        assert bench.attempt(succeeded, seconds)
        if succeeded is not None:
            said.append((succeeded, seconds))
        last = said[-WINDOW:]
        enough = len(last) >= MINIMUM
        trips = (
            (len(said) >= in_a_row and not any(one for one, _ in said[-in_a_row:]) and succeeded is False)
            or (
                enough
                and succeeded is not None
                and sum(not one for one, _ in last) >= failure_ratio * len(last)
            )
            or (
                enough
                and succeeded is not None
                and sum(took >= 2.0 for _, took in last) >= slow_ratio * len(last)
            )
        )
        assert (bench.breaker.state is BreakerState.OPEN) == trips
        if trips:
            return


def test_retries_are_a_share_of_deliveries() -> None:
    budget = RetryBudget(share=0.2, reserve=3)
    assert [budget.spend() for _ in range(5)] == [True, True, True, False, False]
    spent = 0
    for _ in range(1_000):
        budget.delivery()
        spent += budget.spend()
    assert 199 <= spent <= 200


def test_what_is_saved_up_is_bounded() -> None:
    budget = RetryBudget(share=0.2, reserve=3)
    for _ in range(1_000):
        budget.delivery()
    assert sum(budget.spend() for _ in range(10)) == 3


@given(
    st.lists(
        st.one_of(
            st.just("admit"),
            st.tuples(st.integers(0, 20), st.sampled_from([True, False, None])),
            st.floats(0.1, 40),
        )
    )
)
def test_whatever_happens_it_closes_when_the_service_is_well_again(
    steps: list[str | float | tuple[int, bool | None]],
) -> None:
    bench = Bench()
    out: list[int] = []
    for step in steps:
        if step == "admit":
            ticket = bench.breaker.admit()
            if ticket is not None:
                assert bench.breaker.state is not BreakerState.OPEN
                out.append(ticket)
        elif isinstance(step, tuple):
            if step[0] < len(out):
                bench.breaker.record(out.pop(step[0]), step[1])
        elif isinstance(step, float):
            bench.now += step
    for ticket in out:
        bench.breaker.record(ticket, None)
    for _ in range(2):
        bench.now += 30.0
        bench.attempt(True)
    assert bench.breaker.state is BreakerState.CLOSED
