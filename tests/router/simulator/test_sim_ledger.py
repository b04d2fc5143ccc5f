"""The ledger passes what a right router does and finds every single fault put into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import each

from router.simulator import Delivery, Ledger, Report, SentItem
from router.simulator.order import Arrival, judge_order


@dataclass
class Sight:
    domain: str
    message_id: str
    key: str
    attempt: int = 1
    ordinal: int | None = None
    text: str | None = None
    accepted: bool = True


@dataclass
class Story:
    """Everything that happened; changed by a test, then told to a ledger."""

    deliveries: list[Delivery]
    sights: list[Sight]
    stored: set[str]
    dead: set[str] = field(default_factory=set)
    unanswered: set[int] = field(default_factory=set)
    allow_repeats: bool = False
    repeat_bound: int | None = None

    def verdict(self) -> Report:
        ledger = Ledger()
        for delivery in self.deliveries:
            ledger.sent(delivery)
            if delivery.serial in self.unanswered:
                ledger.answered(delivery, 503, 0.001)
            else:
                ledger.answered(delivery, 200, delivery.serial / 1000)
        for sight in self.sights:
            ledger.seen(
                sight.domain,
                sight.message_id,
                sight.key,
                sight.attempt,
                sight.ordinal,
                sight.text,
                accepted=sight.accepted,
            )
        return ledger.verify(
            dead_letters=self.dead,
            stored=self.stored,
            allow_repeats=self.allow_repeats,
            repeat_bound=self.repeat_bound,
        )

    def at(self, message_id: str) -> int:
        return next(i for i, sight in enumerate(self.sights) if sight.message_id == message_id)


def domain_of(phone: int) -> str:
    return ("rides", "insurance")[phone % 2]


def told(phones: int, length: int, seed: int = 0) -> Story:
    """`length` messages of each phone, one to a body; services saw them interleaved, each phone in order."""
    rng = Random(seed)
    turns = [phone for phone in range(phones) for _ in range(length)]
    rng.shuffle(turns)
    deliveries, sights = [], []
    ordinals = dict.fromkeys(range(phones), 0)
    for serial, phone in enumerate(turns, start=1):
        ordinals[phone] += 1
        ordinal, domain = ordinals[phone], domain_of(phone)
        name = f"m{phone}.{ordinal}"
        item = SentItem("message", name, "1001", f"p{phone}", domain, ordinal, f"text #{ordinal}")
        deliveries.append(Delivery(serial, b"{}", (item,)))
        sights.append(Sight(domain, name, f"key-{name}", 1, ordinal, item.text))
    return Story(deliveries, sights, {sight.message_id for sight in sights})


shapes = st.tuples(st.integers(1, 4), st.integers(3, 8), st.integers(0, 99))


@given(shapes)
def test_a_right_router_passes(shape: tuple[int, int, int]) -> None:
    report = told(*shape).verdict()
    assert report.problems == ()
    assert report.ok
    assert report.sent == report.distinct == report.received == shape[0] * shape[1]
    assert sum(report.delivered.values()) == report.distinct
    assert report.duplicates == report.repeats == report.dead_letters == 0


def never_delivered(story: Story, name: str) -> None:
    del story.sights[story.at(name)]


def not_stored(story: Story, name: str) -> None:
    story.stored.discard(name)


def delivered_twice(story: Story, name: str) -> None:
    at = story.at(name)
    story.sights.insert(at + 1, replace(story.sights[at], attempt=2))


def delivered_late(story: Story, name: str) -> None:
    story.sights.append(story.sights.pop(story.at(name)))


def wrong_service(story: Story, name: str) -> None:
    story.sights[story.at(name)].domain = "wallet"


def another_key_the_second_time(story: Story, name: str) -> None:
    story.allow_repeats = True
    at = story.at(name)
    story.sights.insert(at + 1, replace(story.sights[at], key="other", attempt=2))


def key_of_another(story: Story, name: str) -> None:
    other = next(sight for sight in story.sights if sight.message_id != name)
    story.sights[story.at(name)].key = other.key


def another_ordinal(story: Story, name: str) -> None:
    story.sights[story.at(name)].ordinal = 77


def another_text(story: Story, name: str) -> None:
    story.sights[story.at(name)].text = "spoilt"


def never_sent(story: Story, name: str) -> None:
    story.sights.append(Sight("rides", "ghost", "key-ghost"))
    story.stored.add("ghost")


def stored_but_never_sent(story: Story, name: str) -> None:
    story.stored.add("ghost")


def dead_but_never_sent(story: Story, name: str) -> None:
    story.dead.add("ghost")


def refused_and_given_up(story: Story, name: str) -> None:
    story.sights[story.at(name)].accepted = False


FAULTS: dict[Callable[[Story, str], None], str] = {
    never_delivered: "neither taken by",
    not_stored: "is not stored",
    delivered_twice: "was delivered again",
    delivered_late: "after a later message",
    wrong_service: "belongs to",
    another_key_the_second_time: "before with",
    key_of_another: "belongs to m",
    another_ordinal: "came as number 77",
    another_text: "another text",
    never_sent: "ghost (attempt 1 at rides) was delivered but was never sent",
    stored_but_never_sent: "ghost is stored but was never sent",
    dead_but_never_sent: "ghost is a dead letter but was never sent",
    refused_and_given_up: "neither taken by",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@given(shape=shapes, phone=st.integers(0, 3), ordinal=st.integers(1, 7))
def test_each_single_fault_is_found(
    fault: Callable[[Story, str], None], shape: tuple[int, int, int], phone: int, ordinal: int
) -> None:
    phones, length, _ = shape
    story = told(*shape)
    # never the last of its phone: moved to the end, that would be where it was
    name = f"m{phone % phones}.{1 + (ordinal - 1) % (length - 1)}"
    fault(story, name)
    report = story.verdict()
    assert not report.ok
    assert any(FAULTS[fault] in problem for problem in report.problems), report.problems
    assert any(name in problem or "ghost" in problem for problem in report.problems)


@given(shapes, st.randoms(use_true_random=False))
def test_any_other_order_of_a_phone_is_found(shape: tuple[int, int, int], rng: Random) -> None:
    story = told(*shape)
    before = [sight.message_id for sight in story.sights if sight.message_id.startswith("m0.")]
    after = rng.sample(before, len(before))
    places = [i for i, sight in enumerate(story.sights) if sight.message_id.startswith("m0.")]
    by_name = {sight.message_id: sight for sight in story.sights}
    for place, name in zip(places, after, strict=True):
        story.sights[place] = by_name[name]
    story.allow_repeats = True
    assert story.verdict().ok == (before == after)


@given(shapes, st.integers(0, 20))
def test_the_order_between_phones_is_free(shape: tuple[int, int, int], seed: int) -> None:
    story = told(*shape)
    phones = list(range(shape[0]))
    Random(seed).shuffle(phones)
    story.sights.sort(key=lambda sight: phones.index(int(sight.message_id[1 : sight.message_id.index(".")])))
    assert story.verdict().ok


def test_what_was_not_answered_200_may_be_missing_or_there() -> None:
    story = told(1, 3)
    story.unanswered = {3}
    assert story.verdict().ok
    assert story.verdict().received == 2
    never_delivered(story, "m0.3")
    assert story.verdict().ok
    not_stored(story, "m0.3")
    assert story.verdict().ok


def test_a_dead_letter_may_be_missing_late_or_repeated_but_must_be_stored() -> None:
    story = told(2, 4)
    story.dead = {"m0.2"}
    never_delivered(story, "m0.2")
    assert story.verdict().ok
    assert story.verdict().dead_letters == 1
    sight = Sight("rides", "m0.2", "key-m0.2", 4, 2)
    story.sights += [sight, replace(sight, attempt=5)]
    assert story.verdict().ok
    story.stored.discard("m0.2")
    assert not story.verdict().ok


def test_what_was_answered_200_is_stored_even_if_it_was_never_delivered() -> None:
    story = told(1, 3)
    story.dead = {"m0.2"}
    never_delivered(story, "m0.2")
    not_stored(story, "m0.2")
    assert story.verdict().problems == ("m0.2 was answered 200 but is not stored",)


def test_what_was_delivered_is_stored_even_if_it_was_not_answered_200() -> None:
    story = told(1, 3)
    story.unanswered = {3}
    not_stored(story, "m0.3")
    assert story.verdict().problems == ("m0.3 (attempt 1 at rides) was delivered but is not stored",)


def test_a_failed_attempt_may_come_again_at_once_but_holds_back_what_is_later() -> None:
    story = told(1, 3)
    story.sights.insert(1, replace(story.sights[1], accepted=False))
    assert story.verdict().ok
    assert story.verdict().repeats == 0
    story.sights[1], story.sights[2] = story.sights[3], story.sights[1]
    names = [(sight.message_id, sight.accepted) for sight in story.sights]
    assert names == [("m0.1", True), ("m0.3", True), ("m0.2", False), ("m0.3", True)]
    assert not story.verdict().ok


def test_duplicates_and_statuses_are_counted_and_statuses_never_delivered() -> None:
    story = told(1, 2)
    status = SentItem("status", "out1", "1001", "p0", None, 0, "read")
    story.deliveries += [replace(story.deliveries[0], attempt=2), Delivery(9, b"{}", (status,))]
    report = story.verdict()
    assert report.ok
    assert (report.sent, report.distinct, report.duplicates, report.statuses) == (3, 2, 1, 1)
    story.sights.append(Sight("rides", "out1", "key-out1"))
    assert any("out1" in problem and "is no message" in problem for problem in story.verdict().problems)


def test_the_answer_times_are_percentiles_by_nearest_rank() -> None:
    report = told(1, 200).verdict()
    assert (report.p50_ms, report.p95_ms, report.p99_ms) == pytest.approx((100.0, 190.0, 198.0))
    assert Ledger().verify(dead_letters=(), stored=()).p99_ms == 0.0


def test_at_most_twenty_problems_are_spelt_out() -> None:
    story = told(5, 8)
    story.sights.clear()
    report = story.verdict()
    assert len(report.problems) == 21
    assert report.problems[-1] == "... and 20 more"


def walk(places: list[int], **rule: int | bool | None) -> list[str]:
    arrivals = [Arrival(place, f"m{place}") for place in places]
    return judge_order(arrivals, **({"allow_repeats": True} | rule)).problems  # type: ignore[arg-type]


crashes = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=6)


@given(crashes)
def test_suffixes_repeated_in_order_are_allowed_and_measured(crashes: list[tuple[int, int, int]]) -> None:
    """Each time: some new messages, a crash that goes back, and perhaps a second one during the repeat."""
    places: list[int] = []
    longest = 0
    for new, back, again in crashes:
        end = len(set(places)) + new
        places += range(end - new, end)
        back = min(back, end)
        longest = max(longest, back)
        places += range(end - back, end - back + min(again, back))
        places += range(end - back, end)
    arrivals = [Arrival(place, f"m{place}") for place in places]
    judged = judge_order(arrivals, allow_repeats=True)
    assert judged.problems == []
    assert judged.longest_repeat == longest
    assert judge_order(arrivals, allow_repeats=True, repeat_bound=longest).problems == []
    if longest:
        assert judge_order(arrivals, allow_repeats=True, repeat_bound=longest - 1).problems
        assert judge_order(arrivals, allow_repeats=False).problems


@each(
    ("places", "problem"),
    [
        ([0, 1, 2, 0, 2], "m2 was repeated while messages before it were skipped"),
        ([0, 1, 2, 1, 3], "m3 arrived while a repeat had not reached its end"),
        ([0, 1, 2, 1], "m2 was left out at the end of a repeat"),
        ([0, 2, 1], "m1 arrived after a later message of its phone"),
        ([1, 2, 0], "m0 arrived after a later message of its phone"),
    ],
)
def test_what_is_no_suffix_is_found(places: list[int], problem: str) -> None:
    assert walk(places) == [problem]


def test_gaps_are_not_the_business_of_the_order() -> None:
    assert walk([0, 3, 7]) == []
    assert walk([0, 3, 7, 3, 7, 8]) == []


def test_a_message_may_not_pass_one_that_was_refused() -> None:
    refused = [Arrival(0, "m0", accepted=False), Arrival(1, "m1")]
    assert judge_order(refused, allow_repeats=True).problems == [
        "m1 arrived before m0 of its phone was accepted"
    ]
    then = [Arrival(0, "m0", accepted=False), Arrival(0, "m0"), Arrival(1, "m1")]
    assert judge_order(then, allow_repeats=False, repeat_bound=0).problems == []
