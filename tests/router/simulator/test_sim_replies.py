"""The ledger passes replies as a right router sends them and finds every single fault put into them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import each

from router.simulator import Delivery, Ledger, Report, SentItem

NUMBER = "1001"


@dataclass
class Sent:
    """A text on its way to a phone."""

    text: str
    recipient: str
    number: str = NUMBER
    refused: bool = False


@dataclass
class Story:
    """Messages of phones, all delivered, and what was sent in reply; changed by a test, then told."""

    messages: list[SentItem]
    replies: dict[str, list[str]]
    sent: list[Sent]
    dead: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    in_doubt: list[str] = field(default_factory=list)
    allow_repeats: bool = False
    is_router_text: Callable[[str], bool] | None = None

    def verdict(self, *, replies: bool = True) -> Report:
        ledger = Ledger()
        for serial, item in enumerate(self.messages):
            delivery = Delivery(serial, b"{}", (item,))
            ledger.sent(delivery)
            ledger.answered(delivery, 200, 0.001)
            name, accepted = item.message_id, item.message_id not in self.failed
            ledger.seen("rides", name, f"key-{name}", 1, accepted=accepted)
            ledger.replied(name, self.replies[name])
        for one in self.sent:
            tell = ledger.reply_refused if one.refused else ledger.reply_taken
            tell(one.number, one.recipient, one.text)
        stored = {item.message_id for item in self.messages}
        return ledger.verify(
            dead_letters=self.dead,
            stored=stored,
            allow_repeats=self.allow_repeats,
            replies=replies,
            in_doubt=self.in_doubt,
            is_router_text=self.is_router_text,
        )

    def at(self, text: str) -> int:
        return next(i for i, one in enumerate(self.sent) if one.text == text)


def told(phones: int = 2, length: int = 3, each: int = 2, seed: int = 0) -> Story:
    """`each` replies to each of `length` messages of each phone; sent interleaved, each phone in order."""
    rng = Random(seed)
    turns = [phone for phone in range(phones) for _ in range(length)]
    rng.shuffle(turns)
    messages, ordinals = [], Counter[int]()
    for phone in turns:
        ordinals[phone] += 1
        ordinal = ordinals[phone]
        messages.append(
            SentItem("message", f"m{phone}.{ordinal}", NUMBER, f"p{phone}", "rides", ordinal, f"t{ordinal}")
        )
    replies = {item.message_id: [f"{item.message_id}-{n}" for n in range(each)] for item in messages}
    sent = [Sent(text, item.sender) for item in messages for text in replies[item.message_id]]
    return Story(messages, replies, sent)


shapes = st.tuples(st.integers(2, 4), st.integers(2, 5), st.integers(1, 3), st.integers(0, 99))


@given(shapes)
def test_a_right_router_passes(shape: tuple[int, int, int, int]) -> None:
    report = told(*shape).verdict()
    assert report.problems == ()
    assert report.replies == shape[0] * shape[1] * shape[2]
    assert report.replies_refused == report.reply_repeats == report.other_replies == 0


def never_sent(story: Story, text: str) -> None:
    del story.sent[story.at(text)]


def sent_twice(story: Story, text: str) -> None:
    story.sent.insert(story.at(text), story.sent[story.at(text)])


def sent_last(story: Story, text: str) -> None:
    story.sent.append(story.sent.pop(story.at(text)))


def sent_to_another_phone(story: Story, text: str) -> None:
    one = story.sent[story.at(text)]
    one.recipient = "p1" if one.recipient == "p0" else "p0"


def sent_over_another_number(story: Story, text: str) -> None:
    story.sent[story.at(text)].number = "1002"


def swapped_with_the_next(story: Story, text: str) -> None:
    one = story.sent[story.at(text)]
    after = next(i for i in range(story.at(text) + 1, 99) if story.sent[i].recipient == one.recipient)
    here = story.at(text)
    story.sent[here], story.sent[after] = story.sent[after], story.sent[here]


def refused_and_then_taken(story: Story, text: str) -> None:
    one = story.sent[story.at(text)]
    story.sent.insert(story.at(text), Sent(text, one.recipient, refused=True))


FAULTS: dict[Callable[[Story, str], None], str] = {
    never_sent: "was given by its service but never sent",
    sent_twice: "was delivered again",
    sent_last: "arrived after a later message",
    sent_to_another_phone: "went to another phone than wrote",
    sent_over_another_number: "went out over 1002",
    swapped_with_the_next: "arrived after a later message",
    refused_and_then_taken: "was delivered again",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@given(shape=shapes, phone=st.integers(0, 3), ordinal=st.integers(0, 4), n=st.integers(0, 2))
def test_each_single_fault_is_found(
    fault: Callable[[Story, str], None], shape: tuple[int, int, int, int], phone: int, ordinal: int, n: int
) -> None:
    phones, length, each, _ = shape
    story = told(*shape)
    # never the last message of its phone: moved to the end, that would be where it was
    text = f"m{phone % phones}.{1 + ordinal % (length - 1)}-{n % each}"
    fault(story, text)
    report = story.verdict()
    assert any(FAULTS[fault] in problem for problem in report.problems), report.problems
    assert not report.ok
    assert story.verdict(replies=False).ok


def test_what_was_refused_for_good_has_arrived_in_its_place() -> None:
    story = told(1, 2, 1)
    story.sent[0].refused = True
    report = story.verdict()
    assert report.problems == ()
    assert (report.replies, report.replies_refused) == (1, 1)
    swapped_with_the_next(story, "m0.1-0")
    assert not story.verdict().ok


def test_replies_of_a_dead_letter_may_come_late_again_or_never_but_nowhere_else() -> None:
    story = told(1, 3, 1)
    story.dead = {"m0.1"}
    sent_last(story, "m0.1-0")
    assert story.verdict().ok
    sent_twice(story, "m0.1-0")
    assert story.verdict().ok
    story.sent = story.sent[:2]
    assert story.verdict().ok
    story.sent.append(Sent("m0.1-0", "p9"))
    assert not story.verdict().ok


def test_what_its_service_did_not_take_owes_no_reply() -> None:
    story = told(1, 2, 1)
    story.failed = {"m0.2"}
    never_sent(story, "m0.2-0")
    assert not any("reply" in problem for problem in story.verdict().problems)


def test_a_repeated_suffix_is_allowed_and_measured_after_a_crash() -> None:
    story = told(1, 3, 1)
    story.sent = [Sent(f"m0.{n}-0", "p0") for n in (1, 2, 1, 2, 3)]
    assert not story.verdict().ok
    story.allow_repeats = True
    report = story.verdict()
    assert report.problems == ()
    assert (report.reply_repeats, report.longest_reply_repeat) == (2, 2)
    story.sent = [Sent(f"m0.{n}-0", "p0") for n in (1, 2, 1, 3)]
    assert not story.verdict().ok


@each(
    ("order", "in_doubt", "allow_repeats", "ok"),
    [
        ("112", "1", False, True),
        ("1112", "1", False, False),
        ("1112", "11", False, True),
        ("1122", "1", False, False),
        ("1213", "1", False, True),  # the second time late
        ("1213", "", True, False),
        ("1213", "1", True, True),
        ("123233", "3", True, True),  # a crash, and then one more in doubt
        ("123123", "2", True, True),
        ("1231233", "3", True, True),
        ("1213", "2", True, False),
        ("213", "2", False, False),  # in doubt or not, first arrivals are in order
    ],
)
def test_what_is_in_doubt_may_come_once_more(
    order: str, in_doubt: str, allow_repeats: bool, ok: bool
) -> None:
    story = told(1, 3, 1)
    missing = {1, 2, 3} - set(map(int, order))
    story.sent = [Sent(f"m0.{n}-0", "p0") for n in [*map(int, order), *missing]]
    story.in_doubt = [f"m0.{n}-0" for n in in_doubt]
    story.allow_repeats = allow_repeats
    assert story.verdict().ok == ok, story.verdict().problems


crashes = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=5)


@given(crashes, st.randoms(use_true_random=False))
def test_crashes_and_doubts_together_are_no_problem(crashes: list[tuple[int, int]], rng: Random) -> None:
    """Each time: some new replies, of which some are taken unheard and come again, and then a crash."""
    places: list[int] = []
    doubts: list[int] = []
    end = 0
    for new, back in crashes:
        for place in [*range(end, end + new), *range(end + new - min(back, end + new), end + new)]:
            unheard = rng.choice((0, 0, 1, 2))
            places += [place] * (1 + unheard)
            doubts += [place] * unheard
        end += new
    story = told(1, end, 1)
    story.sent = [Sent(f"m0.{place + 1}-0", "p0") for place in places]
    story.in_doubt = [f"m0.{place + 1}-0" for place in doubts]
    story.allow_repeats = True
    assert story.verdict().problems == ()


def test_texts_of_the_router_itself_are_counted_and_can_be_known() -> None:
    story = told(1, 1, 1)
    story.sent.append(Sent("Menu: 1, 2, 3", "p0"))
    report = story.verdict()
    assert report.ok
    assert report.other_replies == 1
    story.is_router_text = lambda text: text.startswith("Menu")
    assert story.verdict().ok
    story.sent.append(Sent("made up", "p0"))
    (problem,) = story.verdict().problems
    assert "neither a service nor the router gave: 'made up'" in problem


def test_a_text_of_the_router_goes_to_who_wrote() -> None:
    for other in (Sent("Menu", "p9"), Sent("Menu", "p0", "1002")):
        story = told(1, 1, 1)
        story.sent.append(other)
        (problem,) = story.verdict().problems
        assert "never wrote to that number" in problem


def test_a_text_belongs_to_one_reply() -> None:
    ledger = Ledger()
    ledger.replied("m1", ["a", "b"])
    ledger.replied("m1", ["a", "b"])
    for message_id, texts in [
        ("m2", ["b"]),
        ("m1", ["b", "a"]),
        ("m1", ["a"]),
        ("m2", ["c", "c"]),
        ("m2", [""]),
    ]:
        with pytest.raises(ValueError):
            ledger.replied(message_id, texts)
    ledger.replied("m2", ["c"])
