"""What phones write: the next message of one, statuses of what was sent to it, and many of both in one body.

Which phone may write, and what is sent again, is decided in phones.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from router.simulator import payloads, statuses
from router.simulator.deliveries import MESSAGE, STATUS, SentItem
from router.simulator.faults import strikes
from router.simulator.kinds import any_kind
from router.simulator.payloads import Head, Json

MALFORMED = "malformed"
"""The kind of a part that stands among messages and that nobody can deliver."""

REMARKS = ("more about it", "any news?", "¿cuánto cuesta?", "está bien 👍", "मैं इंतज़ार कर रहा हूँ", 'so "soon"?')
NAMES = ("Ada", "Björn", "María José", "Nguyễn Văn An", "李小龙", "O'Neil", "Zoë 🌻")
STEPS = (("sent",), ("sent", "delivered"), ("delivered", "sent", "read"), ("failed",))
OTHER_CHANGES: Sequence[tuple[str, Json]] = (
    ("account_update", {"event": "VERIFIED_ACCOUNT", "phone_number": "15550000001"}),
    ("message_template_status_update", {"event": "APPROVED", "message_template_id": 7, "reason": None}),
    ("phone_number_quality_update", {"event": "FLAGGED", "current_limit": "TIER_10K"}),
    ("security", {"event": "PIN_CHANGED", "requester": "1"}),
    ("calls", {"messaging_product": "whatsapp", "calls": [{"id": "wacid.1", "event": "terminate"}]}),
    ("user_preferences", {"messaging_product": "whatsapp", "user_preferences": [{"value": "stop"}]}),
    ("hologram_calls", {"frames": [1, 2.5, None]}),
)


@dataclass
class Phone:
    """`wa_id` is `number`, or None if the phone shows only its `user_id`; `written` counts its messages,
    of which `last_id` is the newest."""

    number: str
    wa_id: str | None
    user_id: str | None
    name: str
    phone_number_id: str
    domain: str
    written: int = 0
    last_id: str = ""

    @property
    def sender(self) -> str:
        return self.wa_id or self.user_id or self.number


@dataclass(frozen=True)
class Part:
    """What one item adds to a body; a status has no contact. A malformed part may be anything that JSON can
    say; its item has the id that can be read in it, if any.
    """

    item: SentItem
    json: object
    contact: Json | None
    phone: Phone = field(repr=False)


@dataclass(frozen=True)
class Author:
    """Writes for all phones; `texts` maps a domain to its texts, keyword first; `unix_time` is in seconds.

    Of the messages after a phone's first, a share of `all_kinds` is of any kind that there is.
    """

    rng: Random
    texts: Mapping[str, Sequence[str]]
    unix_time: Callable[[], float]
    all_kinds: float = 0.0

    def message(self, phone: Phone) -> Part:
        """The next message of `phone`; the first one is its domain's keyword alone."""
        phone.written += 1
        head = self._head(phone)
        json = self._content(head, phone)
        phone.last_id = head.id
        return self._part(MESSAGE, phone, head.id, phone.written, json)

    def forged(self, phone: Phone) -> Part:
        """A message that `phone` never wrote."""
        head = self._head(phone)
        return self._part(MESSAGE, phone, head.id, 0, payloads.text_message(head, "never written"))

    def malformed(self, phone: Phone) -> Part:
        """What stands where a message should: without a usable id, without a sender, or no message at all."""
        head = self._head(phone)
        whole = payloads.text_message(head, "malformed")
        without_id = {name: value for name, value in whole.items() if name != "id"}
        without_sender = {name: value for name, value in whole.items() if not name.startswith("from")}
        json = self.rng.choice(
            (without_id, whole | {"id": ""}, whole | {"id": 7}, without_sender, "hi", None)
        )
        return self._part(MALFORMED, phone, head.id if json is without_sender else "", 0, json)

    def reports(self, phone: Phone, message_id: str) -> list[list[Part]]:
        """Statuses of the real `message_id` sent to `phone`, body by body; those of one name are equal."""
        script = self.rng.choice(statuses.SCRIPTS)
        parts = {name: self._status(phone, message_id, name) for names in script for name in names}
        return [[parts[name] for name in names] for names in script]

    def between(self, phone_number_id: str, display_number: str) -> Json:
        """What may come between messages: an error of Meta's, or a change of another field."""
        if self.rng.random() < 0.3:
            failure = payloads.error(131000, "Something went wrong", "Try again later.")
            return payloads.change(phone_number_id, display_number, errors=[failure])
        field, value = self.rng.choice(OTHER_CHANGES)
        return payloads.other_change(field, value)

    def statuses(self, phone: Phone) -> list[Part]:
        """A few steps of one message sent to `phone`, not always in order."""
        message_id = payloads.wamid(phone.number, self.rng, outbound=True)
        return [self._status(phone, message_id, name) for name in self.rng.choice(STEPS)]

    def _head(self, phone: Phone) -> Head:
        message_id = payloads.wamid(phone.number, self.rng)
        return Head(message_id, phone.wa_id, int(self.unix_time()), phone.user_id)

    def _part(self, kind: str, phone: Phone, message_id: str, ordinal: int, json: object) -> Part:
        text = payloads.text_of(json) if isinstance(json, dict) else ""
        domain = phone.domain if kind == MESSAGE else None
        item = SentItem(kind, message_id, phone.phone_number_id, phone.sender, domain, ordinal, text)
        contact = payloads.contact(phone.name, phone.wa_id, phone.user_id) if kind == MESSAGE else None
        return Part(item, json, contact, phone)

    def _content(self, head: Head, phone: Phone) -> Json:
        texts, ordinal = self.texts[phone.domain], phone.written
        if ordinal == 1:
            return payloads.text_message(head, texts[0])
        if strikes(self.all_kinds, self.rng):
            return any_kind(head, self.rng, f"{self.rng.choice(REMARKS)} #{ordinal}", phone.last_id)
        draw = self.rng.random()
        if draw < 0.05:
            return payloads.button_reply_message(head, f"choice-{ordinal}", f"Choice #{ordinal}")
        if draw < 0.10:
            return payloads.list_reply_message(head, f"row-{ordinal}", f"Row #{ordinal}", "from a list")
        if draw < 0.17:
            return payloads.image_message(head, self.rng, f"look at this #{ordinal}")
        if draw < 0.20:
            return payloads.audio_message(head, self.rng)
        return payloads.text_message(head, f"{self.rng.choice((*texts, *REMARKS))} #{ordinal}")

    def _status(self, phone: Phone, message_id: str, name: str) -> Part:
        undeliverable = payloads.error(131026, "Message undeliverable", "Message Undeliverable.")
        json = payloads.status(
            message_id,
            name,
            int(self.unix_time()),
            phone.wa_id,
            user_id=phone.user_id,
            errors=[undeliverable] if name == "failed" else (),
        )
        item = SentItem(STATUS, message_id, phone.phone_number_id, phone.sender, None, 0, name)
        return Part(item, json, None, phone)


