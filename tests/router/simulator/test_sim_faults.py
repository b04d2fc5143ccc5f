"""Everything that may go wrong with a body does, as often as told, and nothing that it must not."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import each

from router.simulator import Delivery, Faults, Ledger, Manner, Population, SentItem, payloads
from router.simulator.kinds import KINDS
from router.simulator.statuses import RANK, SCRIPTS, further

NUMBERS = ("1001", "1002")
TEXTS = {"rides": ["taxi", "moto"], "insurance": ["insurance"]}
ALL: dict[str, Any] = {"kinds": "all", "other_share": 0.3, "faults": Faults.everything()}
seeds = st.integers(0, 10_000)


@dataclass
class World:
    """A population whose bodies are answered 401 when forged, else 200, or nothing in `failing` of cases."""

    population: Population
    rng: Random
    now: float = 0.0
    given: list[Delivery] = field(default_factory=list)
    order_answered: list[Delivery] = field(default_factory=list)

    def run(self, steps: int, failing: float = 0.0) -> None:
        for _ in range(steps):
            self.now += 0.05
            delivery = self.population.next_delivery()
            if delivery is not None:
                self.given.append(delivery)
                status = None if self.rng.random() < failing else 401 if delivery.forged else 200
                if status == 200:
                    self.order_answered.append(delivery)
                self.population.answered(delivery, status)


def world(seed: int = 1, senders: int = 40, **more: Any) -> World:
    made = World(
        Population(
            senders, NUMBERS, Random(seed), TEXTS, unix_time=lambda: 1.7e9, clock=lambda: made.now, **more
        ),
        Random(seed),
    )
    return made


def values(body: bytes, name: str) -> list[Any]:
    changes = [change for entry in json.loads(body)["entry"] for change in entry["changes"]]
    return [
        one for change in changes if change["field"] == "messages" for one in change["value"].get(name, [])
    ]


def deliverable(body: bytes) -> list[str]:
    """The ids of messages that have what it takes, read independently."""
    return [
        one["id"]
        for one in values(body, "messages")
        if isinstance(one, dict)
        and one.get("id")
        and isinstance(one["id"], str)
        and (one.get("from") or one.get("from_user_id"))
    ]


@given(seeds)
def test_items_are_the_good_messages_and_the_statuses_of_the_body_in_its_order(seed: int) -> None:
    made = world(seed, unnumbered_share=0.2, **ALL)
    made.run(60, failing=0.2)
    for delivery in made.given:
        messages = [item.message_id for item in delivery.items if item.kind == "message"]
        assert messages == deliverable(delivery.body)
        found = [(one["id"], one["status"]) for one in values(delivery.body, "statuses")]
        assert [(item.message_id, item.text) for item in delivery.items if item.kind == "status"] == found


@given(seeds)
def test_a_phone_writes_again_only_when_it_was_answered_200_whatever_goes_wrong(seed: int) -> None:
    made = world(seed, senders=6, **ALL)
    newest: dict[str, SentItem] = {}
    answered: set[str] = set()
    for _ in range(80):
        made.run(1, failing=0.3)
        for item in made.given[-1].items if made.given and not made.given[-1].forged else ():
            if item.kind == "message" and item.ordinal > (
                newest[item.sender].ordinal if item.sender in newest else 0
            ):
                assert item.sender not in newest or newest[item.sender].message_id in answered
                newest[item.sender] = item
        answered |= {item.message_id for one in made.order_answered for item in one.items}


def test_every_fault_occurs() -> None:
    made = world(senders=150, batch_share=0.05, **ALL)
    made.run(700, failing=0.05)
    manners = Counter(one.manner.forgery for one in made.given)
    assert min(manners["unsigned"], manners["other_secret"], manners["other_bytes"]) > 1
    assert sum(one.twin for one in made.given) > 10
    assert sum(one.manner.hang_up for one in made.given) > 10
    assert sum(one.manner.pieces > 1 for one in made.given) > 10
    assert sum(bool(one.malformed) for one in made.given) > 3
    assert max(len(one.items) for one in made.given) > 50
    assert all(0.0 <= one.manner.pause <= 0.02 for one in made.given)
    assert not any(one.twin and (one.attempt > 1 or one.manner != Manner()) for one in made.given)
    junk = [one for d in made.given for one in values(d.body, "messages") if not isinstance(one, dict)]
    assert {None, "hi"} <= set(junk)
    fields = {c["field"] for d in made.given for e in json.loads(d.body)["entry"] for c in e["changes"]}
    assert len(fields) > 5
    assert any(values(one.body, "errors") for one in made.given)


def test_bodies_stay_within_what_meta_puts_into_one() -> None:
    made = world(
        senders=2_000, batch_share=0.6, status_share=0.5, faults=Faults(malformed=1.0, largest_batch=1_000)
    )
    made.run(6)
    sizes = [len(values(d.body, "messages")) + len(values(d.body, "statuses")) for d in made.given]
    assert 500 < max(sizes) <= 1_000
    assert max(len(one.body) for one in made.given) < 3_145_728


def test_late_duplicates_come_from_the_whole_run() -> None:
    made = world(duplicate_share=0.0, batch_share=0.0, status_share=0.0, faults=Faults(late=0.3, history=50))
    made.run(3_000)
    first: dict[bytes, int] = {}
    back = [
        number - first[one.body]
        for number, one in enumerate(made.given)
        if first.setdefault(one.body, number) < number
    ]
    assert all(one.duplicate == (first[one.body] < n) for n, one in enumerate(made.given))
    assert len(back) > 500
    assert max(back) > 2_000


def test_forged_messages_are_nobodys_and_never_come_again() -> None:
    made = world(**ALL)
    made.run(500, failing=0.3)
    forged = {item.message_id for one in made.given if one.forged for item in one.items}
    genuine = {item.message_id for one in made.given if not one.forged for item in one.items}
    assert len(forged) > 5
    assert not forged & genuine
    assert all(one.attempt == 1 for one in made.given if one.forged)


def test_equal_seeds_give_equal_deliveries_with_every_fault_too() -> None:
    def run(seed: int) -> list[Delivery]:
        made = world(seed, **ALL)
        made.run(100, failing=0.2)
        return made.given

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_every_kind_of_message_occurs_and_its_text_is_that_of_its_item() -> None:
    made = world(kinds="all")
    made.run(600)
    kinds: set[str] = set()
    for delivery in made.given:
        texts = {item.message_id: item.text for item in delivery.items}
        for one in values(delivery.body, "messages"):
            kinds.add(one["interactive"]["type"] if one["type"] == "interactive" else one["type"])
            assert texts[one["id"]] == payloads.text_of(one)
    assert kinds == {
        *("text", "image", "audio", "video", "document", "sticker", "location", "contacts", "reaction"),
        *("button_reply", "list_reply", "nfm_reply", "button", "order", "system", "request_welcome"),
        *("unsupported", "edit", "revoke", "hologram", "scent"),
    }
    everything = [one for d in made.given for one in values(d.body, "messages")]
    assert any("referral" in one for one in everything)
    assert any("id" in one.get("context", {}) for one in everything)
    assert any("forwarded" in one.get("context", {}) for one in everything)


@each("name", KINDS)
def test_the_text_of_a_kind_is_what_a_person_reads(name: str) -> None:
    written = KINDS[name](payloads.Head("wamid.QQ==", "999", 1), Random(1), "some words #2", "wamid.Qg==")
    kind = written["type"]
    expected = (
        "some words #2"
        if kind in ("text", "video", "document", "button") or name in ("image", "button reply", "list reply")
        else ""
    )
    if kind == "system":
        expected = written["system"]["body"]  # type: ignore[index]
    if name == "flow":
        expected = "Sent"
    assert payloads.text_of(written) == expected


@each(
    "message",
    [
        {},
        {"type": 7},
        {"type": "text"},
        {"type": "text", "text": "x"},
        {"type": "interactive", "interactive": {}},
        {"type": "text", "text": {"body": 7}},
    ],
)
def test_a_message_without_words_has_an_empty_text(message: dict[str, object]) -> None:
    assert payloads.text_of(message) == ""


@each(
    "wrong", [{"twins": 1.5}, {"slow": -0.1}, {"largest_batch": 1_001}, {"largest_batch": 1}, {"history": 0}]
)
def test_faults_are_shares_and_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Faults(**wrong)


# Statuses of what the Graph API took


def took(made: World, count: int) -> list[tuple[str, str]]:
    """Tell the population of that many messages to phones that wrote; (number, message id)."""
    phones = sorted(
        {(i.phone_number_id, i.sender) for d in made.given for i in d.items if i.kind == "message"}
    )
    named = []
    for index in range(count):
        number, sender = phones[index % len(phones)]
        made.population.took(f"wamid.out{index}", number, sender)
        named.append((number, f"wamid.out{index}"))
    return named


@given(seeds)
def test_furthest_statuses_are_those_of_a_webhook_that_only_moves_forward(seed: int) -> None:
    made = world(seed, **ALL)
    made.run(20)
    named = took(made, 15)
    made.run(40, failing=0.3)
    for _ in range(400):
        if set(named) <= made.population.furthest_statuses().keys():
            break
        made.run(1)
    stored: dict[tuple[str, str], str] = {}
    for delivery in made.order_answered:
        for entry in json.loads(delivery.body)["entry"]:
            for change in entry["changes"]:
                for one in change["value"].get("statuses", []) if change["field"] == "messages" else ():
                    key = (change["value"]["metadata"]["phone_number_id"], one["id"])
                    if key not in stored or RANK[stored[key]] < RANK[one["status"]]:
                        stored[key] = one["status"]
    assert made.population.furthest_statuses() == stored
    assert set(named) <= stored.keys()


@given(st.sampled_from(SCRIPTS), st.randoms(use_true_random=False), st.integers(0, 5))
def test_whatever_order_bodies_come_in_a_script_has_one_end(
    script: tuple[tuple[str, ...], ...], rng: Random, again: int
) -> None:
    def end(bodies: list[tuple[str, ...]]) -> str | None:
        stands: str | None = None
        for name in (name for body in bodies for name in body):
            stands = further(stands, name)
        return stands

    bodies = [*script, *(rng.choice(script) for _ in range(again))]
    shuffled = rng.sample(bodies, len(bodies))
    assert end(shuffled) == end(list(script))


def test_a_status_goes_to_a_phone_of_the_population() -> None:
    made = world()
    with pytest.raises(ValueError, match="no phone"):
        made.population.took("wamid.out", "1001", "1")


# What the ledger says


def story(*, forged: bool = False, malformed: tuple[str, ...] = ()) -> tuple[Ledger, Delivery]:
    item = SentItem("message", "m1", "1001", "p1", "rides", 1, "taxi")
    manner = Manner(forgery="unsigned") if forged else Manner()
    return Ledger(), Delivery(1, b"{}", (item,), manner=manner, malformed=malformed)


@each(
    ("status", "stored", "delivered", "problems"),
    [
        (401, (), False, []),
        (None, (), False, []),
        (200, (), False, ["a forged body (unsigned) was answered 200"]),
        (503, (), False, ["a forged body (unsigned) was answered 503"]),
        (401, ("m1",), False, ["m1 is stored but was only forged"]),
        (401, (), True, ["m1 (attempt 1 at rides) was delivered but was only forged"]),
    ],
)
def test_what_is_forged_must_leave_no_trace(
    status: int | None, stored: tuple[str, ...], delivered: bool, problems: list[str]
) -> None:
    ledger, delivery = story(forged=True)
    ledger.sent(delivery)
    ledger.answered(delivery, status, 0.5)
    if delivered:
        ledger.seen("rides", "m1", "k1", 1)
    report = ledger.verify(dead_letters=(), stored=stored)
    assert list(report.problems) == problems
    assert (report.forged, report.sent, report.distinct, report.p50_ms) == (1, 0, 0, 0.0)


def test_a_malformed_message_may_be_stored_but_not_delivered_and_its_neighbour_must_be() -> None:
    ledger, delivery = story(malformed=("bad",))
    ledger.sent(delivery)
    ledger.answered(delivery, 200, 0.1)
    assert len(ledger.verify(dead_letters=(), stored=("m1", "bad")).problems) == 1
    ledger.seen("rides", "m1", "k1", 1)
    assert ledger.verify(dead_letters=(), stored=("m1", "bad")).ok
    assert ledger.verify(dead_letters=(), stored=("m1",)).ok
    ledger.seen("rides", "bad", "k2", 1)
    (problem,) = ledger.verify(dead_letters=(), stored=("m1", "bad", "k2")).problems[:1]
    assert "k2 is stored" in problem
    (problem,) = ledger.verify(dead_letters=(), stored=("m1", "bad")).problems
    assert "bad (attempt 1 at rides) was delivered but is no message" in problem


def test_twins_are_one_message_sent_twice() -> None:
    ledger, delivery = story()
    for _ in range(2):
        ledger.sent(delivery)
    for status in (200, None):
        ledger.answered(delivery, status, None)
    ledger.seen("rides", "m1", "k1", 1)
    report = ledger.verify(dead_letters=(), stored=("m1",))
    assert report.ok
    assert (report.sent, report.distinct, report.duplicates, report.received) == (2, 1, 1, 1)
    ledger.seen("rides", "m1", "k1", 1)
    assert not ledger.verify(dead_letters=(), stored=("m1",)).ok
