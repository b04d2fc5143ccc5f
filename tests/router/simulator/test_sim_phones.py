"""The population keeps each phone in order, repeats only what was sent, and redelivers the rest."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.simulator import Delivery, Population, SentItem

TEXTS = {"rides": ["taxi", "moto", "I need a ride"], "insurance": ["insurance", "premium"]}
NUMBERS = ("1001", "1002", "1003")


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class World:
    """A population of which every delivery is answered as `rng` likes; remembers what it gave out."""

    rng: Random
    population: Population
    clock: Clock
    given: list[Delivery] = field(default_factory=list)
    flying: list[Delivery] = field(default_factory=list)
    acknowledged: set[str] = field(default_factory=set)

    def give(self) -> Delivery | None:
        delivery = self.population.next_delivery()
        if delivery is not None:
            self.given.append(delivery)
            self.flying.append(delivery)
        return delivery

    def answer(self, status: int | None) -> None:
        delivery = self.flying.pop(self.rng.randrange(len(self.flying)))
        if status == 200:
            self.acknowledged |= {item.message_id for item in messages(delivery)}
        self.population.answered(delivery, status)

    def run(self, steps: int, failing: float = 0.2) -> None:
        for _ in range(steps):
            if self.flying and (len(self.flying) > 8 or self.rng.random() < 0.5):
                self.answer(self.rng.choice((500, None)) if self.rng.random() < failing else 200)
            else:
                self.give()
            self.clock.now += self.rng.random() * 0.1


def world(seed: int, senders: int = 12, **shares: Any) -> World:
    clock = Clock()
    shares = {"duplicate_share": 0.2, "batch_share": 0.3, "status_share": 0.3} | shares
    population = Population(
        senders, NUMBERS, Random(seed), TEXTS, clock=clock, unix_time=lambda: 1_700_000_000.5, **shares
    )
    return World(Random(seed + 1), population, clock)


def messages(delivery: Delivery) -> list[SentItem]:
    return [item for item in delivery.items if item.kind == "message"]


def in_body(body: bytes) -> list[tuple[str, str, str]]:
    """(kind, phone_number_id, id) of everything in a body, in its order, read independently."""
    found = []
    for entry in json.loads(body)["entry"]:
        for change in entry["changes"]:
            value = change["value"]
            number = value["metadata"]["phone_number_id"]
            for kind in ("message", "status"):
                found += [
                    (kind, number, one["id"]) for one in value.get(f"{kind}es", value.get(f"{kind}s", []))
                ]
    return found


seeds = st.integers(0, 10_000)


@given(seeds)
def test_a_new_message_is_given_out_only_when_all_earlier_ones_were_answered_200(seed: int) -> None:
    made = world(seed)
    history: dict[str, list[SentItem]] = defaultdict(list)
    known: set[str] = set()
    for _ in range(120):
        made.run(1)
        delivery = made.given[-1] if made.given else None
        for item in messages(delivery) if delivery else ():
            if item.message_id in known:
                continue
            known.add(item.message_id)
            assert all(earlier.message_id in made.acknowledged for earlier in history[item.sender])
            history[item.sender].append(item)
            assert item.ordinal == len(history[item.sender])
    assert max(len(of_phone) for of_phone in history.values()) > 2


@given(seeds)
def test_items_are_what_the_body_says_in_its_order(seed: int) -> None:
    made = world(seed)
    made.run(80)
    assert made.given
    for delivery in made.given:
        listed = [(item.kind, item.phone_number_id, item.message_id) for item in delivery.items]
        assert listed == in_body(delivery.body)


@given(seeds)
def test_duplicates_repeat_what_was_given_out_before_and_nothing_else_repeats(seed: int) -> None:
    made = world(seed)
    made.run(120)
    bodies: set[bytes] = set()
    serials: set[int] = set()
    known: set[str] = set()
    for delivery in made.given:
        ids = {item.message_id for item in messages(delivery)}
        if delivery.attempt > 1:
            assert delivery.serial in serials
            assert delivery.body in bodies
        elif delivery.duplicate:
            assert delivery.body in bodies or ids & known
        else:
            assert not ids & known
            assert delivery.body not in bodies
        bodies.add(delivery.body)
        serials.add(delivery.serial)
        known |= ids


def test_every_kind_of_delivery_occurs() -> None:
    made = world(3, senders=60)
    made.run(1_500)
    exact = regrouped = batches = mixed = statuses = 0
    bodies: set[bytes] = set()
    for delivery in made.given:
        if delivery.attempt == 1:
            kinds = Counter(item.kind for item in delivery.items)
            exact += delivery.body in bodies
            regrouped += delivery.duplicate and delivery.body not in bodies
            batches += 2 <= kinds["message"] <= 20
            mixed += bool(kinds["message"] and kinds["status"])
            statuses += not kinds["message"]
            assert kinds["message"] <= 20
        bodies.add(delivery.body)
    assert min(exact, regrouped, batches, mixed, statuses) > 10
    types = {
        one["type"]
        for body in bodies
        for entry in json.loads(body)["entry"]
        for change in entry["changes"]
        for one in change["value"].get("messages", [])
    }
    assert types == {"text", "interactive", "image", "audio"}


def test_without_shares_there_are_only_single_new_messages() -> None:
    made = world(4, duplicate_share=0.0, batch_share=0.0, status_share=0.0)
    made.run(300, failing=0.0)
    assert all([item.kind for item in one.items] == ["message"] for one in made.given)
    ids = [item.message_id for one in made.given for item in one.items]
    assert len(ids) == len(set(ids)) > 50


def test_a_phone_opens_with_the_keyword_of_its_one_domain_and_numbers_the_rest() -> None:
    made = world(5)
    made.run(600, failing=0.0)
    domains: dict[str, set[str | None]] = defaultdict(set)
    numbered = 0
    for item in {i.message_id: i for one in made.given for i in messages(one)}.values():
        domains[item.sender].add(item.domain)
        assert item.domain is not None
        if item.ordinal == 1:
            assert item.text == TEXTS[item.domain][0]
        elif item.text:
            numbered += 1
            assert item.text.endswith(f" #{item.ordinal}")
    assert numbered > 50
    assert {len(of_phone) for of_phone in domains.values()} == {1}
    assert {domain for of_phone in domains.values() for domain in of_phone} == set(TEXTS)


def test_unnumbered_phones_show_only_their_user_id() -> None:
    made = world(6, unnumbered_share=1.0, status_share=0.5)
    made.run(100, failing=0.0)
    for delivery in made.given:
        assert all(item.sender.startswith("US.") for item in delivery.items)
        for entry in json.loads(delivery.body)["entry"]:
            for change in entry["changes"]:
                for one in change["value"].get("messages", []):
                    assert "from" not in one
                    assert one["from_user_id"].startswith("US.")
                for one in change["value"].get("contacts", []):
                    assert "wa_id" not in one


@pytest.mark.parametrize(("share", "shown"), [(0.0, {False}), (0.5, {False, True}), (1.0, {True})])
def test_some_phones_show_a_user_id_always_the_same(share: float, shown: set[bool]) -> None:
    made = world(12, user_id_share=share)
    made.run(300, failing=0.0)
    user_ids: dict[str, set[str | None]] = defaultdict(set)
    for delivery in made.given:
        for entry in json.loads(delivery.body)["entry"]:
            for change in entry["changes"]:
                for one in change["value"].get("messages", []):
                    user_ids[one["from"]].add(one.get("from_user_id"))
                for one in change["value"].get("contacts", []):
                    user_ids[one["wa_id"]].add(one.get("user_id"))
    assert {len(of_phone) for of_phone in user_ids.values()} == {1}
    assert {user_id is not None for of_phone in user_ids.values() for user_id in of_phone} == shown


def test_what_is_not_answered_200_comes_again_after_growing_pauses() -> None:
    made = world(7, senders=1, duplicate_share=0.0, batch_share=0.0, status_share=0.0, longest_pause=1.0)
    first = made.give()
    assert first is not None
    for attempt, pause in enumerate((0.2, 0.4, 0.8, 1.0, 1.0), start=2):
        made.answer(503)
        due = made.population.next_due
        assert due is not None
        assert due - made.clock.now == pytest.approx(pause, rel=0.11)
        made.clock.now = due - 0.001
        assert made.give() is None
        made.clock.now = due
        again = made.give()
        assert again is not None
        assert (again.serial, again.body, again.items) == (first.serial, first.body, first.items)
        assert again.attempt == attempt
    made.answer(200)
    assert made.population.unanswered == 0
    assert made.population.next_due is None


@given(seeds)
def test_once_all_is_well_everything_is_answered_in_the_end(seed: int) -> None:
    made = world(seed)
    made.run(80, failing=0.5)
    while made.flying:
        made.answer(200)
    while made.population.unanswered:
        due = made.population.next_due
        assert due is not None
        made.clock.now = max(made.clock.now, due)
        again = made.population.next_redelivery()
        assert again is not None
        made.flying.append(again)
        made.answer(200)
    everything = {item.message_id for one in made.given for item in messages(one)}
    assert everything == made.acknowledged


def test_a_full_backlog_holds_back_what_is_new() -> None:
    made = world(8, senders=50, backlog=3)
    for _ in range(3):
        assert made.give() is not None
        made.answer(None)
    made.clock.now = -1.0
    assert made.give() is None


def test_equal_seeds_give_equal_bodies() -> None:
    one, other = world(9), world(9)
    one.run(200)
    other.run(200)
    assert [d.body for d in one.given] == [d.body for d in other.given]
    different = world(10)
    different.run(200)
    assert [d.body for d in one.given] != [d.body for d in different.given]


def test_an_answer_to_what_is_not_out_is_refused() -> None:
    made = world(11)
    delivery = made.give()
    assert delivery is not None
    made.answer(200)
    with pytest.raises(ValueError, match="not in flight"):
        made.population.answered(delivery, 200)


@pytest.mark.parametrize("texts", [{}, {"rides": []}])
def test_a_population_needs_texts(texts: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError):
        Population(1, NUMBERS, Random(1), texts)
