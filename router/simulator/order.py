"""The rule of order within one conversation: first deliveries as sent, repeats only as suffixes, in order.

Pure: arrivals in, judgement out. What else may be wrong with a delivery is judged in ledger.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Arrival:
    """A message handed to its service; `place` (from 0) is its rank among those that its phone sent.

    `accepted` is False when the service refused it or failed.
    """

    place: int
    message_id: str
    accepted: bool = True


class Judgement(NamedTuple):
    """`longest_repeat` is the number of messages that the longest repeat went back, 0 without any."""

    problems: list[str]
    longest_repeat: int


def judge_order(
    arrivals: Iterable[Arrival], *, allow_repeats: bool, repeat_bound: int | None = None
) -> Judgement:
    """Judge the arrivals of one conversation, given in the order in which they came.

    First arrivals come in the order of their places, each after the one before it was accepted; gaps are
    none of this rule's business. A message that was not accepted may come again at once. Anything else that
    comes again is a repeat. With `allow_repeats` a repeat may start at any message, at most `repeat_bound`
    back if given, and then goes on one by one through the last message that had arrived; it may start over.
    """
    problems: list[str] = []
    rank: dict[int, int] = {}  # place -> how many different messages arrived before it
    taken: set[int] = set()
    highest, at, longest = -1, -1, 0
    newest: Arrival | None = None
    for arrival in arrivals:
        place, name = arrival.place, arrival.message_id
        last = len(rank) - 1
        known = rank.get(place)
        if known is None:
            if place < highest:
                problems.append(f"{name} arrived after a later message of its phone")
            if newest is not None and newest.place not in taken:
                problems.append(f"{name} arrived before {newest.message_id} of its phone was accepted")
            if at < last and allow_repeats:
                problems.append(f"{name} arrived while a repeat had not reached its end")
            known = rank[place] = last + 1
            highest = max(highest, place)
            newest = arrival
        elif known != at or place in taken:
            back = last - known + 1
            if known <= at:
                longest = max(longest, back)
            if not allow_repeats:
                problems.append(f"{name} was delivered again")
            elif known > at + 1:
                problems.append(f"{name} was repeated while messages before it were skipped")
            elif known <= at and repeat_bound is not None and back > repeat_bound:
                problems.append(f"{name} was repeated {back} messages back, allowed are {repeat_bound}")
        if arrival.accepted:
            taken.add(place)
        at = known
    if allow_repeats and newest is not None and at < len(rank) - 1:
        problems.append(f"{newest.message_id} was left out at the end of a repeat")
    return Judgement(problems, longest)