def in_body_order(parts: Iterable[Part]) -> list[Part]:
    """The same parts by business number (first come first), messages before statuses, else as they were."""
    listed = list(parts)
    numbers = list(dict.fromkeys(part.item.phone_number_id for part in listed))
    rank = {number: index for index, number in enumerate(numbers)}
    return sorted(listed, key=lambda part: (rank[part.item.phone_number_id], _list_of(part)))


def encoded(
    parts: Sequence[Part],
    accounts: Mapping[str, tuple[str, str]],
    between: Mapping[str, Json] | None = None,
) -> bytes:
    """One body of parts that are in body order: an entry per business number, a change for its messages and
    one for its statuses.

    `accounts` maps a phone_number_id to (WABA id, display number), `between` one to a change that follows its
    first.
    """
    grouped: dict[str, dict[str, list[Part]]] = {}
    for part in parts:
        grouped.setdefault(part.item.phone_number_id, {}).setdefault(_list_of(part), []).append(part)
    entries = []
    for number, lists in grouped.items():
        waba, display = accounts[number]
        changes = [_change(number, display, name, listed) for name, listed in lists.items()]
        if between and number in between:
            changes.insert(1, between[number])
        entries.append(payloads.entry(waba, *changes))
    return payloads.body(*entries)


def _list_of(part: Part) -> str:
    """The list in which a part stands: "messages" or "statuses"."""
    return "statuses" if part.item.kind == STATUS else "messages"


def _change(number: str, display: str, name: str, parts: Sequence[Part]) -> Json:
    if name == "statuses":
        return payloads.change(number, display, statuses=[part.json for part in parts])
    contacts = {part.item.sender: part.contact for part in parts if part.contact is not None}
    messages = [part.json for part in parts]
    return payloads.change(number, display, messages=messages, contacts=list(contacts.values()))
