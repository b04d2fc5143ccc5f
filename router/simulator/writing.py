"""What phones write: the next message of one, statuses of what was sent to it, and many of both in one body.

Which phone may write, and what is sent again, is decided in phones.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from router.simulator import payloads
from router.simulator.deliveries import MESSAGE, STATUS, SentItem
from router.simulator.payloads import Head, Json

REMARKS = ("more about it", "any news?", "¿cuánto cuesta?", "está bien 👍", "मैं इंतज़ार कर रहा हूँ", 'so "soon"?')
NAMES = ("Ada", "Björn", "María José", "Nguyễn Văn An", "李小龙", "O'Neil", "Zoë 🌻")
STEPS = (("sent",), ("sent", "delivered"), ("delivered", "sent", "read"), ("failed",))


@dataclass
class Phone:
    """`wa_id` is `number`, or None if the phone shows only its `user_id`; `written` counts its messages."""

    number: str
    wa_id: str | None
    user_id: str | None
    name: str
    phone_number_id: str
    domain: str
    written: int = 0

    @property
    def sender(self) -> str:
        return self.wa_id or self.user_id or self.number


@dataclass(frozen=True)
class Part:
    """What one item adds to a body; a status has no contact."""

    item: SentItem
    json: Json
    contact: Json | None
    phone: Phone = field(repr=False)


@dataclass(frozen=True)
class Author:
    """Writes for all phones; `texts` maps a domain to its texts, keyword first; `unix_time` is in seconds."""

    rng: Random
    texts: Mapping[str, Sequence[str]]
    unix_time: Callable[[], float]

    def message(self, phone: Phone) -> Part:
        """The next message of `phone`; the first one is its domain's keyword alone."""
        phone.written += 1
        message_id = payloads.wamid(phone.number, self.rng)
        head = Head(message_id, phone.wa_id, int(self.unix_time()), phone.user_id)
        text, json = self._content(head, self.texts[phone.domain], phone.written)
        item = SentItem(
            MESSAGE, message_id, phone.phone_number_id, phone.sender, phone.domain, phone.written, text
        )
        return Part(item, json, payloads.contact(phone.name, phone.wa_id, phone.user_id), phone)

    def statuses(self, phone: Phone) -> list[Part]:
        """A few steps of one message sent to `phone`, not always in order."""
        message_id = payloads.wamid(phone.number, self.rng, outbound=True)
        return [self._status(phone, message_id, name) for name in self.rng.choice(STEPS)]

    def _content(self, head: Head, texts: Sequence[str], ordinal: int) -> tuple[str, Json]:
        if ordinal == 1:
            return texts[0], payloads.text_message(head, texts[0])
        draw = self.rng.random()
        if draw < 0.05:
            title = f"Choice #{ordinal}"
            return title, payloads.button_reply_message(head, f"choice-{ordinal}", title)
        if draw < 0.10:
            title = f"Row #{ordinal}"
            return title, payloads.list_reply_message(head, f"row-{ordinal}", title, "from a list")
        if draw < 0.17:
            caption = f"look at this #{ordinal}"
            return caption, payloads.image_message(head, self.rng, caption)
        if draw < 0.20:
            return "", payloads.audio_message(head, self.rng)
        text = f"{self.rng.choice((*texts, *REMARKS))} #{ordinal}"
        return text, payloads.text_message(head, text)

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
    """The same parts by business number (first come first), then by kind, else as they were."""
    listed = list(parts)
    numbers = list(dict.fromkeys(part.item.phone_number_id for part in listed))
    rank = {number: index for index, number in enumerate(numbers)}
    return sorted(listed, key=lambda part: (rank[part.item.phone_number_id], part.item.kind))


def encoded(parts: Sequence[Part], accounts: Mapping[str, tuple[str, str]]) -> bytes:
    """One body of parts that are in body order: an entry per business number, a change per kind.

    `accounts` maps a phone_number_id to (WABA id, display number).
    """
    grouped: dict[str, dict[str, list[Part]]] = {}
    for part in parts:
        grouped.setdefault(part.item.phone_number_id, {}).setdefault(part.item.kind, []).append(part)
    entries = []
    for number, kinds in grouped.items():
        waba, display = accounts[number]
        changes = [_change(number, display, kind, of_kind) for kind, of_kind in kinds.items()]
        entries.append(payloads.entry(waba, *changes))
    return payloads.body(*entries)


def _change(number: str, display: str, kind: str, parts: Sequence[Part]) -> Json:
    written = [part.json for part in parts]
    if kind == STATUS:
        return payloads.change(number, display, statuses=written)
    contacts = {part.item.sender: part.contact for part in parts if part.contact is not None}
    return payloads.change(number, display, messages=written, contacts=list(contacts.values()))
