"""The breaker: when it opens, what it lets through, and that it never stays open for good."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from actors.breaker import Breaker, BreakerState
from router.retry import Backoff


@dataclass
class Bench:
    """A breaker that opens after three failures, and its clock; pauses of 1, 2, 4 ... 30 seconds."""

    now: float = 0.0
    states: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.breaker = Breaker(
            3,
            pause=Backoff(lambda: 1.0).pause,
            clock=lambda: self.now,
            on_change=lambda: self.states.append(str(self.breaker.state)),
        )

    def attempt(self, succeeded: bool | None) -> bool:
        """Whether it could be made."""
        ticket = self.breaker.admit()
        if ticket is not None:
            self.breaker.record(ticket, succeeded, "down")
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
