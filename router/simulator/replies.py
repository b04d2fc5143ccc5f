"""What services answered, what the Graph endpoint took of it, and the rule that holds the two together.

Which message was whose, and whether its reply is owed, comes from ledger.py.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from router.simulator.order import Arrival, Judgement, judge_order


class Answered(NamedTuple):
    """A message that a service answered.

    `conversation` is (phone_number_id, sender), `place` its rank among those of its phone. `owed` says that
    its service took it, so that its replies must arrive; `dead` that it is or was a dead letter: its replies
    may come late, again or not at all, but nowhere else.
    """

    conversation: tuple[str, str]
    place: int
    owed: bool
    dead: bool


class _Reply(NamedTuple):
    message_id: str
    number: int  # from 0 among the replies to its message

    def __str__(self) -> str:
        return f"reply {self.number + 1} to {self.message_id}"


class _Heard(NamedTuple):
    conversation: tuple[str, str]
    text: str
    refused: bool


@dataclass(frozen=True)
class RepliesJudgement:
    """`taken` and `refused` count distinct replies of services, `repeats` their arrivals after the first;
    `others` counts what no service gave. `longest_repeat` is the most replies repeated in a row.
    """

    problems: tuple[str, ...] = ()
    taken: int = 0
    refused: int = 0
    repeats: int = 0
    longest_repeat: int = 0
    others: int = 0


class Replies:
    """Records replies as they are given and as they arrive. A reply is known by its text alone."""

    def __init__(self) -> None:
        self._texts: dict[str, tuple[str, ...]] = {}
        self._named: dict[str, _Reply] = {}
        self._heard: list[_Heard] = []

    def replied(self, message_id: str, texts: Sequence[str]) -> None:
        """A service answered `message_id` with `texts`; may be told again, with the same texts.

        Raises:
            ValueError: a text is empty or belongs to another reply, or the texts differ from those before.
        """
        given = tuple(texts)
        if self._texts.get(message_id, given) != given:
            raise ValueError(f"{message_id} was answered with other texts before")
        for number, text in enumerate(given):
            reply = _Reply(message_id, number)
            if not text or given.index(text) != number or self._named.get(text, reply) != reply:
                raise ValueError(f"{reply} has an empty text, or the text of another reply")
        self._texts[message_id] = given
        self._named.update({text: _Reply(message_id, number) for number, text in enumerate(given)})

    def heard(self, phone_number_id: str, recipient: str, text: str, *, refused: bool) -> None:
        """The Graph endpoint took this text, or refused it for good; told in the order in which it did."""
        self._heard.append(_Heard((phone_number_id, recipient), text, refused))

    def judge(
        self,
        answered: Callable[[str], Answered | None],
        conversations: Collection[tuple[str, str]],
        *,
        allow_repeats: bool,
        in_doubt: Iterable[str],
        is_router_text: Callable[[str], bool] | None,
    ) -> RepliesJudgement:
        """Judge everything recorded so far.

        `answered` knows the messages; replies to any other are none of this rule's business. Of all
        `conversations` one must be where a text went that no service gave; `is_router_text` says whether
        the router may have written it itself, which is believed of every text without it.

        First arrivals of a conversation come in the order of its messages, and of the replies to one. What
        arrives again is judged by `judge_order`. Each time that a text is in `in_doubt`, it may come once
        more, at once or later.
        """
        messages = {name: known for name in self._texts if (known := answered(name)) is not None}
        counts = Counter(heard.text for heard in self._heard if heard.text in self._named)
        refused = {heard.text for heard in self._heard if heard.refused and heard.text in self._named}
        problems = [*self._missing(messages), *self._misdirected(messages, conversations, is_router_text)]
        longest = 0
        doubts = Counter(in_doubt)
        for heard in self._by_conversation(messages):
            judged = _judged(heard, self._places(messages, heard), allow_repeats, doubts)
            problems += judged.problems
            longest = max(longest, judged.longest_repeat)
        return RepliesJudgement(
            problems=tuple(problems),
            taken=len(counts.keys() - refused),
            refused=len(refused),
            repeats=sum(counts.values()) - len(counts),
            longest_repeat=longest,
            others=sum(heard.text not in self._named for heard in self._heard),
        )

    def _missing(self, messages: Mapping[str, Answered]) -> Iterator[str]:
        arrived = {heard.text for heard in self._heard}
        for message_id, message in messages.items():
            if message.owed and not message.dead:
                for number, text in enumerate(self._texts[message_id]):
                    if text not in arrived:
                        yield f"{_Reply(message_id, number)} was given by its service but never sent"

    def _misdirected(
        self,
        messages: Mapping[str, Answered],
        conversations: Collection[tuple[str, str]],
        is_router_text: Callable[[str], bool] | None,
    ) -> Iterator[str]:
        for heard in self._heard:
            reply = self._named.get(heard.text)
            if reply is None:
                if heard.conversation not in conversations:
                    yield "a text that no service gave went to a phone that never wrote to that number"
                if is_router_text is not None and not is_router_text(heard.text):
                    yield f"a text was sent that neither a service nor the router gave: {heard.text[:40]!r}"
            elif reply.message_id in messages:
                number, phone = messages[reply.message_id].conversation
                if heard.conversation[0] != number:
                    yield f"{reply} went out over {heard.conversation[0]}, the message came over {number}"
                if heard.conversation[1] != phone:
                    yield f"{reply} went to another phone than wrote"

    def _by_conversation(self, messages: Mapping[str, Answered]) -> Iterable[list[str]]:
        """The texts that are subject to order, as they arrived, by the conversation that they answer."""
        texts: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for heard in self._heard:
            reply = self._named.get(heard.text)
            message = messages.get(reply.message_id) if reply is not None else None
            if message is not None and not message.dead:
                texts[message.conversation].append(heard.text)
        return texts.values()

    def _places(self, messages: Mapping[str, Answered], texts: Iterable[str]) -> dict[str, Arrival]:
        def due(text: str) -> tuple[int, int]:
            reply = self._named[text]
            return messages[reply.message_id].place, reply.number

        ordered = sorted(set(texts), key=due)
        return {text: Arrival(place, str(self._named[text])) for place, text in enumerate(ordered)}


def _judged(
    texts: Sequence[str], arrivals: Mapping[str, Arrival], allow_repeats: bool, doubts: Mapping[str, int]
) -> Judgement:
    """Judge one conversation. A repeat that is excused by doubt may also have been part of a suffix that a
    crash repeated, and nobody can tell which it was: the better reading holds.
    """
    left = Counter({text: doubts[text] for text in arrivals if text in doubts})
    distinct = list(_unrepeated(texts, left))
    readings = [distinct]
    if left.total():
        readings.append(_without_doubtful(distinct, left))
    judged = [
        judge_order((arrivals[text] for text in reading), allow_repeats=allow_repeats) for reading in readings
    ]
    return min(judged, key=lambda judgement: len(judgement.problems))


def _unrepeated(texts: Iterable[str], left: Counter[str]) -> Iterator[str]:
    """Without those that come again at once, as often as `left` allows, which is used up."""
    before = None
    for text in texts:
        if text == before and left[text] > 0:
            left[text] -= 1
        else:
            yield text
        before = text


def _without_doubtful(texts: Iterable[str], left: Counter[str]) -> list[str]:
    """Without repeats, as often as `left` allows."""
    budget, seen, kept = left.copy(), set[str](), []
    for text in texts:
        if text in seen and budget[text] > 0:
            budget[text] -= 1
        else:
            kept.append(text)
        seen.add(text)
    return kept
