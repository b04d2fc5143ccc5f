"""The sender's own ledger: what was sent, how it was answered, what services saw, and the verdict.

It believes nothing that the router says about itself. What the router stored, and what it calls a dead
letter, is read by the caller and held against this.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

from router.simulator.deliveries import MESSAGE, Delivery, SentItem
from router.simulator.order import Arrival, judge_order
from router.simulator.replies import Answered, Replies, RepliesJudgement

SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Report:
    """The verdict and the counts behind it; `ok` means that there is no problem.

    `sent` counts messages each time they were sent, `distinct` each once, `duplicates` the difference;
    `received` counts distinct messages in a body that was answered 200. `delivered` maps a domain to the
    distinct messages that its service took, `dead_letters` counts distinct messages among them, `repeats`
    the deliveries after a message had been taken, and `longest_repeat` the most messages of one phone that
    were repeated in a row. `statuses` counts statuses each time they were sent. Percentiles are of complete
    answers, in milliseconds; 0.0 without any.

    `replies` counts distinct replies of services that were taken by the Graph endpoint, `replies_refused`
    those it refused for good, `reply_repeats` arrivals after the first, `longest_reply_repeat` the most of
    one conversation in a row; `other_replies` counts texts that no service gave. `forged` counts bodies that
    were posted without being Meta's, which count nowhere else.
    """

    ok: bool
    problems: tuple[str, ...]
    sent: int
    distinct: int
    duplicates: int
    received: int
    delivered: Mapping[str, int]
    dead_letters: int
    repeats: int
    longest_repeat: int
    statuses: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    replies: int = 0
    replies_refused: int = 0
    reply_repeats: int = 0
    longest_reply_repeat: int = 0
    other_replies: int = 0
    forged: int = 0


@dataclass
class _Entry:
    """One message: its place among its phone's, and everything that was heard of it."""

    item: SentItem
    conversation: tuple[str, str]
    place: int
    times_sent: int = 0
    received: bool = False
    taken_by: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Sight:
    domain: str
    message_id: str
    key: str
    attempt: int
    ordinal: int | None
    text: str | None
    accepted: bool


class Ledger:
    """Records as things happen, judges when asked. Keeps ids and texts, no bodies and no secrets."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._other_ids: set[str] = set()
        self._forged_ids: set[str] = set()
        self._forged = 0
        self._believed: list[str] = []
        self._lengths: Counter[tuple[str, str]] = Counter()
        self._sights: list[_Sight] = []
        self._statuses = 0
        self._latencies = array("d")
        self._replies = Replies()

    def sent(self, delivery: Delivery) -> None:
        """`delivery` goes out now; to be called before each attempt of it, and for each of two twins."""
        if delivery.forged:
            self._forged_ids.update(item.message_id for item in delivery.items)
            self._forged += 1
            return
        self._other_ids.update(delivery.malformed)
        for item in delivery.items:
            if item.kind != MESSAGE:
                self._statuses += 1
                self._other_ids.add(item.message_id)
                continue
            entry = self._entries.get(item.message_id)
            if entry is None:
                conversation = (item.phone_number_id, item.sender)
                entry = _Entry(item, conversation, self._lengths[conversation])
                self._entries[item.message_id] = entry
                self._lengths[conversation] += 1
            entry.times_sent += 1

    def answered(self, delivery: Delivery, status: int | None, seconds: float | None) -> None:
        """The attempt was answered `status` after `seconds`; both None when no complete answer came."""
        if delivery.forged:
            if status not in (None, 401):
                self._believed.append(f"a forged body ({delivery.manner.forgery}) was answered {status}")
            return
        if seconds is not None:
            self._latencies.append(seconds)
        if status != 200:
            return
        for item in delivery.items:
            if item.kind == MESSAGE:
                self._entries[item.message_id].received = True

    def seen(
        self,
        domain: str,
        message_id: str,
        key: str,
        attempt: int,
        ordinal: int | None = None,
        text: str | None = None,
        *,
        accepted: bool = True,
    ) -> None:
        """The service of `domain` was handed the message `message_id` under the idempotency key `key`.

        To be called in the order in which the service got them. `attempt` counts from 1. `ordinal` and
        `text`, as far as the service could read them, must be those that were sent. `accepted` is False
        when the service refused or answered with a failure: the router may then try again, which is no
        repeat.
        """
        self._sights.append(_Sight(domain, message_id, key, attempt, ordinal, text, accepted))
        if accepted and message_id in self._entries:
            self._entries[message_id].taken_by.append(domain)

    def replied(self, message_id: str, texts: Sequence[str]) -> None:
        """The service answered `message_id` with these texts; to be called each time it answers.

        No text may be that of another reply. Raises ValueError if one is, or is empty, or if the message was
        answered with other texts before.
        """
        self._replies.replied(message_id, texts)

    def reply_taken(self, phone_number_id: str, recipient: str, text: str) -> None:
        """The Graph endpoint took `text` for `recipient`; to be called in the order in which it did."""
        self._replies.heard(phone_number_id, recipient, text, refused=False)

    def reply_refused(self, phone_number_id: str, recipient: str, text: str) -> None:
        """The Graph endpoint refused `text` for good; in one order with what it took."""
        self._replies.heard(phone_number_id, recipient, text, refused=True)

    def verify(
        self,
        *,
        dead_letters: Collection[str],
        stored: Collection[str],
        allow_repeats: bool = False,
        repeat_bound: int | None = None,
        replies: bool = False,
        in_doubt: Iterable[str] = (),
        is_router_text: Callable[[str], bool] | None = None,
    ) -> Report:
        """Judge everything recorded so far.

        `stored` are the ids of all messages that the router has durably, archives included. `dead_letters`
        are the ids of those that are or ever were dead letters: for these alone, late and repeated delivery
        is in order. `allow_repeats` accepts what a crash may cause, a suffix of a conversation delivered
        again in order; of at most `repeat_bound` messages, if given.

        With `replies`, the replies that services gave are judged as well: taken or refused for good, by the
        phone that wrote, over its number, in the order of its messages, and again only as a suffix where
        `allow_repeats` says so. `in_doubt` are texts whose sender may not have heard that they were taken:
        each may come once more for each time that it is listed. A text that no service gave is a problem
        if `is_router_text` is given and denies it.
        """
        stored, dead_letters = frozenset(stored), frozenset(dead_letters)
        problems = [
            *self._believed,
            *self._unknown("stored", stored),
            *self._unknown("a dead letter", dead_letters),
            *self._lost(dead_letters, stored),
            *self._mistaken(stored),
            *self._key_problems(),
        ]
        longest = 0
        for arrivals in self._conversations(dead_letters):
            judged = judge_order(arrivals, allow_repeats=allow_repeats, repeat_bound=repeat_bound)
            problems += judged.problems
            longest = max(longest, judged.longest_repeat)
        spoken = RepliesJudgement()
        if replies:
            spoken = self._replies.judge(
                lambda message_id: self._answered(message_id, dead_letters),
                self._lengths.keys(),
                allow_repeats=allow_repeats,
                in_doubt=in_doubt,
                is_router_text=is_router_text,
            )
            problems += spoken.problems
        return self._report(problems, dead_letters, longest, spoken)

    def _answered(self, message_id: str, dead_letters: Collection[str]) -> Answered | None:
        entry = self._entries.get(message_id)
        if entry is None:
            return None
        domain = entry.item.domain
        owed = bool(entry.taken_by) if domain is None else domain in entry.taken_by
        return Answered(entry.conversation, entry.place, owed, message_id in dead_letters)

    def _conversations(self, dead_letters: Collection[str]) -> Iterable[list[Arrival]]:
        arrivals: dict[tuple[str, str], list[Arrival]] = {}
        for sight in self._sights:
            entry = self._entries.get(sight.message_id)
            if entry is not None and sight.message_id not in dead_letters:
                arrival = Arrival(entry.place, sight.message_id, sight.accepted)
                arrivals.setdefault(entry.conversation, []).append(arrival)
        return arrivals.values()

    def _unknown(self, claim: str, message_ids: Iterable[str]) -> Iterator[str]:
        for message_id in sorted(message_ids):
            if message_id not in self._entries and message_id not in self._other_ids:
                yield f"{message_id} is {claim} but was {self._absence(message_id)}"

    def _absence(self, message_id: str) -> str:
        return "only forged" if message_id in self._forged_ids else "never sent"

    def _lost(self, dead_letters: Collection[str], stored: Collection[str]) -> Iterator[str]:
        for message_id, entry in self._entries.items():
            if not entry.received:
                continue
            if message_id not in stored:
                yield f"{message_id} was answered 200 but is not stored"
            domain = entry.item.domain
            if domain is not None and domain not in entry.taken_by and message_id not in dead_letters:
                yield f"{message_id} was answered 200 but neither taken by {domain} nor a dead letter"

    def _mistaken(self, stored: Collection[str]) -> Iterator[str]:
        """Each sight on its own: sent at all, to this domain, with this content, and stored first."""
        for sight in self._sights:
            named = f"{sight.message_id} (attempt {sight.attempt} at {sight.domain})"
            entry = self._entries.get(sight.message_id)
            if entry is None:
                known = sight.message_id in self._other_ids
                missing = "is no message" if known else f"was {self._absence(sight.message_id)}"
                yield f"{named} was delivered but {missing}"
                continue
            item = entry.item
            if item.domain not in (None, sight.domain):
                yield f"{named} belongs to {item.domain}"
            if sight.ordinal not in (None, item.ordinal):
                yield f"{named} came as number {sight.ordinal} of its phone, was sent as {item.ordinal}"
            if sight.text not in (None, item.text):
                yield f"{named} came with another text than was sent"
            if sight.message_id not in stored:
                yield f"{named} was delivered but is not stored"

    def _key_problems(self) -> Iterator[str]:
        key_of: dict[str, str] = {}
        owner_of: dict[str, str] = {}
        for sight in self._sights:
            key, message_id = sight.key, sight.message_id
            if key_of.setdefault(message_id, key) != key:
                yield f"{message_id} came with key {key}, before with {key_of[message_id]}"
            if owner_of.setdefault(key, message_id) != message_id:
                yield f"{message_id} came with key {key}, which belongs to {owner_of[key]}"

    def _report(
        self,
        problems: Sequence[str],
        dead_letters: Collection[str],
        longest: int,
        spoken: RepliesJudgement,
    ) -> Report:
        entries = self._entries.values()
        domains = sorted({domain for entry in entries for domain in entry.taken_by})
        sent = sum(entry.times_sent for entry in entries)
        latencies = sorted(self._latencies)
        return Report(
            ok=not problems,
            problems=_shortened(problems),
            sent=sent,
            distinct=len(entries),
            duplicates=sent - len(entries),
            received=sum(entry.received for entry in entries),
            delivered={domain: sum(domain in entry.taken_by for entry in entries) for domain in domains},
            dead_letters=sum(message_id in self._entries for message_id in dead_letters),
            repeats=sum(max(len(entry.taken_by) - 1, 0) for entry in entries),
            longest_repeat=longest,
            statuses=self._statuses,
            p50_ms=_percentile_ms(latencies, 50),
            p95_ms=_percentile_ms(latencies, 95),
            p99_ms=_percentile_ms(latencies, 99),
            replies=spoken.taken,
            replies_refused=spoken.refused,
            reply_repeats=spoken.repeats,
            longest_reply_repeat=spoken.longest_repeat,
            other_replies=spoken.others,
            forged=self._forged,
        )


def _shortened(problems: Sequence[str]) -> tuple[str, ...]:
    more = len(problems) - SHOWN_PROBLEMS
    return (*problems[:SHOWN_PROBLEMS], *([f"... and {more} more"] if more > 0 else []))


def _percentile_ms(ordered: Sequence[float], percent: int) -> float:
    """Nearest rank: the smallest value that at least `percent` of all do not exceed."""
    return ordered[ceil(len(ordered) * percent / 100) - 1] * 1000 if ordered else 0.0
